"""The store's directory: its layout, locks, temporary files and small reads.

    ROOT/holdfast-store.json   format marker
    ROOT/blobs/HASH            immutable bytes
    ROOT/manifests/ID          manifests of named checkpoints, and discarded ones
    ROOT/unnamed/ID            manifests without a name
    ROOT/names/RUN@KIND@NAME   name records
    ROOT/tmp/TOKEN             files being written, locked by their writer
    ROOT/fresh/HASH.TOKEN      put or published, but nothing refers to it yet
    ROOT/pins/ID.TOKEN         pins, locked by their holder
    ROOT/sweep.json            what earlier sweeps saw
    ROOT/sweep.lock            shared by whoever changes something, exclusive while removing
    ROOT/names.lock            exclusive while a name moves

A file appears under its name only when its content is on the disk: written under tmp, synced,
moved, and then the directory synced. A failed sync is never repeated on the same file. tmp, fresh
and pins matter only to running processes and need not survive a loss of power.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from uuid import uuid4

from holdfast.store.errors import (
    CorruptManifest,
    CorruptName,
    IOFailed,
    NotAStore,
    storage_errors,
)
from holdfast.store.files import Files, ReadFile, WriteFile
from holdfast.store.model import (
    MAX_MANIFEST,
    Manifest,
    content_hash,
)
from holdfast.store.records import MAX_RECORD, NameRecord, check_marker, file_name, marker

STORE_VERSION = 1
"""Of the layout above."""

MARKER = "holdfast-store.json"
SWEEP_STATE = "sweep.json"
_FORMAT = "holdfast.store"
_KEPT = ("blobs", "manifests", "names", "unnamed")
_PASSING = ("tmp", "fresh", "pins")
_LOCKS = ("sweep.lock", "names.lock")


class Disk:
    """What every operation on a local store is made of. Created when it is not there."""

    def __init__(self, root: str, files: Files) -> None:
        self.root = root
        self.files = files
        self._suspect: set[str] = set()
        with storage_errors(f"opening the store {root}"):
            self._prepare()

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def changing(self) -> AbstractContextManager[object]:
        """Held around every change that a sweep must not run into."""
        return self.files.lock(self.path("sweep.lock"), exclusive=False)

    def removing(self) -> AbstractContextManager[object]:
        """Held by a sweep while it removes; nothing changes meanwhile."""
        return self.files.lock(self.path("sweep.lock"), exclusive=True)

    def naming(self) -> AbstractContextManager[object]:
        """Held while a name is read and then moved; taken inside `changing`."""
        return self.files.lock(self.path("names.lock"), exclusive=True)

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Turns an OSError into the store's error, saying what was being done and where."""
        return storage_errors(f"{what} in the store {self.root}")

    @contextmanager
    def temporary(self, doing: str) -> Iterator[tuple[WriteFile, str]]:
        """A new file under tmp and its path; gone at the end unless it was moved."""
        with self.doing(doing):
            path = self.path("tmp", uuid4().hex)
            with self.changing():
                file = self.files.create(path)
            try:
                yield file, path
            finally:
                with suppress(OSError):  # debris is swept later
                    file.close()
                with suppress(OSError):
                    self.unlink(path)

    def sync_dir(self, directory: str) -> None:
        try:
            self.files.sync_dir(self.path(directory))
        except OSError:
            self._suspect.add(directory)
            raise

    def remove_durably(self, directory: str, entry: str, *, to: str | None = None) -> bool:
        """Unlink an entry, or move it to directory `to`, and sync; whether it was there.

        Syncs also when it was gone: whoever removed it may not have lived to do so.
        """
        path = self.path(directory, entry)
        try:
            if to is None:
                self.files.unlink(path)
            else:
                self.files.rename(path, self.path(to, entry))
        except FileNotFoundError:
            self.settle(directory)
            return False
        self.sync_dir(directory)
        return True

    def settle(self, directory: str) -> None:
        """Make durable what others have done to a directory, and may not have lived to sync.

        After a failed sync of the directory this cannot be known, since a second one may succeed
        without having written what the first one lost.
        """
        if directory in self._suspect:
            raise IOFailed(f"{self.path(directory)}: an earlier sync failed, reopen the store")
        self.sync_dir(directory)

    def unlink(self, path: str) -> bool:
        """Whether it was there."""
        try:
            self.files.unlink(path)
        except FileNotFoundError:
            return False
        return True

    def mark_fresh(self, content: str) -> str:
        """Keep a blob or manifest that nothing refers to yet from being swept; the mark's path."""
        path = self.path("fresh", f"{content}.{uuid4().hex}")
        self.files.create(path).close()
        return path

    def clear_fresh(self, contents: Iterable[str]) -> None:
        """Something durable refers to these now: take back one mark of each.

        Only one, since another save that put the same content may still be under way.
        """
        left = set(contents)
        with suppress(OSError):  # a mark that stays costs only time
            for entry in self.files.list(self.path("fresh")):
                if (content := entry.partition(".")[0]) in left:
                    left.remove(content)
                    self.unlink(self.path("fresh", entry))

    def list(self, directory: str) -> list[str]:
        with self.doing(f"listing {directory}"):
            return self.files.list(self.path(directory))

    def read_record(self, entry: str) -> NameRecord | None:
        """The name record in file `entry`, None when there is none, or CorruptName."""
        path = self.path("names", entry)
        data = self.read_small(path, MAX_RECORD)
        if data is None:
            return None
        record = NameRecord.decode(data, path)
        if file_name(record.key) != entry:
            raise CorruptName(f"{path} is the record of another name, {record.key}", path)
        return record

    def read_manifest(self, directory: str, manifest_id: str) -> Manifest | None:
        """The verified manifest in `directory`, None when it is not there, or CorruptManifest."""
        path = self.path(directory, manifest_id)
        data = self.read_small(path, MAX_MANIFEST)
        if data is None:
            return None
        if content_hash(data) != manifest_id:
            raise CorruptManifest(f"{path} is damaged: its bytes do not match its name", path)
        return Manifest.from_bytes(data, path)

    @contextmanager
    def open(self, path: str) -> Iterator[ReadFile | None]:
        """An open file; None when it is not there."""
        try:
            file = self.files.open(path)
        except FileNotFoundError:
            yield None
            return
        try:
            yield file
        finally:
            file.close()

    def read_small(self, path: str, limit: int) -> bytes | None:
        """A whole file, at most `limit` + 1 bytes of it; None when it is not there."""
        with storage_errors(f"reading {path}"), self.open(path) as file:
            if file is None:
                return None
            # One byte more than allowed is enough for the reader to refuse it.
            buffer = bytearray(min(file.size, limit + 1))
            count = file.readinto(memoryview(buffer))
            return bytes(buffer[:count])

    # Opening

    def _prepare(self) -> None:
        path = self.path(MARKER)
        status = self.files.stat(path)
        if status is None:
            self._create()
        check_marker(self.read_small(path, 4096), path, _FORMAT, STORE_VERSION)
        for directory in (*_KEPT, *_PASSING):
            self._make_dir(self.path(directory))
        for lock in _LOCKS:
            if self.files.stat(self.path(lock)) is None:
                with suppress(FileExistsError):
                    self.files.create(self.path(lock)).close()
        # What a process that was killed left unsynced is about to be shown: make it durable.
        for directory in _KEPT:
            self.files.sync_dir(self.path(directory))
        self.files.sync_dir(self.root)

    def _create(self) -> None:
        self._make_parents()
        if foreign := set(self.files.list(self.root)) - {*_KEPT, *_PASSING, *_LOCKS}:
            raise NotAStore(
                f"{self.root} is not a Holdfast store, and not empty: it holds {min(foreign)!r}"
            )
        self._make_dir(self.path("tmp"))
        temporary = self.path("tmp", uuid4().hex)
        file = self.files.create(temporary)
        try:
            file.write(marker(_FORMAT, STORE_VERSION))
            file.sync()
            with suppress(FileExistsError):
                self.files.link(temporary, self.path(MARKER))
        finally:
            file.close()
            self.unlink(temporary)

    def _make_parents(self) -> None:
        """Create the root and what is missing above it; all of it is durable afterwards."""
        missing = []
        path = self.root
        while self.files.stat(path) is None:
            missing.append(path)
            path = _parent(path)
        # Whoever made the lowest directory there is may not have lived to sync its parent.
        with suppress(PermissionError):  # then it was not made by us
            self.files.sync_dir(_parent(path))
        for path in reversed(missing):
            self._make_dir(path)
            self.files.sync_dir(_parent(path))

    def _make_dir(self, path: str) -> None:
        try:
            self.files.mkdir(path)
        except FileExistsError:
            status = self.files.stat(path)
            if status is None or not status.is_dir:
                raise NotAStore(f"{path} must be a directory, not a link or a file") from None


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"
