"""The public calls in any order, against a model, with crashes, expiry and sweeps between them.

Two processes work on the same store, one of them also in the middle of the other's writes.
`HOLDFAST_EXAMPLES` sets the number of examples on the quick kinds of store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from holdfast.store import (
    Blob,
    Manifest,
    MissingBlob,
    MissingManifest,
    MissingName,
    NameKey,
    NameTaken,
    ObjectStore,
    Store,
)
from holdfast.store.aging import LONG
from holdfast.store.bucket import content_of
from holdfast.store.local import LocalStore
from holdfast.store.model import content_hash
from holdfast.store.objects import Objects
from holdfast.store.remote import connect
from tests.store.crash import Disk, Process
from tests.store.model import ROOT, Clock
from tests.store.samples import CONFIG, WEIGHTS, manifest_of
from tests.store.storage import MemoryObjects, Storage
from tests.support.s3 import S3Server

EXAMPLES = int(os.environ.get("HOLDFAST_EXAMPLES", "100"))
CONTENTS = st.sampled_from([b"", b"a", b"b" * 10, b"c" * 1000])
NAMES = st.sampled_from(["one", "two", "Two"])
RUNS = st.sampled_from(["run", "run:1"])
KINDS = st.sampled_from(["training", "sampler"])
WHO = st.integers(0, 1)


class StoreStates(RuleBasedStateMachine):
    """What the store has promised, as dictionaries; `open` and crashes come from the subclass."""

    blobs = Bundle("blobs")
    manifests = Bundle("manifests")
    sweeps_until_clean = 8
    """An hour apart: what nothing refers to has gone then."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.contents: dict[Blob, bytes] = {}
        self.known: dict[str, Manifest] = {}
        self.names: dict[NameKey, str] = {}
        self.unnamed: set[str] = set()
        self.waiting: dict[str, list[float]] = {}
        """Until when a blob or manifest that waits to be referred to stays, for each put of it."""
        self.pins: dict[str, list[tuple[int, AbstractContextManager[Manifest]]]] = {}
        self.stores: list[Store] = []

    def open(self) -> Store:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.stores = [self.open(), self.open()]

    # What must be there

    def current(self) -> dict[NameKey, str]:
        return {
            key: manifest_id
            for key, manifest_id in self.names.items()
            if (expires := self.known[manifest_id].expires) is None or expires > self.clock.wall
        }

    def is_kept(self, name: str) -> bool:
        """Whether a blob's hash or a manifest's id is promised to be there."""
        manifests = {*self.current().values(), *self.unnamed, *self.pins}
        manifests |= {m for m in self.known if self.waits(m)}
        blobs = {blob.hash for m in manifests for blob in self.known[m].files.values()}
        return name in manifests | blobs or self.waits(name)

    def waits(self, name: str) -> bool:
        return any(until > self.clock.monotonic for until in self.waiting.get(name, ()))

    def wait_for(self, name: str) -> None:
        self.waiting.setdefault(name, []).append(self.clock.monotonic + LONG)

    def is_referred_to(self, *names: str) -> None:
        """One wait of each is over; it may be that which would have lasted longest."""
        for name in set(names):
            if waiting := self.waiting.get(name):
                waiting.remove(max(waiting))

    def is_published(self, manifest: Manifest) -> None:
        self.known[manifest.id] = manifest
        self.is_referred_to(*(blob.hash for blob in manifest.files.values()))

    # What people do

    @rule(target=blobs, content=CONTENTS, who=WHO, swept=st.booleans())
    def put(self, content: bytes, who: int, swept: bool) -> Blob:
        def parts() -> Iterator[bytes]:
            yield content[:3]
            if swept:
                self.stores[1 - who].sweep()
            yield content[3:]

        blob = self.stores[who].put_blob(parts())
        assert blob == Blob(content_hash(content), len(content))
        self.contents[blob] = content
        self.wait_for(blob.hash)
        return blob

    @rule(
        target=manifests,
        files=st.lists(blobs, min_size=1, max_size=2),
        name=st.none() | NAMES,
        run=RUNS,
        kind=KINDS,
        seq=st.integers(0, 2),
        life=st.none() | st.sampled_from([-1.0, 10.0, 1e5]),
        who=WHO,
    )
    def publish(
        self,
        files: list[Blob],
        name: str | None,
        run: str,
        kind: str,
        seq: int,
        life: float | None,
        who: int,
    ) -> object:
        manifest = manifest_of(
            dict(zip((WEIGHTS, CONFIG), files, strict=False)),
            name=name,
            run=run,
            kind=kind,
            seq=seq,
            expires=None if life is None else self.clock.wall + life,
        )
        return self.publish_it(manifest, who)

    @rule(target=manifests, manifest=manifests, name=st.none() | NAMES, run=RUNS, who=WHO)
    def copy(self, manifest: Manifest, name: str | None, run: str, who: int) -> object:
        return self.publish_it(replace(manifest, name=name, run=run, parent=manifest.id), who)

    def publish_it(self, manifest: Manifest, who: int) -> object:
        try:
            assert self.stores[who].publish(manifest) == manifest.id
        except MissingBlob:
            assert not all(self.is_kept(blob.hash) for blob in manifest.files.values())
            return multiple()
        self.is_published(manifest)
        if manifest.name is None:
            self.unnamed.add(manifest.id)
        else:
            self.wait_for(manifest.id)
        return manifest

    @rule(manifest=manifests, replacing=st.booleans(), who=WHO)
    def set_name(self, manifest: Manifest, replacing: bool, who: int) -> None:
        if manifest.key is None:
            return
        existing = self.current().get(manifest.key)
        try:
            self.stores[who].set_name(manifest.key, manifest.id, replace=replacing)
        except NameTaken as error:
            assert not replacing
            assert error.existing == existing != manifest.id
        except MissingManifest:
            assert not self.is_kept(manifest.id)
        else:
            assert replacing or existing in (None, manifest.id)
            self.names[manifest.key] = manifest.id
            self.is_referred_to(manifest.id)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), life=st.none() | st.just(50.0), public=st.booleans(), who=WHO)
    def amend(self, data: st.DataObject, life: float | None, public: bool, who: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.names, key=str)))
        expires = None if life is None else self.clock.wall + life
        current = self.current().get(key)
        try:
            amended = self.stores[who].amend(key, expires=expires, public=public)
        except MissingName:
            assert current is None
        else:
            assert current is not None
            self.is_published(replace(self.known[current], expires=expires, public=public))
            self.is_referred_to(amended)
            self.names[key] = amended

    @precondition(lambda self: self.names)
    @rule(data=st.data(), who=WHO)
    def delete_name(self, data: st.DataObject, who: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.names, key=str)))
        assert self.stores[who].delete_name(key) == (key in self.current())
        self.names.pop(key, None)

    @precondition(lambda self: self.unnamed)
    @rule(data=st.data(), who=WHO)
    def discard(self, data: st.DataObject, who: int) -> None:
        manifest_id = data.draw(st.sampled_from(sorted(self.unnamed)))
        assert self.stores[who].discard(manifest_id)
        self.unnamed.remove(manifest_id)

    @rule(manifest=manifests, who=WHO)
    def pin(self, manifest: Manifest, who: int) -> None:
        context = self.stores[who].pin(manifest.id)
        try:
            assert context.__enter__() == manifest
        except MissingManifest:
            assert not self.is_kept(manifest.id)
        else:
            self.pins.setdefault(manifest.id, []).append((who, context))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        manifest_id = data.draw(st.sampled_from(sorted(self.pins)))
        self.pins[manifest_id].pop()[1].__exit__(None, None, None)
        if not self.pins[manifest_id]:
            del self.pins[manifest_id]

    @rule(who=WHO)
    def sweep(self, who: int) -> None:
        assert self.stores[who].sweep().damaged == ()

    @rule(seconds=st.sampled_from([30.0, 61.0, 1801.0]), times=st.integers(1, 4))
    def sweep_for_a_while(self, seconds: float, times: int) -> None:
        for _ in range(times):
            self.live()
            self.clock.monotonic += seconds
            self.stores[0].sweep()

    def live(self) -> None:
        """What running processes do by themselves every few minutes."""

    @rule(seconds=st.sampled_from([11.0, 3599.0, 1e4, -3599.0]))
    def move_the_clock(self, seconds: float) -> None:
        # Names that are expired may be removed; those of a clock set back are not promised.
        self.names = self.current()
        self.clock.wall += seconds
        if seconds < 0:
            self.forget_expired_ones()

    def forget_expired_ones(self) -> None:
        for key, manifest_id in self.stores[0].names():
            self.names.setdefault(key, manifest_id)

    # What must hold at all times

    @invariant()
    def everything_promised_is_there(self) -> None:
        if not self.stores:
            return
        current = self.current()
        for store in self.stores:
            assert dict(store.names()) == current
            assert {m for m, _ in store.unnamed()} == self.unnamed
        store = self.stores[0]
        for manifest_id in {*current.values(), *self.unnamed, *self.pins}:
            manifest = store.read_manifest(manifest_id)
            assert manifest == self.known[manifest_id]
            for name, blob in manifest.files.items():
                assert store.read_blob(blob, what=name) == self.contents[blob]
        assert store.verify().ok

    def teardown(self) -> None:
        """Afterwards all that nothing refers to goes, and nothing else."""
        if not self.stores:
            return
        for contexts in self.pins.values():
            for _, context in contexts:
                context.__exit__(None, None, None)
        self.pins.clear()
        self.names = self.current()
        for _ in range(self.sweeps_until_clean):
            self.clock.monotonic += LONG
            self.stores[0].sweep()
        self.everything_promised_is_there()
        used = {*self.names.values(), *self.unnamed}
        hashes = {blob.hash for m in used for blob in self.known[m].files.values()}
        assert self.left() == used | hashes

    def left(self) -> set[str]:
        """Names of all files that keep content."""
        raise NotImplementedError


