"""A server that stops in good order: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import pytest

from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP
from holdfast.runs.driver import Driver
from holdfast.runs.order import Entry
from holdfast.runs.publishing import Publisher

from .test_recovery import check_all, save, train
from .test_service import Clients, steps
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def stop_in_the_middle(clients: Clients, kind: str) -> None:
    """Stop the server while an operation computes that takes longer than it has, and go on."""
    train(clients, 1)
    clients.all_end()
    world, (run,) = clients._world, clients.all
    world.pause = lambda what: 3.0 if what == kind else 0.01  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._submit(run, OPTIM_STEP, steps())
    world.let(0.5)
    world.restart(within=4.0)
    train(clients, 3)
    save(clients, "a")
    check_all(clients)


@pytest.mark.parametrize("kind", [FORWARD_BACKWARD, OPTIM_STEP])
def test_an_operation_in_whose_middle_the_server_stops_is_not_executed_twice(
    clients: Clients, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    stop_in_the_middle(clients, kind)


@pytest.mark.parametrize("kind", [FORWARD_BACKWARD, OPTIM_STEP])
def test_a_state_that_is_kept_behind_the_operation_under_way_is_found(
    clients: Clients, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    monkeypatch.setattr(Driver, "_state_is_known", True)
    with pytest.raises(AssertionError):
        stop_in_the_middle(clients, kind)


def end_after_a_defect_in_the_middle(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours meets a run when the worker has computed; then its session ends."""
    train(clients, 1)
    clients.all_end()
    world, (run,) = clients._world, clients.all
    honest = Driver._passed
    met: list[int] = []

    def passed(driver: Driver, entry: Entry) -> None:
        if not met:
            met.append(entry.seq)
            raise ZeroDivisionError("a defect")
        honest(driver, entry)

    monkeypatch.setattr(Driver, "_passed", passed)
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    world.let(1.0)
    session = clients.sessions.pop()
    clients._do(lambda: world.runs.end_session(session.id, "success"))
    world.let(5.0)
    last = [key for key, _ in world.store.names()]
    assert [key.name for key in last] == ["auto.2"]
    run.interpret(2, clients._now)
    clients._check_state(last[0], run.history[2], optimizer=True)


def test_a_defect_in_the_middle_of_an_operation_leaves_the_state_before_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_after_a_defect_in_the_middle(clients, monkeypatch)


def test_a_last_state_that_holds_an_operation_too_many_is_found(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "_state_is_known", True)
    with pytest.raises(AssertionError):
        end_after_a_defect_in_the_middle(clients, monkeypatch)
