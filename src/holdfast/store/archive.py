"""Checkpoints as tar archives: written in any range, read without trust.

An archive holds the checkpoint's files and its manifest, `holdfast.json`, in the order of their
names. Its bytes depend on the manifest alone, so that a download can be resumed, and cached.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from blake3 import blake3

from holdfast.store.base import Store
from holdfast.store.errors import Corrupt, InvalidFile, InvalidValue
from holdfast.store.model import MAX_BLOB, MAX_MANIFEST, Blob, Manifest, check_file_name
from holdfast.store.tensors import header_size, read_tensors

MANIFEST = "holdfast.json"
"""The manifest's name in an archive."""

_BLOCK = 512
_PIECE = 1 << 20
_MAX_MEMBERS = 101
_MAX_EXTENSION = 1 << 16
_REGULAR = (b"0", b"\0")
_EXTENSION = (b"x", b"g")
_IGNORED_KEYS = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of an archive, `size` bytes, read from `start` to `stop` within it."""

    size: int
    read: Callable[[int, int], Iterable[bytes]]


class Archive:
    """The tar archive of a checkpoint, made as it is read."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._parts = list(self._lay_out())
        self.size = sum(part.size for part in self._parts)
        """Bytes."""

    @cached_property
    def checksum(self) -> str:
        """blake3 of the whole archive, in hex. Reads all of it."""
        hasher = blake3(max_threads=blake3.AUTO)
        for piece in self.read():
            hasher.update(piece)
        return hasher.hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in pieces.

        Of a damaged blob never all bytes asked for are given: CorruptBlob comes first.
        """
        stop = self.size if stop is None else min(stop, self.size)
        offset = 0
        for part in self._parts:
            first, last = max(start - offset, 0), min(stop - offset, part.size)
            if first < last:
                yield from part.read(first, last)
            offset += part.size

    def _lay_out(self) -> Iterator[_Part]:
        data = self._manifest.to_bytes()
        for name in sorted({*self._manifest.files, MANIFEST}):
            if name == MANIFEST:
                yield from self._member(name, _fixed(data))
            else:
                yield from self._member(name, self._blob(name, self._manifest.files[name]))
        yield _fixed(bytes(2 * _BLOCK))

    def _member(self, name: str, content: _Part) -> Iterator[_Part]:
        info = tarfile.TarInfo(name)
        info.size = content.size
        info.mtime = max(0, int(self._manifest.created))
        yield _fixed(info.tobuf(tarfile.GNU_FORMAT))
        yield content
        yield _fixed(bytes(-content.size % _BLOCK))

    def _blob(self, name: str, blob: Blob) -> _Part:
        what = f"{name} of {self._manifest.label}"
        return _Part(
            blob.size, lambda start, stop: self._store.stream_blob(blob, start, stop, what=what)
        )


def _fixed(data: bytes) -> _Part:
    return _Part(len(data), lambda start, stop: (data[start:stop],))


class Source(Protocol):
    """Anything that reads like a binary file."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Imported:
    """What an archive held: its files, put into the store, and its manifest if it had one."""

    files: dict[str, Blob]
    manifest: Manifest | None


def import_archive(store: Store, source: Source, *, what: str = "the archive") -> Imported:
    """Put the files of a tar archive into the store, each streamed once.

    Takes plain files only, at most one directory deep (the archive of a PEFT adapter's directory).
    Raises InvalidFile for anything else: links, devices, paths that lead elsewhere, the same name
    twice, an archive cut short, safetensors files that are not well formed, a manifest that does
    not fit the files. Nothing is published; what was put goes with a later sweep.
    """
    files: dict[str, Blob] = {}
    manifest = None
    names: set[str] = set()
    for name, member in _members(source, what):
        if name in names or len(names) >= _MAX_MEMBERS:
            raise InvalidFile(f"{what} has {name!r} twice, or more than {_MAX_MEMBERS} files")
        names.add(name)
        if name == MANIFEST:
            manifest = _read_manifest(member, what)
        else:
            files[name] = put_file(store, member.pieces(), member.size, name)
    if not files:
        raise InvalidFile(f"{what} holds no files")
    if manifest is not None and dict(manifest.files) != files:
        raise InvalidFile(f"{what}: its files are not those that its {MANIFEST} lists")
    return Imported(files, manifest)


def put_file(store: Store, pieces: Iterable[bytes], size: int, name: str) -> Blob:
    """Put a file from outside, refusing a safetensors file that is not well formed."""
    if not name.endswith(".safetensors"):
        return store.put_blob(pieces)
    return store.put_blob(_checked_tensors(pieces, size, name))


