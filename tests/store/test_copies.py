"""A blob that was put several times is read from whichever copy is whole; a range like the rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from holdfast.store import Blob, CorruptBlob, LocalStore, ObjectStore, Store
from holdfast.store.transfer import CHUNK
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

CONTENT = Random(3).randbytes(2 * CHUNK + 1000)
START, STOP = CHUNK - 10, 2 * CHUNK + 20
Damage = Callable[[bytes], bytes]


def flip(data: bytes) -> bytes:
    """In the middle of the range that is read."""
    return data[:CHUNK] + bytes([data[CHUNK] ^ 1]) + data[CHUNK + 1 :]


def cut(data: bytes) -> bytes:
    return data[:-1]


class Copies:
    """A store that has two copies of a blob; a manifest uses the older one."""

    def __init__(self) -> None:
        self.storage = Storage()
        self.reads: list[str] = []
        self.before_read: Callable[[], None] = lambda: None
        self.store = self.open()
        self.blob = self.store.put_blob([CONTENT])
        (self.used,) = self.keys()
        manifest = manifest_of({WEIGHTS: self.blob})
        self.manifest_id = self.store.publish(manifest)
        self.store.set_name(key_of(manifest), self.manifest_id)
        self.store.put_blob([CONTENT])
        (self.newer,) = {*self.keys()} - {self.used}

    def open(self) -> Store:
        return ObjectStore(MemoryObjects(self.storage, self._calling))

    def _calling(self, name: str, key: str) -> None:
        if name == "read" and key.startswith("blobs/"):
            self.before_read()
            self.reads.append(key)

    def keys(self) -> list[str]:
        return [key for key in self.storage.objects if key.startswith("blobs/")]

    def damage(self, key: str, damage: Damage = flip) -> None:
        data, version = self.storage.objects[key]
        self.storage.objects[key] = (damage(data), version)


@pytest.fixture
def copies() -> Copies:
    return Copies()


def read_all_ways(store: Store, blob: Blob) -> None:
    assert store.read_blob(blob, what="w") == CONTENT
    buffer = bytearray(blob.size)
    store.read_blob_into(blob, memoryview(buffer), what="w")
    assert buffer == CONTENT
    assert b"".join(store.stream_blob(blob, what="w")) == CONTENT
    assert b"".join(store.stream_blob(blob, START, STOP, what="w")) == CONTENT[START:STOP]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("which", ["used", "newer"])
def test_a_whole_copy_is_read_whichever_is_damaged(
    copies: Copies, which: str, damage: Damage, known: bool
) -> None:
    damaged = getattr(copies, which)
    copies.damage(damaged, damage)
    store = copies.open()
    if known:
        store.read_manifest(copies.manifest_id)
    read_all_ways(store, copies.blob)


@pytest.mark.parametrize("which", ["used", "newer"])
def test_damage_that_is_passed_over_is_told(copies: Copies, which: str) -> None:
    damaged = getattr(copies, which)
    copies.damage(damaged)
    store = copies.open()
    if which == "used":
        store.read_manifest(copies.manifest_id)
    with capture_logs() as logs:
        read_all_ways(store, copies.blob)
    assert len(logs) == 4
    assert all(damaged in log["error"] for log in logs)


def test_when_no_copy_is_whole_the_damage_is_named(copies: Copies) -> None:
    copies.damage(copies.used)
    del copies.storage.objects[copies.newer]
    with pytest.raises(CorruptBlob, match=copies.used):
        copies.store.read_blob(copies.blob, what="w")
    copies.storage.objects[copies.newer] = copies.storage.objects[copies.used]
    for read in (read_all_ways, lambda store, blob: next(store.stream_blob(blob, what="w"))):
        with pytest.raises(CorruptBlob, match="w is damaged"):
            read(copies.store, copies.blob)


def test_the_copy_that_the_manifest_uses_is_read_first(copies: Copies) -> None:
    store = copies.open()
    store.read_blob(copies.blob, what="w")
    assert {*copies.reads} == {copies.newer}
    for pin in (False, True):
        store = copies.open()
        with store.pin(copies.manifest_id) if pin else nullcontext():
            if not pin:
                store.read_manifest(copies.manifest_id)
            copies.reads.clear()
            store.read_blob(copies.blob, what="w")
        assert {*copies.reads} == {copies.used}
        store.close()


def test_damage_between_the_two_passes_over_a_range_is_noticed(copies: Copies) -> None:
    del copies.storage.objects[copies.newer]
    pieces = copies.store.stream_blob(copies.blob, START, STOP, what="w")
    given = next(pieces)
    copies.damage(copies.used, lambda data: data[: STOP - 1] + bytes([data[STOP - 1] ^ 1]))
    copies.damage(copies.used, lambda data: data + CONTENT[len(data) :])
    with pytest.raises(CorruptBlob, match="changed meanwhile"):
        given += b"".join(pieces)
    assert given == CONTENT[START : START + CHUNK]


def test_a_second_copy_goes_on_where_the_first_became_damaged(copies: Copies) -> None:
    pieces = copies.store.stream_blob(copies.blob, START, STOP, what="w")
    given = next(pieces)
    first = copies.reads[-1]
    copies.damage(first, lambda data: data[: STOP - 1] + bytes([data[STOP - 1] ^ 1]) + data[STOP:])
    assert given + b"".join(pieces) == CONTENT[START:STOP]
    assert copies.reads[-1] != first


def test_a_range_on_the_disk_is_compared_as_it_is_given(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        blob = store.put_blob([CONTENT])
        assert b"".join(store.stream_blob(blob, 3, 3, what="w")) == b""
        pieces = store.stream_blob(blob, START, STOP, what="w")
        next(pieces)
        path = tmp_path / "blobs" / blob.hash
        data = path.read_bytes()
        path.write_bytes(data[: STOP - 1] + bytes([data[STOP - 1] ^ 1]) + data[STOP:])
        with pytest.raises(CorruptBlob, match=str(path)):
            next(pieces)
        for start, stop in ((0, 1), (5, 5), (STOP, blob.size), (0, blob.size)):
            with pytest.raises(CorruptBlob, match=str(path)):
                list(store.stream_blob(blob, start, stop, what="w"))
