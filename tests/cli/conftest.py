"""Data directories for commands that work without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.runs import doctor
from holdfast.store import LocalStore, Store, open_store


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of whoever runs the tests decides what a command does."""
    for name in ("BASE_URL", "API_KEY"):
        monkeypatch.delenv(f"TINKER_{name}", raising=False)
        monkeypatch.delenv(f"HOLDFAST_{name}", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, which commands use without being told, and no server."""
    path = tmp_path / "data"
    monkeypatch.setattr(doctor, "STANDS", 0.0)
    LocalStore(path / "store").close()
    monkeypatch.setenv("HOLDFAST_DATA_DIR", str(path))
    return path


@pytest.fixture
def store(data_dir: Path) -> Iterator[Store]:
    with open_store(data_dir / "store") as store:
        yield store
