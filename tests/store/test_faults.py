"""A disk that is full, read-only or failing, at every call."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest

from holdfast.store import Blob, CorruptBlob, DiskFull, IOFailed, LocalStore, ReadOnly, Unavailable
from tests.store.crash import Disk, Process
from tests.store.model import ROOT, Actor, Clock, Promises, open_on
from tests.store.samples import PLAIN, key_of

A = key_of(PLAIN)
WRITING = ("create", "write", "sync", "sync_dir", "link", "rename", "unlink", "mkdir")
EXPECTED: dict[int, type[Unavailable]] = {
    errno.ENOSPC: DiskFull,
    errno.EDQUOT: DiskFull,
    errno.EROFS: ReadOnly,
    errno.EIO: IOFailed,
}
Operation = Callable[[Actor], object]


def save(actor: Actor) -> None:
    actor.save("final", b"other weights", seq=9)


def save_snapshot(actor: Actor) -> None:
    actor.save(None, b"other weights", seq=9)


def amend(actor: Actor) -> None:
    current = actor.store.resolve(A)
    assert current is not None
    actor.amend(A, actor.store.read_manifest(current), public=True)


def delete(actor: Actor) -> None:
    actor.delete(A)


def discard(actor: Actor) -> None:
    for manifest_id in list(actor.promises.unnamed):
        actor.discard(actor.promises.manifests[manifest_id])


class Case:
    """A store with a checkpoint and a snapshot, and a process on it that is to meet a fault."""

    def __init__(self) -> None:
        self.disk, self.clock, self.promises = Disk(), Clock(), Promises()
        self.process = Process(self.disk)
        store = open_on(self.process, self.clock)
        self.actor = Actor(store, self.promises, self.clock)
        self.actor.save("final", b"first weights")
        self.actor.save(None, b"first weights", seq=8)
        self.start = self.process.calls

    def files(self, directory: str) -> list[str]:
        return Process(self.disk).list(f"{ROOT}/{directory}")

    def check(self, seed: int) -> None:
        self.promises.check(open_on(Process(self.disk), self.clock), self.clock)
        for disk in self.disk.outcomes(seed, samples=3):
            self.promises.check(open_on(Process(disk), self.clock), self.clock)


@pytest.mark.parametrize("code", EXPECTED, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("operation", [save, save_snapshot, amend, delete, discard])
def test_a_fault_at_any_call_is_told_and_leaves_nothing_behind(
    operation: Operation, code: int
) -> None:
    told = 0
    for n in itertools.count():
        case = Case()
        case.process.fail = {case.start + n: code}
        failed = False
        try:
            operation(case.actor)
        except Unavailable as error:
            failed = True
            told += 1
            assert type(error) is EXPECTED[code]
            assert ROOT in str(error)
        if case.process.calls <= case.start + n:
            assert told > 1
            return  # the operation has fewer calls
        call = case.process.log[case.start + n]
        if call.startswith(("sync", "rename", "write")):
            assert failed, f"{call} failed and nobody was told"
        if "unlink" not in call:
            assert case.files("tmp") == [], call
        # With new files, on the same handle, it works; or the store says that it cannot know.
        try:
            operation(case.actor)
        except IOFailed:
            assert call.startswith("sync_dir"), call
            assert operation in (delete, discard)
        case.check(n)


@pytest.mark.parametrize("code", EXPECTED, ids=errno.errorcode.__getitem__)
def test_a_fault_while_opening_is_told_and_opening_again_works(code: int) -> None:
    for n in itertools.count():
        disk, clock = Disk(), Clock()
        process = Process(disk, fail={n: code})
        try:
            LocalStore(ROOT, files=process)
        except Unavailable as error:
            assert type(error) is EXPECTED[code]
        if process.calls <= n:
            assert n > 20
            return
        open_on(Process(disk), clock).put_blob([b"x"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.__getitem__)
def test_a_fault_in_a_sweep_removes_nothing_that_is_needed(code: int) -> None:
    for n in itertools.count():
        case = Case()
        other = case.actor.save("other", b"garbage soon")
        case.actor.save("short", b"garbage later", expires=case.clock.wall + 10)
        case.actor.delete(key_of(other))
        case.clock.wall += 20
        case.actor.sweep(1, 0.0)
        case.actor.sweep(1, 3500.0)
        start = case.process.calls
        case.process.fail = {start + n: code}
        for _ in range(6):
            try:
                case.actor.sweep(1, 100.0)
            except Unavailable as error:
                assert type(error) is EXPECTED[code] or "reopen the store" in str(error)
        case.check(n)
        if case.process.calls <= start + n:
            assert n > 40
            return


def test_a_directory_that_failed_to_sync_is_not_believed() -> None:
    case = Case()
    case.actor.promises.names[A] = {None, *case.actor.promises.names[A]}
    sync = next(i for i in itertools.count() if _is_sync(case, i))
    case = Case()
    case.process.fail = {sync: errno.EIO}
    with pytest.raises(IOFailed):
        case.actor.store.delete_name(A)
    with pytest.raises(IOFailed, match="an earlier sync failed, reopen the store"):
        case.actor.store.delete_name(A)


def _is_sync(case: Case, i: int) -> bool:
    if i == 0:
        case.actor.store.delete_name(A)
    return i >= case.start and case.process.log[i].startswith("sync_dir")


def test_permission_is_a_read_only_store() -> None:
    process = Process(Disk(), fail={3: errno.EACCES})
    with pytest.raises(ReadOnly, match="cannot be written"):
        LocalStore(ROOT, files=process)


def test_a_full_disk_can_be_emptied() -> None:
    """Deleting and sweeping need no room, so that they can make some."""
    case = Case()
    case.process.full = True
    with pytest.raises(DiskFull):
        case.actor.store.put_blob([b"x"])
    delete(case.actor)
    discard(case.actor)
    case.actor.sweep(6, 100.0)
    assert case.files("blobs") == case.files("manifests") == case.files("unnamed") == []
    case.check(0)


def test_a_blob_that_claims_a_huge_size_is_refused_before_memory_is_taken() -> None:
    case = Case()
    blob = case.actor.store.put_blob([b"x"])
    with pytest.raises(CorruptBlob, match="has 1 bytes, 1125899906842624 were saved"):
        case.actor.store.read_blob(Blob(blob.hash, 1 << 50), what="weights")
