"""The SQL tables: sessions, runs, operations (the journal), checkpoints, samplers."""

from holdfast.catalog import tables
from holdfast.catalog.database import Catalog
from holdfast.catalog.errors import (
    CannotOpen,
    CatalogInUse,
    CatalogUnavailable,
    NewerCatalog,
    SyncFailed,
)
from holdfast.catalog.postgresql import without_secrets

__all__ = [
    "CannotOpen",
    "Catalog",
    "CatalogInUse",
    "CatalogUnavailable",
    "NewerCatalog",
    "SyncFailed",
    "tables",
    "without_secrets",
]
