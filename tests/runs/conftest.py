"""What the tests of runs begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .test_service import Clients


@pytest.fixture
def clients() -> Iterator[Clients]:
    """A server, a session of the Python client, and a run."""
    clients = Clients()
    clients.begin(seed=1, client="python")
    yield clients
    clients.close()