class CrashingStates(StoreStates):
    """On a disk that loses power, used by processes that are killed."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()

    def open(self) -> LocalStore:
        return LocalStore(
            ROOT,
            files=Process(self.disk),
            wall=lambda: self.clock.wall,
            monotonic=lambda: self.clock.monotonic,
        )

    @rule(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.5, 1.0]))
    def lose_power(self, seed: int, share: float) -> None:
        random = Random(seed)
        self.disk = self.disk.after_power_loss(lambda n: random.random() < share, random)
        self.stores = [self.open(), self.open()]
        self.pins.clear()
        # Who was to refer to these is gone as well.
        self.waiting.clear()

    @rule(who=WHO)
    def kill(self, who: int) -> None:
        store = self.stores[who]
        assert isinstance(store, LocalStore)
        files = store._files
        assert isinstance(files, Process)
        files.release_all()
        self.stores[who] = self.open()
        for manifest_id, contexts in list(self.pins.items()):
            self.pins[manifest_id] = [held for held in contexts if held[0] != who]
            if not self.pins[manifest_id]:
                del self.pins[manifest_id]

    def left(self) -> set[str]:
        process = Process(self.disk)
        return {
            entry
            for directory in ("blobs", "manifests", "unnamed", "tmp", "fresh", "pins")
            for entry in process.list(f"{ROOT}/{directory}")
        }


class LocalStates(StoreStates):
    """On the real file system."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())

    def open(self) -> LocalStore:
        return LocalStore(
            self.root / "store",
            wall=lambda: self.clock.wall,
            monotonic=lambda: self.clock.monotonic,
        )

    @rule(who=WHO)
    def reopen(self, who: int) -> None:
        self.stores[who].close()
        self.stores[who] = self.open()

    def left(self) -> set[str]:
        return {
            path.name
            for directory in ("blobs", "manifests", "unnamed", "tmp", "fresh", "pins")
            for path in (self.root / "store" / directory).iterdir()
        }

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.root)


