"""What tests of the catalog share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.catalog import Catalog
from tests.support.postgres import Postgres


@pytest.fixture
def address(postgres: Postgres) -> str:
    """Of a new, empty catalog."""
    return postgres.catalog()


@pytest.fixture
def opened(address: str) -> Iterator[Catalog]:
    catalog = Catalog.open(address)
    yield catalog
    catalog.close()
