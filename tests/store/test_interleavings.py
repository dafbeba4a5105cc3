"""Saves, loads, deletes and sweeps of several processes, switched and ended at any call.

Time gives nothing here: what sweeps otherwise leave alone for an hour is theirs at once, so that
all that is promised hangs on the order of the calls alone.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from holdfast.store import (
    Blob,
    Manifest,
    Missing,
    MissingBlob,
    MissingManifest,
    MissingName,
    NameKey,
    ObjectStore,
    object_store,
    object_sweep,
)
from holdfast.store.bucket import Bucket, copy_of
from holdfast.store.cells import ManifestCell, MarkCell, NameCell
from holdfast.store.object_sweep import ObjectSweeper
from holdfast.store.objects import Version, Writer
from holdfast.store.records import NameRecord
from tests.store.samples import PLAIN, WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

A = key_of(PLAIN)
GARBAGE = b"nobody's any more"


class Died(BaseException):
    """The process has ended."""


class Process:
    """One process: it makes as many calls as it is given, then waits, and ends when told to."""

    def __init__(self, work: Callable[[Process], None]) -> None:
        self._work = work
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._left = 0.0
        self._dying = False
        self._thread = threading.Thread(target=self._run)
        self.calls = 0
        self.ended = False
        self.error: BaseException | None = None
        self._thread.start()

    def let(self, calls: float) -> None:
        """Let it make so many calls, unless it ends before."""
        if not self.ended:
            self._left = calls
            self._go.release()
            self._back.acquire()

    def kill(self) -> None:
        self._dying = True
        self.let(1)
        self._thread.join()

    def calling(self, name: str, key: str) -> None:
        """Before each call to the storage."""
        if not self._dying and self._left <= 0:
            self._back.release()
            self._go.acquire()
        if self._dying:
            raise Died
        self._left -= 1
        self.calls += 1

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._dying:
                self._work(self)
        except Died:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()


def process(world: World, work: Work) -> Process:
    def run(self: Process) -> None:
        with opened(world.storage, self.calling) as store:
            work(world, store)

    return Process(run)


def opened(storage: Storage, calling: Callable[[str, str], None] | None = None) -> ObjectStore:
    objects = MemoryObjects(storage)
    store = ObjectStore(objects, writer=Writer(objects, lambda tried: None), wall=lambda: 2e9)
    if calling is not None:
        objects.calling = calling  # opening is no part of it
    return store


@dataclass
class World:
    """A storage, what processes on it were promised, and what they have begun."""

    storage: Storage = field(default_factory=Storage)
    names: dict[NameKey, set[str | None]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    contents: dict[Blob, bytes] = field(default_factory=dict)
    deletes: list[int] = field(default_factory=lambda: [0, 0])
    """Of A: how many have begun, and how many have ended."""
    acknowledged: int = 0

    def put(self, store: ObjectStore, content: bytes) -> Blob:
        blob = store.put_blob([content])
        self.contents[blob] = content
        return blob

    def name(self, store: ObjectStore, manifest: Manifest) -> None:
        """Publish a manifest and point its name to it."""
        key = key_of(manifest)
        self.names.setdefault(key, {None}).add(manifest.id)
        _, ended = self.deletes
        store.set_name(key, store.publish(manifest), replace=True)
        if key != A or self.deletes == [ended, ended]:  # else one may have come after it
            self.names[key] -= {None}
        self.acknowledged += 1

    def keep(self, store: ObjectStore, manifest: Manifest) -> None:
        store.publish(manifest)
        self.kept.add(manifest.id)
        self.acknowledged += 1

    def check(self) -> None:
        """Everything promised is whole, and stays so whatever is swept later."""
        for _ in range(2):
            store = opened(self.storage)
            for key, allowed in self.names.items():
                found = store.resolve(key)
                assert found in allowed, f"{key} is {found}, not {allowed}"
                if found is not None:
                    self._check_whole(store, found)
            for manifest_id in self.kept:
                assert manifest_id in dict(store.unnamed())
                self._check_whole(store, manifest_id)
            report = store.verify()
            assert report.ok, report.problems
            for _ in range(5):
                store.sweep()

    def _check_whole(self, store: ObjectStore, manifest_id: str) -> None:
        for name, blob in store.read_manifest(manifest_id).files.items():
            assert store.read_blob(blob, what=name) == self.contents[blob]


Work = Callable[[World, ObjectStore], None]


# What is there before: a checkpoint A, and garbage that sweeps are about to remove


def prepare() -> World:
    world = World()
    store = opened(world.storage)
    world.name(store, manifest_of({WEIGHTS: world.put(store, b"first")}))
    world.put(store, GARBAGE)
    world.acknowledged = 0
    return world


def garbage(world: World) -> Blob:
    return next(blob for blob, content in world.contents.items() if content == GARBAGE)


def sweep(world: World, store: ObjectStore) -> None:
    for _ in range(4):
        assert store.sweep().damaged == ()


def save(world: World, store: ObjectStore) -> None:
    """Another checkpoint over the old one, with new content and some that is garbage."""
    with_suppressed(
        lambda: world.name(
            store,
            manifest_of({WEIGHTS: world.put(store, b"second"), "x": garbage(world)}, seq=9),
        )
    )


def snapshot(world: World, store: ObjectStore) -> None:
    """An unnamed manifest over garbage."""
    with_suppressed(
        lambda: world.keep(store, manifest_of({WEIGHTS: garbage(world)}, name=None, seq=10))
    )


def name_again(world: World, store: ObjectStore) -> None:
    """Point a name to a manifest that nothing has referred to for long."""
    with_suppressed(lambda: world.name(store, replace(PLAIN, seq=11, files={})))


def name_found(world: World, store: ObjectStore) -> None:
    """Point a name to a manifest that is there, and perhaps about to go."""
    found = manifest_of({WEIGHTS: garbage(world)}, name="found")
    world.names.setdefault(key_of(found), {None}).add(found.id)

    def work() -> None:
        store.set_name(key_of(found), found.id)
        world.names[key_of(found)] -= {None}
        world.acknowledged += 1

    with_suppressed(work)


def amend(world: World, store: ObjectStore) -> None:

    def work() -> None:
        for manifest_id in list(world.names[A] - {None}):
            assert manifest_id is not None
            with_suppressed(partial(begin, manifest_id))
        store.amend(A, public=True)
        world.acknowledged += 1

    def begin(manifest_id: str) -> None:
        world.names[A].add(replace(store.read_manifest(manifest_id), public=True).id)

    with_suppressed(work)


def delete(world: World, store: ObjectStore) -> None:
    world.names[A].add(None)
    world.deletes[0] += 1
    store.delete_name(A)
    world.deletes[1] += 1


def discard(world: World, store: ObjectStore) -> None:
    for manifest_id in list(world.kept):
        world.kept.discard(manifest_id)
        store.discard(manifest_id)


def load(world: World, store: ObjectStore) -> None:
    """What is pinned can be read, whatever happens to its name."""
    (current,) = world.names[A] - {None}
    assert current is not None
    with ExitStack() as stack:
        try:
            manifest = stack.enter_context(store.pin(current))
        except MissingManifest:
            return
        for name, blob in manifest.files.items():
            assert store.read_blob(blob, what=name) == world.contents[blob]
        world.acknowledged += 1


def put_again(world: World, store: ObjectStore) -> None:
    """The same content as garbage, and a snapshot of it."""
    world.put(store, GARBAGE)
    snapshot(world, store)


def with_suppressed(work: Callable[[], object]) -> None:
    """What was not promised to be there may be missing."""
    try:
        work()
    except (MissingBlob, MissingManifest, MissingName):
        pass


def with_found(world: World) -> World:
    """Also a manifest that waits for its name, over the garbage."""
    opened(world.storage).publish(manifest_of({WEIGHTS: garbage(world)}, name="found"))
    return world


def doomed(world: World) -> World:
    """The same when a sweep has looked at it once."""
    opened(world.storage).sweep()
    return world


SCENARIOS: dict[str, tuple[Callable[[], World], Sequence[Work]]] = {
    "save": (prepare, [save, sweep]),
    "save over doomed": (lambda: doomed(prepare()), [save, sweep]),
    "snapshot over doomed": (lambda: doomed(prepare()), [snapshot, sweep]),
    "name": (lambda: with_found(prepare()), [name_found, sweep]),
    "name a doomed one": (lambda: doomed(with_found(prepare())), [name_found, sweep]),
    "load": (prepare, [load, delete, sweep]),
    "put again": (lambda: doomed(prepare()), [put_again, sweep, sweep]),
    "amend": (prepare, [amend, sweep]),
    "two saves": (lambda: doomed(prepare()), [save, snapshot, sweep]),
    "two sweeps": (lambda: doomed(with_found(prepare())), [name_found, sweep, sweep]),
    "two sweeps beside a snapshot": (lambda: doomed(prepare()), [snapshot, sweep, sweep]),
    "delete and save": (prepare, [delete, name_again, sweep]),
    "delete and amend": (prepare, [delete, amend, sweep]),
}


@pytest.fixture(autouse=True)
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_sweep, "LONG", 0.0)
    monkeypatch.setattr(object_sweep, "STAND_BACK", 0.0)


Turns = Sequence[tuple[int, int]]
"""Which process makes how many calls, one after the other."""


def play(
    prepared: Callable[[], World], works: Sequence[Work], turns: Turns, killed: int | None = None
) -> tuple[World, list[int]]:
    """Run processes by turns, end one of them or none, then let the others finish; their calls."""
    world = prepared()
    processes = [process(world, work) for work in works]
    for who, calls in turns:
        processes[who].let(calls)
    if killed is not None:
        processes[killed].kill()
    for one in processes:
        one.let(float("inf"))
    for one in processes:
        if one.error is not None:
            raise one.error
    world.check()
    return world, [one.calls for one in processes]


def schedules(lengths: Sequence[int], count: int, seed: int) -> Iterator[Turns]:
    """Some with two switches between two processes, and others at random."""
    generator = random.Random(seed)
    for _ in range(count):
        one, other = generator.sample(range(len(lengths)), 2)
        yield [
            (one, generator.randint(0, lengths[one])),
            (other, generator.randint(0, lengths[other])),
        ]
    for _ in range(count):
        yield [
            (generator.randrange(len(lengths)), generator.randint(1, 6))
            for _ in range(generator.randint(3, 12))
        ]


def explore(scenario: str, count: int = 150) -> int:
    """Play a scenario in many orders; how many acknowledgements there were."""
    prepared, works = SCENARIOS[scenario]
    _, lengths = play(prepared, works, [])
    acknowledged = 0
    for turns in schedules(lengths, count, seed=5):
        acknowledged += play(prepared, works, turns)[0].acknowledged
    return acknowledged


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_acknowledged_is_lost_in_whatever_order(scenario: str) -> None:
    assert explore(scenario) > 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_process_that_ends_at_any_call_leaves_the_old_or_the_new(scenario: str) -> None:
    prepared, works = SCENARIOS[scenario]
    _, lengths = play(prepared, works, [])
    for who, length in enumerate(lengths):
        for calls in range(length + 1):
            play(prepared, works, [(who, calls)], killed=who)


# Each rule left out, to see that it is needed


def no_second_look(patch: pytest.MonkeyPatch) -> None:
    """A sweep declares dead what it finds unused for the first time."""

    def fell(self: ObjectSweeper, copy: str, scan: Any, ages: Any) -> bool:
        if copy not in scan.candidates:
            return False
        return self._bucket.create(copy.replace("blobs", "doomed", 1), MarkCell("dead")) is not None

    patch.setattr(ObjectSweeper, "_fell", fell)


def no_second_look_at_manifests(patch: pytest.MonkeyPatch) -> None:
    def bury(self: ObjectSweeper, entry: Any, scan: Any, ages: Any) -> bool:
        if entry.key not in scan.candidates:
            return False
        return self._bucket.swap(entry, entry.value.into("dead")) is not None

    patch.setattr(ObjectSweeper, "_bury", bury)


def doom_not_lifted(patch: pytest.MonkeyPatch) -> None:
    """Whoever comes to refer to a doomed copy takes it as it is."""
    patch.setattr(Bucket, "keep_copy", lambda self, key: self.objects.size(key) is not None)


def doom_not_lifted_from_manifests(patch: pytest.MonkeyPatch) -> None:
    def keep_manifest(self: Bucket, manifest_id: str) -> Any:
        alive = ("kept", "loose", "doomed")
        found = (e for e in self.manifests_of(manifest_id) if e.whole().state in alive)
        return next(found, None)

    patch.setattr(Bucket, "keep_manifest", keep_manifest)


def looked_before_said(patch: pytest.MonkeyPatch) -> None:
    """A publication looks at the copies before it says that it uses them."""
    create, keep_copy = Bucket.create, Bucket.keep_copy
    looked: dict[str, bool] = {}

    def late(self: Bucket, key: str, cell: Any) -> Any:
        if isinstance(cell, ManifestCell):
            looked.update({copy: keep_copy(self, copy) for copy in cell.uses})
        return create(self, key, cell)

    patch.setattr(Bucket, "create", late)
    patch.setattr(Bucket, "keep_copy", lambda self, key: looked[key])


def moved_before_said(patch: pytest.MonkeyPatch) -> None:
    """A name is moved without saying first where to."""

    def point(self: ObjectStore, key: NameKey, manifest_id: str, accepts: Any) -> str:
        manifest = self.read_manifest(manifest_id)
        found = self._bucket.keep_manifest(manifest_id)
        if found is None:
            raise MissingManifest(manifest_id)
        cell = NameCell(NameRecord(key, manifest_id, manifest.expires), copy_of(found.key))
        while not self._write_name(key, self._bucket.name(key), cell):
            pass
        return manifest_id

    patch.setattr(ObjectStore, "_point", point)


def keys_that_come_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(object_store, "uuid4", lambda: uuid.UUID(int=0))


def swaps_that_ask_nothing(patch: pytest.MonkeyPatch) -> None:
    def swap(self: MemoryObjects, key: str, data: bytes, version: Version) -> Version:
        self.calling("swap", key)
        return self.storage.put(key, data)

    patch.setattr(MemoryObjects, "swap", swap)


MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    no_second_look: "save",
    no_second_look_at_manifests: "name",
    doom_not_lifted: "snapshot over doomed",
    doom_not_lifted_from_manifests: "name a doomed one",
    looked_before_said: "snapshot over doomed",
    moved_before_said: "name",
    keys_that_come_back: "put again",
    swaps_that_ask_nothing: "snapshot over doomed",
}
"""Each with a scenario that shows it."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_leaving_out_any_rule_loses_something(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    prepared, works = SCENARIOS[MUTATIONS[mutation]]
    play(prepared, works, [])  # one after the other, nothing shows
    with pytest.raises((AssertionError, Missing)):
        explore(MUTATIONS[mutation], count=2000)
