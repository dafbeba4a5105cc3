"""A long run takes no more room than a short one: rows, database, segments, checkpoint store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa

from holdfast.catalog import tables
from holdfast.runs import bodies, contents, retention, samplers, segments
from holdfast.runs.bodies import SaveSampler
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.samplers import Samplers
from holdfast.runs.service import Lifetimes

from .sim import World
from .test_service import OWNER, Clients, steps
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

AT_ONCE = 100
"""Steps that are submitted together; then their results are read."""
SOME_SEGMENTS = 2 << 20
"""Bytes: which are full, and which have just been let go, depends on the moment, too."""
LARGE_EVERY = 5
MORE = 1.5
"""How much larger something may be after five times the steps: it depends on the moment."""

Sizes = dict[str, int]


def body(step: int) -> bytes:
    """Every fifth is above the limit for the database."""
    small = batch(step)
    if step % LARGE_EVERY:
        return small
    return json.dumps({**json.loads(small), "pad": "x" * (segments.LARGE + 1)}).encode()


def train(clients: Clients, first: int, count: int) -> None:
    """Submit some steps and read their results."""
    (model,) = clients.all
    world = clients._world

    async def work() -> None:
        run = await world.runs.live(model.id, OWNER)
        for step in range(first, first + count):
            forward = run.submit(2 * step + 1, bodies.FORWARD_BACKWARD, body(step))
            update = run.submit(2 * step + 2, bodies.OPTIM_STEP, steps().encode())
            await asyncio.gather(forward, update)
        for seq in range(2 * first + 1, 2 * (first + count) + 1):
            outcome = await run.outcome(seq, 60.0)
            assert outcome is not None and outcome.failure is None, outcome
            run.delivered(seq)

    clients._do(work)


def files(folder: Path) -> tuple[int, int]:
    """How many there are, and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def measure(world: World) -> Sizes:
    """Everything that a run could leave more and more of."""
    found: Sizes = {}
    with world.catalog._engine.connect() as connection:
        for table in tables.metadata.sorted_tables:
            found[f"rows of {table.name}"] = (
                connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            )
    for name in ("catalog.db", "catalog.db-wal"):
        found[name] = (world.root / name).stat().st_size
    for name in ("segments", "store"):
        found[f"files in {name}"], found[f"bytes in {name}"] = files(world.root / name)
    return found


@contextmanager
def clients_of_a_server() -> Iterator[Clients]:
    """With a run; segments are small, so that there are many of them."""
    clients = Clients()
    with mock.patch.object(segments, "FULL", 1 << 20):
        try:
            clients.world = World(1, large=False)
            clients.world.runs.lifetimes = Lifetimes(between_sweeps=1200.0)
            clients.open_session("python")
            clients.create(0, 1)
            yield clients
        finally:
            clients.close()


def sizes_after(*counts: int) -> list[Sizes]:
    """What there is after so many steps of one run."""
    found = []
    with clients_of_a_server() as clients:
        done = 0
        while done < counts[-1]:
            train(clients, done, AT_ONCE)
            done += AT_ONCE
            if done in counts:
                found.append(measure(clients._world))
            clients._world.let(800.0)
        assert clients._poll(clients.all[0].ops[0], 1.0)
        clients._check_logs()
    return found


def most(found: list[Sizes]) -> Sizes:
    """The largest of each."""
    return {name: max(sizes[name] for sizes in found) for name in found[0]}


def grown(before: Sizes, after: Sizes) -> dict[str, tuple[int, int]]:
    """What is larger by more than the moment explains."""
    return {
        name: (before[name], after[name])
        for name in before
        if after[name] > MORE * before[name] + (SOME_SEGMENTS if name == "bytes in segments" else 4)
    }


def test_nothing_grows_with_the_length_of_a_run() -> None:
    found = sizes_after(500, 1000, 1500, 4000, 4500, 5000)
    before, after = most(found[:3]), most(found[3:])  # at other moments between two sweeps
    assert before["rows of operations"] > 100 and before["bytes in segments"] > 1 << 19
    assert grown(before, after) == {}


# --- Samplers -------------------------------------------------------------------------------


def train_and_sample(clients: Clients, first: int, count: int) -> None:
    """Steps of some minutes, each with a sampler of its own, which is used then."""
    (model,) = clients.all
    world = clients._world

    async def step(number: int) -> None:
        run = await world.runs.live(model.id, OWNER)
        seq = 3 * number
        await run.submit(seq + 1, bodies.FORWARD_BACKWARD, batch(number))
        await run.submit(seq + 2, bodies.OPTIM_STEP, steps().encode())
        await run.submit(seq + 3, bodies.SAVE_SAMPLER, SaveSampler(None, number).encode())
        outcome = await run.outcome(seq + 3, 60.0)
        assert outcome is not None and outcome.result is not None
        for shown in (1, 2, 3):
            run.delivered(seq + shown)
        made = json.loads(outcome.result)["sampling_session_id"]
        sampler = await world.runs.samplers.get(made, OWNER)
        world.runs.samplers.submit(sampler, 0, b"prompt", b"prompt")
        sampled = await world.runs.samplers.outcome(made, 0, 60.0)
        assert sampled is not None and sampled.failure is None

    for number in range(first, first + count):
        clients._do(partial(step, number))
        world.let(300.0)


def sizes_after_samples(monkeypatch: pytest.MonkeyPatch, *counts: int) -> list[Sizes]:
    monkeypatch.setattr(samplers, "NEWEST_KEPT", 10)
    monkeypatch.setattr(samplers, "UNUSED_KEPT", 3600.0)
    found = []
    with clients_of_a_server() as clients:
        done = 0
        for count in counts:
            train_and_sample(clients, done, count - done)
            done = count
            found.append(measure(clients._world))
        clients._check_logs()
    return found


def test_a_run_that_samples_at_each_step_takes_no_more_and_more_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after = sizes_after_samples(monkeypatch, 60, 180)
    assert before["files in store"] > 2 * 12, "those of the last hour are there"
    # The rows are some hundred bytes each: an id that was given out is never another sampler's.
    assert set(grown(before, after)) == {"rows of samplers"}


def test_growth_of_what_is_sampled_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def release_unused(_: Samplers) -> None:
        pass

    monkeypatch.setattr(Samplers, "release_unused", release_unused)
    before, after = sizes_after_samples(monkeypatch, 60, 120)
    assert {"files in store", "bytes in store"} <= set(grown(before, after))


# --- What makes it grow ---------------------------------------------------------------------


def no_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "expire", lambda *_args, **_more: [])


def no_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "unreferenced", lambda *_args, **_more: [])


def no_discarding(monkeypatch: pytest.MonkeyPatch) -> None:
    async def discard(*_: object) -> None:
        pass

    monkeypatch.setattr(Checkpoints, "discard", discard)


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (no_expiry, "rows of operations"),
        (no_removal, "bytes in segments"),
        (no_discarding, "bytes in store"),
    ],
)
def test_growth_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    before, after = sizes_after(200, 700)
    assert what in grown(before, after)
