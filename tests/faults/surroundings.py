"""What goes wrong around a server: its disk and what is on it, its database's lock, its clock."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.store import CorruptManifest
from tests.support.server import ServerProcess


@contextmanager
def no_room_for_files(server: ServerProcess) -> Iterator[None]:
    """No file that a server or its workers write can have a byte more; needs no privileges.

    The kernel fails the writes, of the database, the store and the log alike, with EFBIG.
    """
    for pid in (server.pid, *server.children()):
        _limit(pid, 0)
    try:
        yield
    finally:
        # The server first: what it starts inherits its limit.
        for pid in (server.pid, *server.children()) if server.alive else ():
            _limit(pid, resource.RLIM_INFINITY)


def _limit(pid: int, size: int) -> None:
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        size = hard if size == resource.RLIM_INFINITY else size
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


class SmallDisk:
    """A disk of its own, in memory, that can be filled to the last byte. Only root can make one."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        """Raises OSError where disks cannot be made."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(directory)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise OSError(f"no disk could be made: {made.stderr.strip()}")

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is left, for anybody."""
        filler = self._directory / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12, 1):
                    try:
                        while file.write(bytes(size)) == size:
                            pass
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
                yield
        finally:
            filler.unlink(missing_ok=True)

    def remove(self) -> None:
        subprocess.run(["umount", str(self._directory)], check=True)


@contextmanager
def locked_database(server: ServerProcess) -> Iterator[None]:
    """Another process writes to the database and does not come to an end."""
    connection = sqlite3.connect(
        server.data_dir / "catalog.db", timeout=30, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def set_clock(file: Path, wrong_by: float) -> None:
    """Let the clock of a server whose FAULTS_CLOCK is `file` jump."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(str(wrong_by))
    new.replace(file)


def damage_newest_snapshot(server: ServerProcess, *, manifest: bool) -> bool:
    """Flip a byte of a run's newest snapshot, or of its manifest, while no server runs.

    False when there is none that may be damaged: the run has one before it, and nothing else is
    made of the same bytes, so that no user asks for them.
    """
    store = server.data_dir / "store"
    connection = sqlite3.connect(server.data_dir / "catalog.db")
    newest = {id_ for id_, _, count in connection.execute(_SNAPSHOTS) if count > 1}
    connection.close()
    used = Counter[str]()
    blobs: dict[str, list[str]] = {}
    with server.store() as opened:
        for file in (*(store / "manifests").iterdir(), *(store / "unnamed").iterdir()):
            with suppress(CorruptManifest):  # one of those that were damaged before
                blobs[file.name] = [b.hash for b in opened.read_manifest(file.name).files.values()]
                used.update(blobs[file.name])
    for snapshot in newest & blobs.keys():
        for blob in blobs[snapshot]:
            if used[blob] == 1:
                file = store / "unnamed" / snapshot if manifest else store / "blobs" / blob
                _flip_a_byte(file)
                return True
    return False


_SNAPSHOTS = """
SELECT manifest, max(snapshots.seq), count(*) FROM snapshots
JOIN runs ON runs.id = snapshots.run_id AND runs.generation = snapshots.generation
WHERE runs.state = 'live' GROUP BY runs.id, runs.generation
"""
"""Of each run the newest, and how many there are; SQLite takes the row that has the maximum."""


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
