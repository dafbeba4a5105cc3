"""What the store keeps: blobs, manifests and the names that point to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blob:
    """Immutable bytes, named by their content."""

    hash: str
    """blake3, 64 lower-case hex digits."""
    size: int
    """Bytes."""
