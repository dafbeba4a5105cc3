"""Examining a data directory: what is damaged, what is left over, what the catalog does not know.

The store is the truth. Repairing makes the catalog agree with it; damaged bytes cannot be repaired,
only named.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import checkpoints, runs, snapshots
from holdfast.runs import journal, stored
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.errors import RunError
from holdfast.runs.index import Differences
from holdfast.runs.segments import Segments
from holdfast.store import Manifest, MissingManifest, NameKey, Store, StoreError
from holdfast.store.base import Progress

STANDS = 10.0
"""Seconds for which store and catalog differ if nobody is about to make them agree: a server
changes a name first and its row next."""

_BETWEEN_LOOKS = 0.5
_LOOKED_FOR = 20
"""Manifests of each kind of which a store must have one to belong to a catalog."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found. Sizes are bytes."""

    checkpoints: int
    """Names in the store."""
    recovery_points: int
    """Manifests without a name."""
    blobs: int
    size: int
    """Of all blobs."""
    damage: tuple[StoreError, ...]
    orphan_manifests: int
    """That nothing leads to: deleted, expired or replaced. The next sweeps remove them."""
    orphan_blobs: int
    orphan_size: int
    differences: Differences
    journal_damage: tuple[RunError, ...] = ()
    """Bodies and results of operations that are not what was written."""
    lost_recovery_points: Mapping[str, str] = field(default_factory=dict)
    """Live runs whose newest recovery point the store does not have, and its manifest."""
    lost_runs: Mapping[str, Manifest] = field(default_factory=dict)
    """Runs that the catalog does not know, and the newest intact state of each, without a name."""
    shared: bool = False
    """Whether another server may be training them."""

    @property
    def repairable(self) -> bool:
        """Whether there is anything that `repair` changes."""
        return bool(self.differences or self.lost_runs)

    @property
    def ok(self) -> bool:
        lost = self.lost_runs and not self.shared
        damage = self.damage or self.journal_damage or self.lost_recovery_points
        return not (damage or self.differences or lost)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did."""

    listed: int
    """Checkpoints that were added to the catalog, or brought up to date."""
    removed: int
    """Rows of checkpoints that the store does not have."""
    named: tuple[NameKey, ...]
    """States of lost runs, which can be resumed from these names."""


def belong_together(store: Store, catalog: Catalog) -> bool:
    """Whether a store has any of the newest manifests that a catalog tells of, if it tells of any.

    Otherwise it is another catalog's, and no run could be restored from it.
    """
    wanted = catalog.read_now(_newest_manifests)
    for manifest_id in wanted:
        try:
            store.read_manifest(manifest_id)
        except MissingManifest:
            continue
        except StoreError:  # damaged, hence there; or not to be read now
            pass
        return True
    return not wanted


def _newest_manifests(connection: sa.Connection) -> list[str]:
    of_live = sa.exists().where(
        (runs.c.id == snapshots.c.run_id)
        & (runs.c.generation == snapshots.c.generation)
        & (runs.c.state == "live")
    )
    found: list[str] = []
    for query in (
        sa.select(snapshots.c.manifest).where(of_live).order_by(snapshots.c.created.desc()),
        sa.select(checkpoints.c.manifest).order_by(checkpoints.c.created.desc()),
    ):
        found += connection.scalars(query.limit(_LOOKED_FOR))
    return found


async def examine(
    store: Store,
    catalog: Catalog,
    segments: Segments,
    *,
    alone: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Read everything.

    Unless `alone`, a server may go on meanwhile. What that is about to change is no problem: store
    and catalog are compared again, until they agree or have differed in the same for a while.
    """
    checkpoints = Checkpoints(store, catalog)
    differences, seen = await checkpoints.differences(), time.monotonic()
    report = await asyncio.to_thread(store.verify, progress=progress)
    reached = await asyncio.to_thread(_reach, store)
    used = {b.hash: b.size for m in reached.all.values() for b in m.files.values()}
    if not alone:
        differences = await _standing(checkpoints, differences, seen)
    return Diagnosis(
        checkpoints=len(reached.names),
        recovery_points=len(reached.unnamed),
        blobs=report.blobs,
        size=report.size,
        damage=report.problems,
        orphan_manifests=max(0, report.manifests - len(reached.all)),
        orphan_blobs=max(0, report.blobs - len(used)),
        orphan_size=max(0, report.size - sum(used.values())),
        differences=differences,
        journal_damage=await _journal_damage(catalog, segments),
        lost_recovery_points=await _lost_recovery_points(store, catalog),
        lost_runs=_without_name(
            reached, await _newest_intact(store, await _of_lost_runs(reached, catalog))
        ),
        shared=store.shared,
    )


