"""A disk that does not answer, or the database on it, keeps nobody waiting without a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.catalog import Catalog, epoch
from holdfast.runs import bodies, checkpoints, stored
from holdfast.runs.bodies import FORWARD_BACKWARD, Load, Save
from holdfast.runs.checkpoints import STORE_TAKES, Checkpoints
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.journal import Failure
from holdfast.runs.submitting import SUBMISSION_WAITS
from holdfast.store import LocalStore, Manifest, NameKey
from tests.store.samples import WEIGHTS, key_of, manifest_of

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
            lock = live._submitting.lock
            release = lock.release

            def change() -> None:
                changes.setattr(lock, "release", release)
                release()
                sent.append(asyncio.create_task(third))

            changes.setattr(lock, "release", change)
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
    began = world.clock.now
    with hanging_in_the_store("delete_name"), pytest.raises(RunError) as caught:
        world.loop.run_until_complete(delete(world, key))
    assert caught.value.code == "store_unavailable"
    found = failure_of(clients, bodies.SAVE_WEIGHTS, save, 4 * STORE_TAKES)
    assert found is not None and found.code == "store_unavailable"
    while (left := began + HOUR - world.clock.now) > STORE_TAKES:
        world.let(min(left - STORE_TAKES / 2, HOUR / 3))
        clients._beat()
    assert failure_of(clients, bodies.SAVE_WEIGHTS, save, 2 * STORE_TAKES) is None
    assert world.clock.now > began + HOUR
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
    manifest = sample(found)
    await found.publish(manifest)
    found.close()
    for asked in (found.publish(manifest), found.manifest(manifest.id), found.reconcile()):
        with pytest.raises(RunError) as caught:
            await asked
        assert caught.value.reason == "unavailable"
    catalog.close()


class Held(LocalStore):
    """Changes names only when it is told to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def set_name(self, key: NameKey, manifest_id: str, *, replace: bool = False) -> None:
        self._hold()
        super().set_name(key, manifest_id, replace=replace)

    def delete_name(self, key: NameKey) -> bool:
        self._hold()
        return super().delete_name(key)

    def amend(self, key: NameKey, **changes: Any) -> str:
        self._hold()
        return super().amend(key, **changes)

    def _hold(self) -> None:
        self.begun.release()
        assert self.go_on.wait(30.0)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Checkpoints]:
    """Checkpoints of which one is there, and whose store is held from now on."""
    store, catalog = Held(tmp_path / "store"), Catalog.open_file(tmp_path / "catalog.db")
    found = Checkpoints(store, catalog)
    asyncio.run(catalog.write(lambda c: stored.insert(c, sample(found))))
    asyncio.run(found.publish(sample(found)))
    assert store.begun.acquire(timeout=5.0)
    store.go_on.clear()
    yield found
    store.go_on.set()
    found.close()
    catalog.close()


def sample(of: Checkpoints, **changes: Any) -> Manifest:
    return manifest_of({WEIGHTS: of.store.put_blob([b"weights"])}, **changes)


CHANGES: dict[str, Callable[[Checkpoints], Awaitable[object]]] = {
    "publish": lambda found: found.publish(sample(found, seq=8), replace=True),
    "delete": lambda found: found.delete(key_of(sample(found)), OWNER),
    "amend": lambda found: found.set_public(key_of(sample(found)), OWNER, True),
}


async def begun(found: Checkpoints, change: Awaitable[object]) -> asyncio.Future[object]:
    """A change whose thread is at it."""
    task = asyncio.ensure_future(change)
    assert isinstance(found.store, Held)
    assert await asyncio.to_thread(found.store.begun.acquire, timeout=5.0)
    return task


async def given_up(tasks: Sequence[asyncio.Future[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.anyio
@pytest.mark.parametrize("what", CHANGES)
async def test_what_was_begun_is_done_to_its_end_though_its_caller_goes_away(
    held: Checkpoints, what: str
) -> None:
    """And before what comes after it."""
    assert isinstance(held.store, Held)
    await given_up([await begun(held, CHANGES[what](held))])
    newer = sample(held, seq=9)
    saving = asyncio.create_task(held.publish(newer, replace=True))
    assert not await asyncio.to_thread(held.store.begun.acquire, timeout=0.3)
    held.store.go_on.set()
    assert await saving == newer.id == held.store.resolve(key_of(newer))
    assert not await held.differences()


@pytest.mark.anyio
@pytest.mark.parametrize("what", CHANGES)
async def test_a_name_whose_caller_goes_away_gets_its_row(held: Checkpoints, what: str) -> None:
    assert isinstance(held.store, Held)
    before = asyncio.all_tasks()
    await given_up([await begun(held, CHANGES[what](held))])
    held.store.go_on.set()
    async with asyncio.timeout(10.0):
        await asyncio.gather(*(asyncio.all_tasks() - before))
    rows, _ = await held.page(OWNER)
    found = [(row.seq, row.public) for row in rows]
    assert found == {"publish": [(8, False)], "delete": [], "amend": [(7, True)]}[what]
    assert not await held.differences()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["late", "gone"])
async def test_who_waits_for_a_change_that_hangs_gives_up_with_its_caller(
    held: Checkpoints, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or as many would wait as have asked, until the disk answers."""
    assert isinstance(held.store, Held)
    hung = await begun(held, CHANGES["delete"](held))
    before = asyncio.all_tasks()
    monkeypatch.setattr(checkpoints, "STORE_TAKES", 0.3 if how == "late" else 30.0)
    asking = [asyncio.ensure_future(CHANGES[what](held)) for what in CHANGES for _ in range(3)]
    await asyncio.sleep(0.1)
    if how == "gone":
        await given_up(asking)
    else:
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {getattr(o, "code", o) for o in outcomes} == {"store_unavailable"}
    await asyncio.sleep(0.1)
    assert asyncio.all_tasks() == before
    held.store.go_on.set()
    await hung
    assert held.store.resolve(key_of(sample(held))) is None
