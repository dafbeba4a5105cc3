"""The catalog's index of checkpoints: its rows, and in what they differ from the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from holdfast.catalog.tables import checkpoint_files as files
from holdfast.catalog.tables import checkpoints, operations, runs, samplers, snapshots
from holdfast.store import Manifest, NameKey


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A row of the index. Times are UTC seconds, sizes those of the blobs in bytes."""

    run_id: str
    kind: str
    name: str
    manifest: str
    owner: str
    created: float
    expires: float | None
    public: bool
    size: int
    step: int
    user_metadata: Mapping[str, str] | None
    seq: int | None
    own_size: int
    """Of the blobs that no other checkpoint has: what deleting it gives back."""


@dataclass(frozen=True, slots=True)
class Differences:
    """In what the index and the store disagree."""

    unlisted: Mapping[NameKey, str]
    """Names without a row, or with one of another manifest; the manifests they point to."""
    gone: Sequence[NameKey]
    """Rows without a name."""
    without_run: Mapping[str, str]
    """Runs that have checkpoints and no row; a manifest of each."""
    unpositioned: Sequence[NameKey] = ()
    """Rows of before an upgrade, which lack the position that the store knows: no disagreement."""

    def __bool__(self) -> bool:
        return bool(self.unlisted or self.gone or self.without_run)

    def still(self, later: Differences) -> Differences:
        """Those that are the same at another look."""
        return Differences(
            unlisted=dict(self.unlisted.items() & later.unlisted.items()),
            gone=[key for key in self.gone if key in set(later.gone)],
            without_run={run: m for run, m in self.without_run.items() if run in later.without_run},
        )


def compare(connection: sa.Connection, named: Mapping[NameKey, str]) -> Differences:
    """Compare the index with what the store has: its names, and the manifests they point to."""
    rows = {
        NameKey(row.run_id, row.kind, row.name): row
        for row in connection.execute(sa.select(checkpoints))
    }
    known = set(connection.scalars(sa.select(runs.c.id).distinct()))
    listed = {key: row.manifest for key, row in rows.items()}
    return Differences(
        unlisted={key: m for key, m in named.items() if listed.get(key) != m},
        gone=[key for key in rows if key not in named],
        without_run={key.run: m for key, m in named.items() if key.run not in known},
        unpositioned=[
            key for key, m in named.items() if listed.get(key) == m and rows[key].seq is None
        ],
    )


def referred_to(connection: sa.Connection) -> set[str]:
    """Manifests that recovery points, samplers and unsettled operations need."""
    queries = (
        sa.select(snapshots.c.manifest),
        sa.select(samplers.c.manifest).where(samplers.c.manifest.is_not(None)),
        sa.select(operations.c.target).where(
            operations.c.target.is_not(None) & operations.c.settled.is_(None)
        ),
    )
    return {manifest_id for query in queries for manifest_id in connection.scalars(query)}


IN_A_RUN = (sa.func.coalesce(checkpoints.c.seq, -1), checkpoints.c.created)
"""By which the checkpoints of one run are ordered: a clock may be set back."""


def alive() -> sa.ColumnElement[bool]:
    """Of a row: whether it has not expired."""
    return checkpoints.c.expires.is_(None) | (checkpoints.c.expires > time.time())


def row_of(key: NameKey) -> sa.ColumnElement[bool]:
    """Whether a row is that of a name."""
    return (
        (checkpoints.c.run_id == key.run)
        & (checkpoints.c.kind == key.kind)
        & (checkpoints.c.name == key.name)
    )


def own_size_of() -> sa.ColumnElement[int]:
    """Of a row: bytes of the blobs that no other has, as a subquery."""
    other = files.alias("other")
    shared = sa.exists().where(
        (other.c.hash == files.c.hash)
        & (
            (other.c.run_id != files.c.run_id)
            | (other.c.kind != files.c.kind)
            | (other.c.name != files.c.name)
        )
    )
    return (
        sa.select(sa.func.coalesce(sa.func.sum(files.c.size), 0))
        .where(
            (files.c.run_id == checkpoints.c.run_id)
            & (files.c.kind == checkpoints.c.kind)
            & (files.c.name == checkpoints.c.name)
            & ~shared
        )
        .correlate(checkpoints)
        .scalar_subquery()
    )


def select_with_own_size() -> sa.Select[Any]:
    """The columns of a `Checkpoint`."""
    return sa.select(checkpoints, own_size_of().label("own_size"))


def remove(connection: sa.Connection, keys: Iterable[NameKey]) -> None:
    """Take names out of the index, those that are in it."""
    for key in keys:
        connection.execute(checkpoints.delete().where(row_of(key)))
        connection.execute(
            files.delete().where(
                (files.c.run_id == key.run)
                & (files.c.kind == key.kind)
                & (files.c.name == key.name)
            )
        )


def put(connection: sa.Connection, key: NameKey, manifest_id: str, manifest: Manifest) -> None:
    """List a name as what it points to now."""
    remove(connection, [key])
    connection.execute(
        checkpoints.insert().values(
            run_id=key.run,
            kind=key.kind,
            name=key.name,
            manifest=manifest_id,
            owner=manifest.owner,
            created=manifest.created,
            expires=manifest.expires,
            public=manifest.public,
            size=manifest.size,
            step=manifest.step,
            user_metadata=manifest.user_metadata,
            seq=manifest.seq,
        )
    )
    for file, blob in manifest.files.items():
        connection.execute(
            files.insert().values(
                run_id=key.run,
                kind=key.kind,
                name=key.name,
                file=file,
                hash=blob.hash,
                size=blob.size,
            )
        )
