"""A disk that does not answer, or the database on it, keeps nobody waiting without a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from holdfast.runs import bodies
from holdfast.runs.bodies import FORWARD_BACKWARD, Load, Save
from holdfast.runs.checkpoints import STORE_TAKES
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.journal import Failure
from holdfast.runs.run import SUBMISSION_WAITS
from holdfast.store import NameKey

from .sim import World
from .test_service import OWNER, Clients
from .toy import batch

HOUR = 3600.0


@contextmanager
def hanging(world: World, what: str) -> Iterator[None]:
    """What is begun meanwhile ends an hour later."""
    with pytest.MonkeyPatch.context() as changes:
        honest = world.pause
        changes.setattr(world, "pause", lambda w: HOUR if w == what else honest(w))
        yield


@contextmanager
def hanging_in_the_store(*calls: str) -> Iterator[None]:
    """What of these is begun meanwhile is done an hour later."""
    with pytest.MonkeyPatch.context() as changes:
        honest = asyncio.to_thread

        async def to_thread(call: Any, *args: Any) -> Any:
            if call.__name__ in calls:
                await asyncio.sleep(HOUR)
            return await honest(call, *args)

        changes.setattr(asyncio, "to_thread", to_thread)
        yield


def test_a_submission_waits_half_a_minute_for_one_that_hangs_in_the_catalog(
    clients: Clients,
) -> None:
    """And none is lost, nor taken twice: what was sent is journaled as soon as the disk answers."""
    world, (run,) = clients._world, clients.all
    first, second = clients._next_requests(run, 2, 1)

    async def send() -> float:
        live = await world.runs.live(run.id, OWNER)
        with hanging(world, "commit"):
            hung = asyncio.create_task(live.submit(first.seq, FORWARD_BACKWARD, batch(1)))
            await asyncio.sleep(1.0)
        began = world.clock.now
        for seq in (second.seq, first.seq):  # the next one, and the same one again
            with pytest.raises(Unavailable, match="has not been journaled"):
                await live.submit(seq, FORWARD_BACKWARD, batch(1))
        took = world.clock.now - began
        assert not hung.done()
        assert (
            await hung
            == await live.submit(first.seq, FORWARD_BACKWARD, batch(1))
            == first.request_id
        )
        assert await live.submit(second.seq, FORWARD_BACKWARD, batch(1)) == second.request_id
        return took

    assert world.loop.run_until_complete(send()) == pytest.approx(2 * SUBMISSION_WAITS, abs=1.0)
    for op in (first, second):
        outcome, _ = clients._poll(op, 30.0)
        assert outcome is not None and outcome.failure is None


def failure_of(clients: Clients, kind: str, body: Save | Load, within: float) -> Failure | None:
    """That of an operation, or None, which it must have within so many seconds."""
    (run,) = clients.all
    clients._submit(run, kind, body)
    outcome, note = clients._poll(run.ops[run.highest], within)
    assert outcome is not None, note
    return outcome.failure


def test_a_save_and_a_load_end_when_the_store_does_not_answer(clients: Clients) -> None:
    (run,) = clients.all
    save, load = Save("a", None, True), Load(run.id, "weights", "a", True, [OWNER])
    with hanging_in_the_store("publish", "resolve"):
        found = failure_of(clients, bodies.SAVE_WEIGHTS, save, 2 * STORE_TAKES)
        assert found is not None and found.code == "store_unavailable"
        found = failure_of(clients, bodies.LOAD_WEIGHTS, load, 4 * STORE_TAKES)
        assert found is not None and found.code == "store_unavailable"
    assert failure_of(clients, bodies.SAVE_WEIGHTS, save, 30.0) is None
    assert failure_of(clients, bodies.LOAD_WEIGHTS, load, 30.0) is None


def test_what_the_store_does_late_is_done_before_what_comes_after_it(clients: Clients) -> None:
    """A deletion that was given up does not take away what is saved under that name later."""
    world, save = clients._world, Save("a", None, True)
    key = NameKey(clients.all[0].id, "weights", "a")
    assert failure_of(clients, bodies.SAVE_WEIGHTS, save, 30.0) is None
    with hanging_in_the_store("delete_name"), pytest.raises(RunError) as caught:
        world.loop.run_until_complete(delete(world, key))
    assert caught.value.code == "store_unavailable"
    found = failure_of(clients, bodies.SAVE_WEIGHTS, save, 4 * STORE_TAKES)
    assert found is not None and found.code == "store_unavailable"
    for _ in range(4):
        world.let(HOUR / 3)
        clients._beat()
    assert world.store.resolve(key) is not None


async def delete(world: World, key: NameKey) -> None:
    await world.runs.checkpoints.delete(key, OWNER)
