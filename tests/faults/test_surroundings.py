"""What goes wrong around a server does go wrong: a campaign that disturbs nothing is no proof."""

from __future__ import annotations

import errno
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.surroundings import (
    SmallDisk,
    locked_database,
    no_room_for_files,
    set_clock,
)
from tests.support.preloaded import SITE
from tests.support.server import ServerProcess

WRITER = """
import sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "ab", buffering=0) as file:
            file.write(b"x")
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


class Writer(ServerProcess):
    """A process in a server's place that writes to a file when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._writer: subprocess.Popen[str] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        command = [sys.executable, "-c", WRITER, str(self.directory / "file")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as self._writer:
            yield
            assert self._writer.stdin is not None
            self._writer.stdin.close()

    @property
    def pid(self) -> int:
        assert self._writer is not None
        return self._writer.pid

    @property
    def alive(self) -> bool:
        return True

    def write(self) -> str:
        assert self._writer is not None and self._writer.stdin and self._writer.stdout
        self._writer.stdin.write("go\n")
        self._writer.stdin.flush()
        return self._writer.stdout.readline().strip()


def test_there_is_no_room_for_files_for_a_while(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with writer.running():
        assert writer.write() == "written"
        with no_room_for_files(writer):
            assert writer.write() == "File too large"
        assert writer.write() == "written"
        limit, hard = resource.prlimit(writer.pid, resource.RLIMIT_FSIZE)
        assert limit == hard


def test_a_disk_is_full_for_a_while(tmp_path: Path) -> None:
    try:
        disk = SmallDisk(tmp_path / "disk", 1)
    except OSError as error:
        pytest.skip(str(error))
    try:
        file = tmp_path / "disk" / "file"
        with disk.full(), file.open("wb", buffering=0) as written:
            with pytest.raises(OSError) as caught:
                written.write(b"x")
            assert caught.value.errno == errno.ENOSPC
        assert file.write_bytes(b"x") == 1
    finally:
        disk.remove()
    assert not file.exists()


def test_the_database_is_locked_for_a_while(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    database = server.data_dir / "catalog.db"
    connection = sqlite3.connect(database, timeout=0, isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    with locked_database(server), pytest.raises(sqlite3.OperationalError, match="locked"):
        connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("INSERT INTO t VALUES (2)")
    connection.close()


def test_the_clock_jumps_both_ways_and_monotonic_time_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "clock"
    tell = "import time; print(time.time(), time.time_ns() / 1e9, time.monotonic())"
    for wrong_by in (0.0, 86400.0, -86400.0):
        set_clock(file, wrong_by)
        told = subprocess.run(
            [sys.executable, "-c", tell],
            env={"PYTHONPATH": str(SITE), "FAULTS_CLOCK": str(file)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        wall, wall_ns, monotonic = map(float, told)
        assert abs(wall - time.time() - wrong_by) < 60
        assert abs(wall_ns - wall) < 60
        assert abs(monotonic - time.monotonic()) < 60
