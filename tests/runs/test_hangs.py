"""A disk that does not answer, or the database on it, keeps nobody waiting without a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.catalog import Catalog, epoch
from holdfast.runs import bodies, checkpoints
from holdfast.runs.bodies import FORWARD_BACKWARD, Load, Save
from holdfast.runs.checkpoints import STORE_TAKES, Checkpoints
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.journal import Failure
from holdfast.runs.run import SUBMISSION_WAITS
from holdfast.store import LocalStore, NameKey
from tests.store.samples import WEIGHTS, manifest_of

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
        honest = Checkpoints._in_thread

        async def in_thread(self: Checkpoints, call: Any, *args: Any) -> Any:
            if call.__name__ in calls:
                await asyncio.sleep(HOUR)
            return await honest(call, *args)

        changes.setattr(Checkpoints, "_in_thread", in_thread)
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


def test_nor_for_longer_when_it_comes_as_the_turn_changes(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free for a moment then, and somebody waits for it."""
    world, (run,) = clients._world, clients.all
    requests = clients._next_requests(run, 3, 1)
    commits, honest = iter((10.0,)), world.pause

    def pause(what: str) -> float:
        return next(commits, HOUR) if what == "commit" else honest(what)

    async def send() -> float:
        live = await world.runs.live(run.id, OWNER)
        first, second, third = [
            live.submit(op.seq, FORWARD_BACKWARD, op.body)
            for op in requests
            if isinstance(op.body, bytes)
        ]
        with monkeypatch.context() as changes:
            changes.setattr(world, "pause", pause)
            sent = [asyncio.create_task(first)]
            await asyncio.sleep(1.0)
            assert live._writing is not None
            live._writing.add_done_callback(lambda _: sent.append(asyncio.create_task(third)))
            sent.insert(1, asyncio.create_task(second))
            await asyncio.sleep(10.0)
            began = world.clock.now
            assert [task.done() for task in sent] == [True, False, False]
            with pytest.raises(Unavailable, match="has not been journaled"):
                await sent[2]
            assert not sent[1].done()
            sent[1].cancel()
            return world.clock.now - began

    assert world.loop.run_until_complete(send()) <= SUBMISSION_WAITS


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


@pytest.mark.anyio
async def test_calls_of_a_store_that_hang_keep_nothing_else_from_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large bodies are hashed in one, and the catalog is read."""
    monkeypatch.setattr(checkpoints, "STORE_TAKES", 0.5)
    answers = threading.Event()
    store, catalog = LocalStore(tmp_path / "store"), Catalog.open_file(tmp_path / "catalog.db")
    monkeypatch.setattr(store, "resolve", lambda key: answers.wait(30.0))
    found = Checkpoints(store, catalog)
    try:
        looking = [found.resolve(NameKey("r", "weights", "a"), [OWNER]) for _ in range(50)]
        outcomes = await asyncio.gather(*looking, return_exceptions=True)
        assert {getattr(o, "code", o) for o in outcomes} == {"store_unavailable"}
        async with asyncio.timeout(5.0):
            await catalog.read(epoch.current)
    finally:
        answers.set()
        catalog.close()


@pytest.mark.anyio
async def test_the_store_is_unavailable_to_who_asks_for_it_after_its_close(tmp_path: Path) -> None:
    """As a publication does that a stop did not wait for: its run would end with a defect."""
    store, catalog = LocalStore(tmp_path / "store"), Catalog.open_file(tmp_path / "catalog.db")
    found = Checkpoints(store, catalog)
    manifest = manifest_of({WEIGHTS: store.put_blob([b"weights"])})
    await found.publish(manifest)
    found.close()
    for asked in (found.publish(manifest), found.manifest(manifest.id), found.reconcile()):
        with pytest.raises(RunError) as caught:
            await asked
        assert caught.value.reason == "unavailable"
    catalog.close()
