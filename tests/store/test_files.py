"""The operating system's files, as the store uses them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.store import files
from holdfast.store.files import LocalFiles


def test_a_large_file_is_synced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sync is of more than a part of it: while one lasts, nothing tells that it moves."""
    honest, synced = files._flush, []

    def flush(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        honest(fd)

    monkeypatch.setattr(files, "_flush", flush)
    monkeypatch.setattr(files, "_SYNC", 100)
    file = LocalFiles().create(str(tmp_path / "file"))
    for _ in range(5):
        file.write(bytes(60))
    file.sync()
    file.close()
    assert synced == [120, 240, 300]