def _checked_tensors(pieces: Iterable[bytes], size: int, name: str) -> Iterator[bytes]:
    """The same pieces, once the header that they begin with has been checked."""
    waiting = iter(pieces)
    start = bytearray()
    needed = 8
    for piece in waiting:
        start += piece
        if needed == 8 and len(start) >= 8:
            needed += header_size(bytes(start[:8]), size, name)
        if len(start) >= needed > 8:
            break
    needed = 8 + header_size(bytes(start[:8]), size, name)
    read_tensors(bytes(start[8:needed]), size, name)
    yield bytes(start)
    yield from waiting


@dataclass(slots=True)
class _Member:
    """A file in an archive, to be read before the next one."""

    source: Source
    size: int
    what: str

    def pieces(self) -> Iterator[bytes]:
        left = self.size
        while left:
            piece = self.source.read(min(left, _PIECE))
            if not piece:
                raise InvalidFile(f"{self.what} ends in the middle of a file")
            left -= len(piece)
            yield piece


def _read_manifest(member: _Member, what: str) -> Manifest:
    if member.size > MAX_MANIFEST:
        raise InvalidFile(f"{what}: its {MANIFEST} has {member.size} bytes")
    try:
        return Manifest.from_bytes(b"".join(member.pieces()), f"{MANIFEST} in {what}")
    except Corrupt as error:
        raise InvalidFile(str(error)) from error


def _members(source: Source, what: str) -> Iterator[tuple[str, _Member]]:
    """The plain files of a tar archive (POSIX ustar, GNU, or pax with harmless extensions)."""
    while True:
        block = b"".join(_Member(source, _BLOCK, what).pieces())
        if not any(block):
            return
        kind, size = _check_header(block, what)
        member = _Member(source, size, what)
        if kind in _EXTENSION:
            _check_extension(member, what)
        elif kind == b"5" and size == 0:
            continue  # a directory; files bring their own paths
        elif kind in _REGULAR:
            yield _plain_name(block, what), member
        else:
            raise InvalidFile(f"{what} holds something else than plain files (type {kind!r})")
        padding = -size % _BLOCK
        if any(b"".join(_Member(source, padding, what).pieces())):
            raise InvalidFile(f"{what}: data between its files")


def _check_header(block: bytes, what: str) -> tuple[bytes, int]:
    """Type and size of a member."""
    if block[257:262] != b"ustar":
        raise InvalidFile(f"{what} is not a tar archive, or is damaged")
    blanked = block[:148] + b" " * 8 + block[156:]
    if _number(block[148:156], what) != sum(blanked):
        raise InvalidFile(f"{what} is damaged: a header does not match its checksum")
    size = _number(block[124:136], what)
    if not 0 <= size <= MAX_BLOB:
        raise InvalidFile(f"{what} claims a file of {size} bytes")
    return block[156:157], size


def _number(field: bytes, what: str) -> int:
    if field[0] == 0x80:  # GNU: binary, for large values
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ").decode("ascii") or "0", 8)
    except ValueError as error:
        raise InvalidFile(f"{what} is damaged: {field!r} is not a number") from error


def _plain_name(block: bytes, what: str) -> str:
    raw = block[:100].rstrip(b"\0")
    if block[345:500].rstrip(b"\0") and block[257:263] == b"ustar\0":
        raise InvalidFile(f"{what}: {raw[:100]!r} lies too deep")
    try:
        text = raw.decode().removeprefix("./")
        directory, slash, name = text.rpartition("/")
        if slash:
            check_file_name(directory)
        return check_file_name(name)
    except (UnicodeDecodeError, InvalidValue) as error:
        raise InvalidFile(f"{what}: {raw!r} is not a plain file name") from error


def _check_extension(member: _Member, what: str) -> None:
    """pax records: those that change a file's name, size or type are refused."""
    if member.size > _MAX_EXTENSION:
        raise InvalidFile(f"{what}: an extended header of {member.size} bytes")
    rest = b"".join(member.pieces())
    while rest:
        length, space, _ = rest.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(rest):
            raise InvalidFile(f"{what}: an extended header is damaged")
        key = rest[len(length) + 1 : int(length)].partition(b"=")[0].decode(errors="replace")
        if key not in _IGNORED_KEYS and not key.startswith(("LIBARCHIVE.", "SCHILY.")):
            raise InvalidFile(f"{what}: an extended header sets {key[:100]!r}")
        rest = rest[int(length) :]
