"""What a store has promised, kept beside it and compared with it after a crash."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.store import LocalStore, Manifest, NameKey, Store
from holdfast.store.model import content_hash
from tests.store.crash import Disk, Process
from tests.store.samples import CONFIG, WEIGHTS, key_of, manifest_of

ROOT = "/data/holdfast/store"


@dataclass
class Clock:
    """Both clocks of the store, moved by hand."""

    wall: float = 2e9
    monotonic: float = 5.0


@dataclass
class Promises:
    """What a store may show. More than one possibility only while an operation is under way."""

    names: dict[NameKey, set[str | None]] = field(default_factory=dict)
    unnamed: dict[str, set[bool]] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    def now(self, store: Store) -> Promises:
        """What the store shows at this moment, and nothing else."""
        names = {key: {store.resolve(key)} for key in self.names}
        there = {manifest_id for manifest_id, _ in store.unnamed()}
        unnamed = {manifest_id: {manifest_id in there} for manifest_id in self.unnamed}
        return dataclasses.replace(self, names=names, unnamed=unnamed)

    def check(self, store: Store, clock: Clock) -> None:
        """Every name is old-whole or new-whole, everything shown verifies, nothing is lost."""
        for key, allowed in self.names.items():
            found = store.resolve(key)
            assert found in {self._unless_expired(i, clock) for i in allowed}, f"{key} is {found}"
            if found is not None:
                self._check_whole(store, found)
        assert {key for key, _ in store.names()} <= set(self.names)
        unnamed = {manifest_id for manifest_id, _ in store.unnamed()}
        assert unnamed <= set(self.unnamed)
        for manifest_id, there in self.unnamed.items():
            assert (manifest_id in unnamed) in there, f"unnamed {manifest_id}"
            if manifest_id in unnamed:
                self._check_whole(store, manifest_id)
        report = store.verify()
        assert report.ok, report.problems

    def _check_whole(self, store: Store, manifest_id: str) -> None:
        manifest = store.read_manifest(manifest_id)
        assert manifest == self.manifests[manifest_id]
        for name, blob in manifest.files.items():
            assert store.read_blob(blob, what=name) == self.contents[blob.hash]

    def _unless_expired(self, manifest_id: str | None, clock: Clock) -> str | None:
        if manifest_id is None:
            return None
        expires = self.manifests[manifest_id].expires
        return None if expires is not None and expires <= clock.wall else manifest_id


@dataclass
class Actor:
    """Works on a store and notes what it was promised."""

    store: Store
    promises: Promises
    clock: Clock

    def save(self, name: str | None, text: bytes, **changes: object) -> Manifest:
        """Put the blobs of a checkpoint and publish it, under its name if it has one."""
        files = {}
        for file, content in ((WEIGHTS, text), (CONFIG, b"{}")):
            self.promises.contents[content_hash(content)] = content
            files[file] = self.store.put_blob([content[:3], content[3:]])
        return self.publish(manifest_of(files, name=name, **changes))

    def publish(self, manifest: Manifest) -> Manifest:
        self.promises.manifests[manifest.id] = manifest
        if manifest.name is None:
            self.promises.unnamed.setdefault(manifest.id, {False}).add(True)
            assert self.store.publish(manifest) == manifest.id
            self.promises.unnamed[manifest.id] = {True}
        else:
            assert self.store.publish(manifest) == manifest.id
            self.name(manifest)
        return manifest

    def name(self, manifest: Manifest) -> None:
        """Point its name to a published manifest."""
        key = key_of(manifest)
        self.promises.names.setdefault(key, {None}).add(manifest.id)
        self.store.set_name(key, manifest.id, replace=True)
        self.promises.names[key] = {manifest.id}

    def amend(self, key: NameKey, manifest: Manifest, **changes: object) -> Manifest:
        changed = dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]
        self.promises.manifests[changed.id] = changed
        self.promises.names[key].add(changed.id)
        assert self.store.amend(key, **changes) == changed.id
        self.promises.names[key] = {changed.id}
        return changed

    def delete(self, key: NameKey) -> None:
        self.promises.names[key].add(None)
        self.store.delete_name(key)
        self.promises.names[key] = {None}

    def discard(self, manifest: Manifest) -> None:
        self.promises.unnamed[manifest.id].add(False)
        self.store.discard(manifest.id)
        self.promises.unnamed[manifest.id] = {False}

    def sweep(self, times: int, apart: float) -> None:
        for _ in range(times):
            self.clock.monotonic += apart
            self.store.sweep()


Step = Callable[[Actor], None]


def open_on(process: Process, clock: Clock) -> LocalStore:
    """A store as `process` opens it."""
    return LocalStore(
        ROOT, files=process, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic
    )


def fresh_process(disk: Disk, clock: Clock) -> LocalStore:
    """The store as it is after a crash."""
    return open_on(Process(disk), clock)
