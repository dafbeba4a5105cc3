"""Name records: the small files that point from a checkpoint's name to its manifest.

A record carries its whole key and a hash of itself, so that a flipped bit, a torn write or a file
that was moved is noticed; the file's own name is only where to look.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.store.errors import Corrupt, CorruptName, InvalidValue, NotAStore, UnsupportedFormat
from holdfast.store.model import NameKey, canonical_json, check_id, content_hash, parse_json

MAX_RECORD = 4096
"""Bytes of an encoded record."""

_VERSION = 1
_HASH_LINE = 65
_KEPT = re.compile(r"[a-z0-9._-]")


@dataclass(frozen=True, slots=True)
class NameRecord:
    """Where a name points. `expires` repeats the manifest's, so that a look-up needs no second."""

    key: NameKey
    manifest: str
    expires: float | None

    def encode(self) -> bytes:
        body = canonical_json(
            {
                "version": _VERSION,
                **asdict(self.key),
                "manifest": self.manifest,
                "expires": self.expires,
            }
        )
        return seal(body)

    @classmethod
    def decode(cls, data: bytes, path: str) -> NameRecord:
        """Raises CorruptName, naming `path`, or UnsupportedFormat."""
        document = unseal(data, path)
        version = document.get("version")
        if isinstance(version, int) and version > _VERSION:
            raise UnsupportedFormat(
                f"{path} has format version {version}; this Holdfast reads up to {_VERSION}"
            )
        try:
            if set(document) != {"version", "run", "kind", "name", "manifest", "expires"}:
                raise InvalidValue(f"its keys are {sorted(document)}")
            expires = document["expires"]
            if expires is not None and not isinstance(expires, float):
                raise InvalidValue(f"expires is {expires!r}")
            key = NameKey(document["run"], document["kind"], document["name"])
            return cls(key, check_id(document["manifest"]), expires)
        except InvalidValue as error:
            raise CorruptName(f"{path} is not a valid name record: {error}", path) from error


def seal(body: bytes) -> bytes:
    """`body` and its hash, each on a line."""
    return body + b"\n" + content_hash(body).encode() + b"\n"


def unseal(data: bytes, path: str, limit: int = MAX_RECORD) -> dict[str, Any]:
    """The object of a sealed JSON text; CorruptName, naming `path`, unless the hash fits."""
    body, mark = data[: -_HASH_LINE - 1], data[-_HASH_LINE - 1 :]
    if mark != b"\n" + content_hash(body).encode() + b"\n":
        raise CorruptName(f"{path} is damaged: its content does not match its hash", path)
    try:
        return parse_json(body, path, limit)
    except Corrupt as error:
        raise CorruptName(str(error), path) from error


def marker(format: str, version: int) -> bytes:
    """The file that tells what a directory or a prefix is."""
    return canonical_json({"format": format, "version": version})


def check_marker(data: bytes | None, path: str, format: str, version: int) -> None:
    """Raises NotAStore, naming `path`, or UnsupportedFormat for a newer version.

    A marker has no hash: only the very bytes that are written for a known version are taken.
    """
    if data in [marker(format, known) for known in range(1, version + 1)]:
        return
    try:
        document = {} if data is None else parse_json(data, path)
    except Corrupt:
        document = {}
    found = document.get("version")
    if document.get("format") == format and type(found) is int and found > version:
        raise UnsupportedFormat(
            f"{path} says that this is a store of version {found}; "
            f"this Holdfast reads up to {version}"
        )
    raise NotAStore(
        f"{path} is damaged, or is not the marker of a Holdfast store, which holds "
        f"{marker(format, version).decode()} and nothing else"
    )


def file_name(key: NameKey) -> str:
    """Where a name's record is kept: different keys, different files, also without regard to case.

    At most 246 bytes, and never anything but a plain file name.
    """
    return f"{run_prefix(key.run)}{key.kind}@{_escape(key.name, 128)}"


def run_prefix(run: str) -> str:
    """What the file names of all of a run's records begin with, and no other's."""
    return f"{_escape(run, 100)}@"


def _escape(text: str, limit: int) -> str:
    escaped = "".join(c if _KEPT.match(c) else f"%{ord(c):02x}" for c in text)
    return escaped if len(escaped) <= limit else f"~{content_hash(text.encode())}"
