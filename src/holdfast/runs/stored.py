"""Runs that only hold checkpoints: copies, imports, and those found in the store alone."""

from __future__ import annotations

import sqlalchemy as sa

from holdfast.catalog.tables import runs
from holdfast.runs import bodies
from holdfast.store import Manifest

STORED = "stored"
"""The state of such a run."""

_DETAIL = "it holds checkpoints and cannot be trained; create a new run from one of their paths"


def insert(
    connection: sa.Connection,
    manifest: Manifest,
    *,
    body_hash: str = "",
    idempotency_key: str | None = None,
) -> None:
    """A row for the run of a checkpoint."""
    connection.execute(
        runs.insert().values(
            id=manifest.run,
            generation=0,
            session_id=manifest.run.partition(":")[0],
            owner=manifest.owner,
            created=manifest.created,
            last_request=manifest.created,
            state=STORED,
            state_detail=_DETAIL,
            base_model=manifest.base_model,
            config=bodies.config_as_json(bodies.config_of(manifest)),
            body_hash=body_hash,
            idempotency_key=idempotency_key,
            corrupted=False,
            parent=manifest.parent,
        )
    )


def insert_missing(connection: sa.Connection, manifest: Manifest) -> None:
    """A row for the run of a checkpoint that was found in the store, unless it has one by now."""
    known = sa.select(runs.c.id).where(runs.c.id == manifest.run)
    if connection.execute(known).first() is None:
        insert(connection, manifest)


def trained(connection: sa.Connection) -> set[str]:
    """Ids of all other runs: those whose own operations the catalog knows."""
    return set(connection.scalars(sa.select(runs.c.id).where(runs.c.state != STORED).distinct()))