async def _standing(checkpoints: Checkpoints, found: Differences, seen: float) -> Differences:
    """Which of the differences that were `seen` at a moment are no work under way."""
    while found:
        found = found.still(await checkpoints.differences())
        if time.monotonic() - seen >= STANDS:
            break
        await asyncio.sleep(_BETWEEN_LOOKS)
    return found


async def _journal_damage(catalog: Catalog, segments: Segments) -> tuple[RunError, ...]:
    """One at a time: together they may take longer than a read may."""
    found: list[RunError | None] = [
        await catalog.read(partial(journal.damage, segments=segments, content=content))
        for content in await catalog.read(journal.kept)
    ]
    return tuple(error for error in found if error is not None)


async def repair(store: Store, catalog: Catalog) -> Repaired:
    """Make the catalog's index of checkpoints agree with the store. No server may be running.

    The newest intact state of a run that the catalog does not know gets a name, `auto.POSITION`,
    from which training goes on; what else the run has without a name is let go, unless another
    server that keeps its checkpoints here may still need it. A run without an intact state keeps
    all it has.
    """
    checkpoints = Checkpoints(store, catalog)
    reached = await asyncio.to_thread(_reach, store)
    lost = await _of_lost_runs(reached, catalog)
    newest = await _newest_intact(store, lost)
    named = []
    for manifest in _without_name(reached, newest).values():
        state = _named(manifest)
        await checkpoints.publish(state, replace=True)
        assert state.key is not None
        named.append(state.key)
    if not store.shared:
        await checkpoints.discard([id for id, m in lost.items() if m.run in newest])
    listed, removed = await checkpoints.reconcile()
    return Repaired(listed + len(named), removed, tuple(named))


@dataclass(slots=True)
class _Reached:
    """What names and recovery points lead to, as far as it can be read."""

    names: set[NameKey] = field(default_factory=set)
    all: dict[str, Manifest] = field(default_factory=dict)
    unnamed: dict[str, Manifest] = field(default_factory=dict)


def _reach(store: Store) -> _Reached:
    reached = _Reached()
    damage: list[StoreError] = []  # which verifying reports
    for key, manifest_id in store.names(on_damage=damage.append):
        reached.names.add(key)
        try:
            reached.all[manifest_id] = store.read_manifest(manifest_id)
        except StoreError as error:
            damage.append(error)
    reached.unnamed = dict(store.unnamed(on_damage=damage.append))
    reached.all |= reached.unnamed
    return reached


async def _of_lost_runs(reached: _Reached, catalog: Catalog) -> dict[str, Manifest]:
    """Unnamed manifests of runs that the catalog does not know, or only by their checkpoints."""
    known = await catalog.read(stored.trained)
    return {id: m for id, m in reached.unnamed.items() if m.run not in known}


async def _newest_intact(store: Store, manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """The newest state of each run that training can go on from, every byte of it verified."""
    found: dict[str, Manifest] = {}
    newest_first = sorted(manifests.items(), key=lambda x: (x[1].seq, x[1].created), reverse=True)
    for manifest_id, manifest in newest_first:
        if manifest.kind == "training" and manifest.run not in found:
            with suppress(StoreError):
                if (await asyncio.to_thread(store.verify, manifest_id)).ok:
                    found[manifest.run] = manifest
    return found


def _named(manifest: Manifest) -> Manifest:
    """The state of a lost run under the name that it is resumed from."""
    return dataclasses.replace(manifest, name=f"auto.{manifest.seq}")


def _without_name(reached: _Reached, lost: Mapping[str, Manifest]) -> dict[str, Manifest]:
    return {run: m for run, m in lost.items() if _named(m).key not in reached.names}


async def _lost_recovery_points(store: Store, catalog: Catalog) -> dict[str, str]:
    def query(connection: sa.Connection) -> dict[str, str]:
        rows = connection.execute(
            sa.select(snapshots.c.run_id, snapshots.c.manifest)
            .join(
                runs,
                (runs.c.id == snapshots.c.run_id) & (runs.c.generation == snapshots.c.generation),
            )
            .where(runs.c.state == "live")
            .order_by(snapshots.c.seq)
        )
        return {row.run_id: row.manifest for row in rows}

    def is_missing(manifest_id: str) -> bool:
        try:
            store.read_manifest(manifest_id)
        except MissingManifest:
            return True
        except StoreError:  # which verifying reports
            pass
        return False

    newest = await catalog.read(query)
    missing = [run for run, id in newest.items() if await asyncio.to_thread(is_missing, id)]
    # A server lets go of the row first.
    later = await catalog.read(query) if missing else {}
    return {run: newest[run] for run in missing if later.get(run) == newest[run]}
