"""Which version of a base model a directory holds. Without torch: imports compare it as well."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

NUMERIC_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""The files that decide a model's numbers."""


def revision(directory: Path) -> str:
    """blake3 over the names and bytes of the files that decide the model's numbers."""
    total = blake3()
    for path in sorted({path for pattern in NUMERIC_FILES for path in directory.glob(pattern)}):
        content = blake3(max_threads=blake3.AUTO)
        content.update_mmap(path)
        total.update(f"{path.name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()
