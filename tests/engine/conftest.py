"""Small models made once, and torch set up as in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from holdfast.engine.core import Core
from holdfast.store import Store, open_store
from holdfast.store.model import Blob
from tests.engine.helpers import BUDGET, load, save_model


@pytest.fixture(scope="session", autouse=True)
def _deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small model of some architecture."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store") as store:
        yield store


MakeCore = Callable[..., Core]


@pytest.fixture
def make_core(model_dir: Callable[[str], Path], store: Store) -> MakeCore:
    """An engine in this process, over the test's store."""

    def read_blob(blob: Blob, what: str) -> bytes:
        return store.read_blob(blob, what=what)

    def make(kind: str = "qwen3", budget: int = BUDGET) -> Core:
        return Core(load(model_dir(kind), budget), read_blob, budget)

    return make