class ObjectStates(StoreStates):
    """In an object storage, used by processes that are killed."""

    sweeps_until_clean = 12

    def __init__(self) -> None:
        super().__init__()
        self.storage = Storage()
        self.abandoned: list[object] = []
        """Pins of killed processes: they stay where they are, and nobody rewrites them."""

    def objects(self) -> Objects:
        return MemoryObjects(self.storage)

    def open(self) -> ObjectStore:
        return ObjectStore(
            self.objects(), wall=lambda: self.clock.wall, monotonic=lambda: self.clock.monotonic
        )

    def live(self) -> None:
        for store in self.stores:
            assert isinstance(store, ObjectStore)
            store.beat()

    @rule(who=WHO)
    def kill(self, who: int) -> None:
        for manifest_id, contexts in list(self.pins.items()):
            self.abandoned += [context for holder, context in contexts if holder == who]
            self.pins[manifest_id] = [held for held in contexts if held[0] != who]
            if not self.pins[manifest_id]:
                del self.pins[manifest_id]
        self.stores[who].close()
        self.stores[who] = self.open()

    def left(self) -> set[str]:
        objects = self.objects()
        return {
            content_of(found.key)
            for directory in ("blobs", "doomed", "manifests", "pins")
            for found in objects.list(directory)
        }

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            for store in self.stores:
                store.close()


class S3States(ObjectStates):
    """On an S3 server."""

    server: S3Server

    def __init__(self) -> None:
        super().__init__()
        self.url = f"s3://{self.server.bucket()}/store"

    def objects(self) -> Objects:
        return connect(self.url)


COMMON = settings(
    deadline=None, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestOnACrashingDisk = CrashingStates.TestCase
TestOnACrashingDisk.settings = settings(COMMON, max_examples=EXAMPLES)
TestOnALocalDisk = LocalStates.TestCase
TestOnALocalDisk.settings = settings(COMMON, max_examples=5)
TestInAnObjectStorage = ObjectStates.TestCase
TestInAnObjectStorage.settings = settings(COMMON, max_examples=EXAMPLES)


@pytest.fixture(autouse=True)
def _on_the_server(request: pytest.FixtureRequest) -> None:
    if request.cls is TestOnAnS3Server:
        S3States.server = request.getfixturevalue("s3")


TestOnAnS3Server = S3States.TestCase
TestOnAnS3Server.settings = settings(COMMON, max_examples=3)
