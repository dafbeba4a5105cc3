"""One server for most tests here: starting one costs seconds, and runs do not touch each other."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.support.models import CONFIGS, save_small_model
from tests.support.sdk import service_client
from tests.support.server import ServerProcess

TEST_SECONDS = 120
"""Whatever goes wrong, a test that waits for the server fails soon and says where."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        if not any(item.iter_markers("timeout")):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
        # Calls that the SDK is about to rename must work as long as it has them.
        item.add_marker(pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"))
        # The SDK leaves its connections to the garbage collector.
        item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))


@pytest.fixture(scope="package", autouse=True)
def collect_garbage_of_the_sdk() -> Iterator[None]:
    """Before tests of other folders could be blamed for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the small base models, by the names that they are served under."""
    root = tmp_path_factory.mktemp("models")
    return {f"small-{kind}": save_small_model(kind, root / kind) for kind in CONFIGS}


@pytest.fixture(scope="session")
def server(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that all tests share. It must have met no defect by the end."""
    with ServerProcess(tmp_path_factory.mktemp("server"), models=models) as running:
        yield running
    assert "Traceback" not in running.log, running.log
    assert "a defect" not in running.log, running.log


@pytest.fixture
def own_server(models: dict[str, Path], tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of the test's own, to kill. Each of its lives starts as a user's do."""
    with ServerProcess(tmp_path / "server", models=models, quick=False) as running:
        yield running


@pytest.fixture
def service(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    """An SDK client with a session of its own on the shared server."""
    with service_client(server) as client:
        yield client
