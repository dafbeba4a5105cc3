"""The SQL tables: sessions, runs, operations (the journal), checkpoints, samplers."""

from holdfast.catalog import tables
from holdfast.catalog.database import Catalog, CatalogUnavailable, SyncFailed
from holdfast.catalog.migrations import NewerCatalog

__all__ = ["Catalog", "CatalogUnavailable", "NewerCatalog", "SyncFailed", "tables"]
