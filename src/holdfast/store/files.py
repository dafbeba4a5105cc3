"""The file-system port: the few calls through which the store touches a disk.

Small, so that tests can replace it by a file system that loses power at any call. Paths are
absolute. Every call raises OSError as the operating system does.
"""

# A thin layer over the operating system's calls, which take text:
# ruff: noqa: PTH102, PTH105, PTH108, PTH208

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from holdfast.store.retries import STORAGE_WAITED_FOR, pauses

LOCK_WAITS = STORAGE_WAITED_FOR
"""Seconds for which a lock is waited for: whoever holds it may be suspended, and for ever."""

_WRITE_BACK = 16 << 20
"""Bytes after which the system is told to begin writing them, so that the sync waits less."""

_SYNC = 256 << 20
"""Bytes after which they are synced, so that no sync takes as long as a whole large file."""


@dataclass(frozen=True, slots=True)
class Status:
    """What is known about a file without reading it."""

    size: int
    is_file: bool
    is_dir: bool
    identity: tuple[int, ...]
    """Changes when another file takes the place of this one."""


class WriteFile(Protocol):
    """A new file. Its creator holds it locked until it is closed."""

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        ...

    def sync(self) -> None:
        """Return once the content is on the disk. After a failure the file must be given up."""
        ...

    def close(self) -> None: ...


class ReadFile(Protocol):
    """An existing regular file."""

    size: int

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current position; fewer bytes only at the end of the file."""
        ...

    def seek(self, position: int) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. An entry is durable only after `sync_dir` of its directory."""

    def create(self, path: str) -> WriteFile:
        """Create a file exclusively, locked."""
        ...

    def open(self, path: str) -> ReadFile:
        """Open a regular file to read; a symbolic link is refused (ELOOP)."""
        ...

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; fails (EEXIST) rather than replace."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Move a file, replacing what is there."""
        ...

    def unlink(self, path: str) -> None: ...

    def mkdir(self, path: str) -> None: ...

    def sync_dir(self, path: str) -> None:
        """Return once the directory's entries are on the disk."""
        ...

    def list(self, path: str) -> list[str]:
        """Names of a directory's entries, sorted."""
        ...

    def stat(self, path: str) -> Status | None:
        """None when nothing is there. Does not follow a symbolic link."""
        ...

    def lock(self, path: str, *, exclusive: bool) -> AbstractContextManager[object]:
        """Wait for a lock on an existing file, for a while at most; leaving the context, or dying,
        releases it."""
        ...

    def is_locked(self, path: str) -> bool:
        """Whether anybody holds the file locked."""
        ...


class LocalFiles:
    """The operating system's file system (POSIX)."""

    def create(self, path: str) -> WriteFile:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd, path, fcntl.LOCK_EX)  # which has to wait only while is_locked looks
        except BaseException:
            os.close(fd)
            raise
        return _LocalWriteFile(fd)

    def open(self, path: str) -> ReadFile:
        # O_NONBLOCK: a named pipe in a file's place must not block.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _LocalReadFile(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def link(self, old: str, new: str) -> None:
        os.link(old, new, follow_symlinks=False)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def sync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _flush(fd)
        finally:
            os.close(fd)

    def list(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: str) -> Status | None:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        return Status(
            size=found.st_size,
            is_file=stat.S_ISREG(found.st_mode),
            is_dir=stat.S_ISDIR(found.st_mode),
            identity=(found.st_ino, found.st_mtime_ns, found.st_size),
        )

    def lock(self, path: str, *, exclusive: bool) -> AbstractContextManager[object]:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(fd, path, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            raise
        return _Lock(fd)

    def is_locked(self, path: str) -> bool:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def _lock(fd: int, path: str, kind: int) -> None:
    """Lock an open file. Asked for again and again: a call that waits can be given no limit."""
    again = pauses(0.001, 0.05, within=LOCK_WAITS)
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pause = next(again, None)
        if pause is None:
            raise OSError(
                errno.EWOULDBLOCK,
                f"{path} has been locked for {LOCK_WAITS:.0f} s by another process, which may be "
                "suspended: let it go on, or end it",
            )
        time.sleep(pause)


def _flush(fd: int) -> None:
    if sys.platform == "darwin":  # there, fsync leaves the bytes in the drive's memory
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


class _LocalWriteFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = 0
        self._begun = 0
        self._synced = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            count = os.write(self._fd, rest)
            rest = rest[count:]
            self._size += count
        if self._size - self._begun >= _WRITE_BACK:
            self._begin_write_back(self._size - self._begun)
        if self._size - self._synced >= _SYNC:
            self.sync()

    def _begin_write_back(self, count: int) -> None:
        """An error of these writes is reported by the sync, as of any others."""
        if sys.platform == "linux":  # there, dirty pages that are not needed begin to be written
            os.posix_fadvise(self._fd, self._begun, count, os.POSIX_FADV_DONTNEED)
        self._begun += count

    def sync(self) -> None:
        _flush(self._fd)
        self._synced = self._size

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class _LocalReadFile:
    def __init__(self, fd: int, path: str) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, f"{path} is not a regular file")
        self._fd = fd
        self.size = found.st_size

    def readinto(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            count = os.readv(self._fd, [buffer[done:]])
            if count == 0:
                break
            done += count
        return done

    def seek(self, position: int) -> None:
        os.lseek(self._fd, position, os.SEEK_SET)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class _Lock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
