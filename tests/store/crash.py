"""A file system in memory that loses power, fails and is used by processes that are killed.

What was written is kept apart from what was synced, for the bytes of files and for the entries of
directories. After a loss of power any subset of what was not synced is there: single writes, torn
ones, single entries of a rename. This is more than real file systems lose, and all that POSIX
promises. A failed sync loses what it should have made durable, though it can still be read.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from holdfast.store.files import ReadFile, Status, WriteFile

PACKAGE = str(Path(sys.modules["holdfast.store.files"].__file__ or "").parent)


PASSING = re.compile(r".*/(tmp|fresh|pins)/")


class Died(BaseException):
    """The process was killed, or the machine lost power."""


@dataclass(eq=False)
class FileNode:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    number: int = 0


@dataclass(eq=False)
class DirNode:
    entries: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, Node | None]] = field(default_factory=list)

    def set(self, name: str, node: Node | None) -> None:
        if node is None:
            del self.entries[name]
        else:
            self.entries[name] = node
        self.pending.append((name, node))


Node = FileNode | DirNode
Keep = Callable[[int], bool]
"""Whether the n-th unsynced change survives."""


class Disk:
    """The device, with whatever the operating system still holds in memory."""

    def __init__(self) -> None:
        self.root = DirNode()
        self.numbers = 0
        self.changes = 0
        """Calls that changed something."""
        self.holders: dict[Node, list[tuple[Process, bool]]] = {}

    def after_power_loss(self, keep: Keep, torn: Random | None = None) -> Disk:
        """A disk with what was synced and the chosen unsynced changes; writes may be torn."""
        disk = Disk()
        disk.numbers = self.numbers
        first = {node: n for n, (node, i, _) in enumerate(self._changes()) if i == 0}
        copies: dict[Node, Node] = {}

        def survive(node: Node) -> Node:
            if node in copies:
                return copies[node]
            if isinstance(node, FileNode):
                content = bytearray(node.durable)
                for i, (offset, data) in enumerate(node.pending):
                    if keep(first[node] + i):
                        kept = data[: torn.randint(0, len(data))] if torn else data
                        content.extend(bytes(max(0, offset - len(content))))
                        content[offset : offset + len(kept)] = kept
                copies[node] = FileNode(content, bytes(content), [], node.number)
                return copies[node]
            copy = copies[node] = DirNode()
            entries = dict(node.durable)
            for i, (name, target) in enumerate(node.pending):
                if keep(first[node] + i):
                    if target is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = target
            copy.entries = {name: survive(target) for name, target in entries.items()}
            copy.durable = dict(copy.entries)
            return copy

        root = survive(self.root)
        assert isinstance(root, DirNode)
        disk.root = root
        return disk

    def outcomes(self, seed: int, samples: int) -> Iterator[Disk]:
        """Disks after a loss of power now: nothing, everything, all but one, only one, random.

        Changes that matter to running processes only (see `PASSING`) are left out of the singles.
        """
        singles = [n for n, (_, _, path) in enumerate(self._changes()) if not PASSING.match(path)]
        yield self.after_power_loss(lambda n: False)
        yield self.after_power_loss(lambda n: True)
        for single in singles:
            yield self.after_power_loss(lambda n, i=single: n != i)  # type: ignore[misc]
            yield self.after_power_loss(lambda n, i=single: n == i)  # type: ignore[misc]
        for i in range(samples):
            random = Random(f"{seed}:{i}")
            yield self.after_power_loss(lambda n, r=random: r.random() < 0.5, random)  # type: ignore[misc]

    def _changes(self) -> Iterator[tuple[Node, int, str]]:
        """What is not synced: where, the how many-th there, and the path it is about."""
        seen: set[Node] = set()
        stack: list[tuple[str, Node]] = [("", self.root)]
        while stack:
            path, node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node, FileNode):
                yield from ((node, i, path) for i in range(len(node.pending)))
                continue
            yield from ((node, i, f"{path}/{name}") for i, (name, _) in enumerate(node.pending))
            children = [*node.durable.items(), *((n, c) for n, c in node.pending if c)]
            stack.extend((f"{path}/{name}", child) for name, child in children)


class Process:
    """One process's view of the disk: the port that the store uses.

    `die_at`: the number of the call at which it is killed, before the call does anything.
    `fail`: errors (errno) by number of call. `without`: a sync that does nothing, by its site.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        die_at: int | None = None,
        fail: dict[int, int] | None = None,
        without: str | None = None,
    ) -> None:
        self.disk = disk
        self.die_at = die_at
        self.fail = fail or {}
        self.without = without
        self.full = False
        """Nothing can be written any more, but removed."""
        self.calls = 0
        self.log: list[str] = []
        self.left_out: list[int] = []
        """Numbers of the calls that were `without`."""
        self.syncs: dict[str, set[tuple[str, int]]] = {}
        """Sites of syncs that were called, with the lines of code they went through."""

    def _call(self, name: str, path: str) -> None:
        if self.die_at is not None and self.calls >= self.die_at:
            self.release_all()
            raise Died(f"at call {self.calls}, {name} {path}")
        self.calls += 1
        self.disk.changes += name not in ("open", "read", "list", "stat", "lock", "is_locked")
        self.log.append(f"{name} {path}")
        if self.full and name in ("create", "write", "link", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if code := self.fail.get(self.calls - 1):
            raise OSError(code, os.strerror(code), path)

    def release_all(self) -> None:
        for holders in self.disk.holders.values():
            holders[:] = [holder for holder in holders if holder[0] is not self]

    def create(self, path: str) -> WriteFile:
        self._call("create", path)
        parent, name = self._parent(path)
        if name in parent.entries:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self.disk.numbers += 1
        node = FileNode(number=self.disk.numbers)
        parent.set(name, node)
        self.disk.holders.setdefault(node, []).append((self, True))
        return _Written(self, node, path)

    def open(self, path: str) -> ReadFile:
        self._call("open", path)
        node = self._find(path)
        if not isinstance(node, FileNode):
            raise OSError(errno.EISDIR, "not a file", path)
        return _Read(self, node, path)

    def link(self, old: str, new: str) -> None:
        self._call("link", new)
        parent, name = self._parent(new)
        if name in parent.entries:
            raise FileExistsError(errno.EEXIST, "exists", new)
        parent.set(name, self._find(old))

    def rename(self, old: str, new: str) -> None:
        self._call("rename", new)
        source, old_name = self._parent(old)
        target, new_name = self._parent(new)
        target.set(new_name, self._find(old))
        source.set(old_name, None)

    def unlink(self, path: str) -> None:
        self._call("unlink", path)
        self._find(path)
        parent, name = self._parent(path)
        parent.set(name, None)

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        parent, name = self._parent(path)
        if name in parent.entries:
            raise FileExistsError(errno.EEXIST, "exists", path)
        parent.set(name, DirNode())

    def sync_dir(self, path: str) -> None:
        node = self._find(path)
        assert isinstance(node, DirNode)
        self._sync("sync_dir", path, node)

    def list(self, path: str) -> list[str]:
        self._call("list", path)
        node = self._find(path)
        assert isinstance(node, DirNode)
        return sorted(node.entries)

    def stat(self, path: str) -> Status | None:
        self._call("stat", path)
        try:
            node = self._find(path)
        except FileNotFoundError:
            return None
        if isinstance(node, DirNode):
            return Status(0, is_file=False, is_dir=True, identity=())
        return Status(len(node.content), is_file=True, is_dir=False, identity=(node.number,))

    @contextmanager
    def lock(self, path: str, *, exclusive: bool) -> Iterator[None]:
        self._call("lock", path)
        holders = self.disk.holders.setdefault(self._find(path), [])
        # One thread only: waiting would be for ever.
        assert not holders if exclusive else not any(held for _, held in holders), path
        holder = (self, exclusive)
        holders.append(holder)
        try:
            yield
        finally:
            if holder in holders:
                holders.remove(holder)

    def is_locked(self, path: str) -> bool:
        self._call("is_locked", path)
        return bool(self.disk.holders.get(self._find(path)))

    def _sync(self, call: str, path: str, node: Node) -> None:
        site, lines = _site(call, path)
        self.syncs.setdefault(site, set()).update(lines)
        if site == self.without:
            self.left_out.append(self.calls)
            self._call("(left out)", path)
            return
        try:
            self._call(call, path)
        except OSError:
            node.pending.clear()  # never written, and nobody will be told again
            raise
        if isinstance(node, FileNode):
            node.durable = bytes(node.content)
        else:
            node.durable = dict(node.entries)
        node.pending.clear()

    def _parent(self, path: str) -> tuple[DirNode, str]:
        above, _, name = path.rpartition("/")
        node = self._find(above or "/")
        assert isinstance(node, DirNode)
        return node, name

    def _find(self, path: str) -> Node:
        node: Node = self.disk.root
        for name in path.strip("/").split("/"):
            if name:
                if not isinstance(node, DirNode) or name not in node.entries:
                    raise FileNotFoundError(errno.ENOENT, "not found", path)
                node = node.entries[name]
        return node


class _Written:
    def __init__(self, process: Process, node: FileNode, path: str) -> None:
        self._process, self._node, self._path = process, node, path

    def write(self, data: bytes | memoryview) -> None:
        self._process._call("write", self._path)
        self._node.pending.append((len(self._node.content), bytes(data)))
        self._node.content += data

    def sync(self) -> None:
        self._process._sync("sync", self._path, self._node)

    def close(self) -> None:
        holders = self._process.disk.holders.get(self._node, [])
        holders[:] = [holder for holder in holders if holder[0] is not self._process]


class _Read:
    def __init__(self, process: Process, node: FileNode, path: str) -> None:
        self._process, self._node, self._path = process, node, path
        self._position = 0
        self.size = len(node.content)

    def readinto(self, buffer: memoryview) -> int:
        self._process._call("read", self._path)
        data = self._node.content[self._position : self._position + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, position: int) -> None:
        self._position = position

    def close(self) -> None:
        """Nothing to do."""


def _site(call: str, path: str) -> tuple[str, set[tuple[str, int]]]:
    """Which sync this is: the store's functions on the stack and the last parts of the path."""
    names, lines = [], set()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            names.append(frame.f_code.co_name)
            lines.add((file.rpartition("/")[2], frame.f_lineno))
        frame = frame.f_back
    where = path.rpartition("/")[2] if call == "sync_dir" else ""
    return " < ".join([f"{call} {where}".strip(), *names]), lines
