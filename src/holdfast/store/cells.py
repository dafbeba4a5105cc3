"""Cells: the small objects that change, each a sealed line of fields and what it carries.

Every cell ever written differs from all others by a random number, so that the storage's mark of a
version never comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import uuid4

from holdfast.store.errors import (
    Corrupt,
    CorruptBlob,
    CorruptManifest,
    CorruptName,
    UnsupportedFormat,
)
from holdfast.store.model import Manifest, canonical_json, content_hash
from holdfast.store.records import NameRecord, seal, unseal

_VERSION = 1
_MAX_FIELDS = 1 << 16


def encode(fields: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """A new cell's bytes."""
    own = {"version": _VERSION, "nonce": uuid4().hex, "payload": content_hash(payload)}
    return seal(canonical_json({**own, **fields})) + payload


def decode(data: bytes, path: str, corrupt: type[Corrupt]) -> tuple[dict[str, Any], bytes]:
    """A cell's fields and payload. Raises `corrupt`, naming `path`, or UnsupportedFormat."""
    end = data.find(b"\n", data.find(b"\n") + 1) + 1
    try:
        fields = unseal(data[:end], path, _MAX_FIELDS)
    except Corrupt as error:
        raise corrupt(str(error), path) from error
    version = fields.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise UnsupportedFormat(
            f"{path} has format version {version}; this Holdfast reads up to {_VERSION}"
        )
    if fields.get("payload") != content_hash(data[end:]):
        raise corrupt(f"{path} is damaged: its content does not match its hash", path)
    return fields, data[end:]


State = Literal["staged", "kept", "loose", "doomed", "dead"]
"""What becomes of a manifest, or of a copy of a blob.

staged   being published; nobody reads it yet
kept     stays whatever refers to it: an unnamed manifest, a copy that was rescued
loose    stays for an hour, and while something refers to it: a named manifest, a discarded one
doomed   nothing referred to it when a sweep looked; whoever wants to refer to it makes it loose
dead     going; nobody may refer to it any more
"""


@dataclass(frozen=True, slots=True)
class MarkCell:
    """What sweeps have decided about a copy of a blob."""

    state: State

    def encode(self) -> bytes:
        return encode({"state": self.state})

    @classmethod
    def decode(cls, data: bytes, path: str) -> MarkCell:
        return cls(decode(data, path, CorruptBlob)[0]["state"])


@dataclass(frozen=True, slots=True)
class ManifestCell:
    """A manifest in the storage."""

    state: State
    copies: Mapping[str, str]
    """Hash of each of its blobs -> the copy of it that it uses."""
    manifest: Manifest

    def into(self, state: State) -> ManifestCell:
        return replace(self, state=state)

    @property
    def uses(self) -> set[str]:
        """Keys of the copies that it uses."""
        return {f"blobs/{content}/{copy}" for content, copy in self.copies.items()}

    def encode(self) -> bytes:
        fields = {"state": self.state, "copies": dict(self.copies)}
        return encode(fields, self.manifest.to_bytes())

    @classmethod
    def decode(cls, data: bytes, path: str) -> ManifestCell:
        fields, payload = decode(data, path, CorruptManifest)
        cell = cls(fields["state"], fields["copies"], Manifest.from_bytes(payload, path))
        if set(cell.copies) != {blob.hash for blob in cell.manifest.files.values()}:
            raise CorruptManifest(f"{path} does not say which copies of its blobs it uses", path)
        return cell


@dataclass(frozen=True, slots=True)
class NameCell:
    """A name in the storage. One that points nowhere, and is not about to, is free."""

    record: NameRecord | None = None
    copy: str | None = None
    """Which copy of the manifest `record` points to."""
    pending: str | None = None
    """The manifest that somebody is about to point it to, which must stay meanwhile."""

    def encode(self) -> bytes:
        record = b"" if self.record is None else self.record.encode()
        return encode({"copy": self.copy, "pending": self.pending}, record)

    @classmethod
    def decode(cls, data: bytes, path: str) -> NameCell:
        fields, payload = decode(data, path, CorruptName)
        record = NameRecord.decode(payload, path) if payload else None
        return cls(record, fields["copy"], fields["pending"])
