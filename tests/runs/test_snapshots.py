"""A snapshot stalls its run by the copy of its state, and by nothing else."""

from __future__ import annotations

import pytest

from holdfast.runs import bodies
from holdfast.runs.publishing import Publisher

from .sim import World
from .test_recovery import train
from .test_service import Clients
from .toy import ToyCapture, ToyEngine

COPY, WRITE = 1.0, 60.0
STEPS = 4


def seconds_of_steps(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> float:
    """How long some steps take, of which the first one is followed by a snapshot.

    Copying a state takes a second, and writing it a minute.
    """
    world, (run,) = clients._world, clients.all
    world.let(10.0)
    takes = {"capture": COPY, "write": WRITE}
    monkeypatch.setattr(World, "pause", lambda _, what: takes.get(what, 0.001))
    world.lives[-1]._pause = world.pause
    copied = []
    capture = ToyEngine.capture

    async def counted(engine: ToyEngine, run: str, *, optimizer: bool = True) -> ToyCapture:
        copied.append(run)
        return await capture(engine, run, optimizer=optimizer)

    monkeypatch.setattr(ToyEngine, "capture", counted)
    monkeypatch.setattr(Publisher, "due", property(lambda publisher: not publisher.publishing))
    began = world.clock.now
    for x in range(STEPS):
        train(clients, x)
    clients.all_end()
    seconds = world.clock.now - began
    assert copied
    assert all(op.seen is not None and op.seen.failure is None for op in run.ops.values())
    assert run.ops[run.highest].kind == bodies.OPTIM_STEP
    return seconds


def test_steps_wait_for_the_copy_alone(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    assert COPY <= seconds_of_steps(clients, monkeypatch) < COPY + 1.0


def test_without_writing_beside_they_wait_for_all_of_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Publisher.snapshot

    async def snapshot(publisher: Publisher, *, optimizer: bool = True) -> None:
        await honest(publisher, optimizer=optimizer)
        await publisher.settled()

    monkeypatch.setattr(Publisher, "snapshot", snapshot)
    assert seconds_of_steps(clients, monkeypatch) > WRITE
