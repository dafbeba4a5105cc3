"""The index of checkpoints and the store: changed together; what is damaged can be deleted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import checkpoints as rows
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.errors import RunError
from holdfast.runs.index import Differences
from holdfast.store import LocalStore, Manifest, NameKey, SweepReport
from tests.store.samples import WEIGHTS, key_of, manifest_of

A_WHILE = 0.3
"""Seconds that a change of a name is held up, for another one to overtake it."""


class HeldUp(LocalStore):
    """Changes names at once, and comes back from that when it is let go on or after a while."""

    def __init__(self, root: Path) -> None:
        self.time = 1.8e9
        super().__init__(root, wall=lambda: self.time, monotonic=lambda: self.time)
        self.changed = Event()
        self.go_on = Event()

    def delete_name(self, key: NameKey) -> bool:
        deleted = super().delete_name(key)
        self._hold()
        return deleted

    def sweep(self) -> SweepReport:
        report = super().sweep()
        if report.names:
            self._hold()
        return report

    def _hold(self) -> None:
        self.changed.set()
        self.go_on.wait(A_WHILE)


@pytest.fixture
def store(tmp_path: Path) -> HeldUp:
    return HeldUp(tmp_path / "store")


def sample(store: LocalStore, **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([b"weights"])}, **changes)


@pytest.mark.anyio
async def test_a_deletion_does_not_unlist_what_is_saved_beside_it(
    store: HeldUp, catalog: Catalog
) -> None:
    checkpoints = Checkpoints(store, catalog)
    first, second = sample(store, seq=1), sample(store, seq=2)
    await checkpoints.publish(first)
    await catalog.write(lambda c: _add_run(c, first.run))
    deletion = asyncio.create_task(checkpoints.delete(key_of(first), "local"))
    await asyncio.to_thread(store.changed.wait)
    await checkpoints.publish(second, replace=True)
    store.go_on.set()
    await deletion
    assert not await checkpoints.differences()
    (row,), _ = await checkpoints.page("local")
    assert row.manifest == second.id


async def newest(checkpoints: Checkpoints, run: str) -> tuple[str, str]:
    """The one that run information shows, and the one that is advised."""
    advised = await checkpoints.newest_intact(run)
    assert advised is not None
    return (await checkpoints.newest([run], "weights"))[run].name, advised.name


@pytest.mark.anyio
async def test_the_newest_checkpoint_of_a_run_is_the_last_in_its_order(
    store: HeldUp, catalog: Catalog
) -> None:
    """Though the clock was set back before it was made."""
    checkpoints = Checkpoints(store, catalog)
    for name, seq, created in (("a", 9, 2.0), ("b", 10, 1.0), ("c", 2, 3.0)):
        await checkpoints.publish(sample(store, name=name, seq=seq, created=created))
    run = sample(store).run
    assert await newest(checkpoints, run) == ("b", "b")
    # What was listed before an upgrade says nothing of its position before the next start.
    await catalog.write(lambda c: c.execute(rows.update().values(seq=None)))
    await catalog.write(lambda c: _add_run(c, run))
    assert await newest(checkpoints, run) == ("c", "c")
    assert await checkpoints.reconcile() == (3, 0)
    assert await newest(checkpoints, run) == ("b", "b")
    assert await checkpoints.reconcile() == (0, 0)


@pytest.mark.anyio
async def test_a_sweep_does_not_unlist_what_is_saved_beside_it(
    store: HeldUp, catalog: Catalog
) -> None:
    checkpoints = Checkpoints(store, catalog)
    first, second = sample(store, seq=1, expires=store.time), sample(store, seq=2)
    await checkpoints.publish(first)
    await catalog.write(lambda c: _add_run(c, first.run))
    await checkpoints.sweep()
    store.time += 3601
    sweep = asyncio.create_task(checkpoints.sweep())
    await asyncio.to_thread(store.changed.wait)
    await checkpoints.publish(second)
    store.go_on.set()
    assert (await sweep).names == (key_of(first),)
    assert not await checkpoints.differences()
    (row,), _ = await checkpoints.page("local")
    assert row.manifest == second.id


@pytest.mark.anyio
async def test_reconciling_leaves_what_is_saved_and_deleted_beside_it(
    store: HeldUp, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.go_on.set()
    checkpoints = Checkpoints(store, catalog)
    kept, deleted = sample(store, seq=1), sample(store, seq=2, name="other")
    for manifest in (kept, deleted):
        store.publish(manifest)
        store.set_name(key_of(manifest), manifest.id)
    await catalog.write(lambda c: _add_run(c, kept.run))
    newer = sample(store, seq=3)
    honest = checkpoints.differences

    async def differences() -> Differences:
        found = await honest()
        await checkpoints.publish(newer, replace=True)
        await checkpoints.delete(key_of(deleted), "local")
        return found

    monkeypatch.setattr(checkpoints, "differences", differences)
    assert await checkpoints.reconcile() == (1, 1)
    (row,), _ = await checkpoints.page("local")
    assert row.manifest == newer.id
    assert not await honest()


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["manifests", "names"])
async def test_a_damaged_checkpoint_can_be_deleted_by_its_owner_and_is_swept_then(
    what: str, store: HeldUp, catalog: Catalog, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(store, catalog)
    manifest = sample(store)
    await checkpoints.publish(manifest)
    await catalog.write(lambda c: _add_run(c, manifest.run))
    (file,) = (path for path in (tmp_path / "store" / what).iterdir() if path.is_file())
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    await checkpoints.reconcile()
    with pytest.raises(RunError, match=what) as damaged:
        await checkpoints.resolve(key_of(manifest), ["local"])
    assert (damaged.value.reason, damaged.value.category) == ("damaged", "server")

    with pytest.raises(RunError):
        await checkpoints.delete(key_of(manifest), "somebody-else")
    assert file.exists()

    store.go_on.set()
    await checkpoints.delete(key_of(manifest), "local")
    assert not await checkpoints.differences()
    assert (await checkpoints.page("local"))[1] == 0
    removed = 0
    for _ in range(4):
        removed += (await checkpoints.sweep()).blobs
        store.time += 3601
    assert removed == 1


@pytest.mark.anyio
async def test_an_intact_checkpoint_is_no_remnant(store: HeldUp, catalog: Catalog) -> None:
    checkpoints = Checkpoints(store, catalog)
    manifest = sample(store, owner="somebody-else", public=True)
    await checkpoints.publish(manifest)
    await catalog.write(lambda c: _add_run(c, manifest.run))
    with pytest.raises(RunError, match="another owner"):
        await checkpoints.delete(key_of(manifest), "local")
    assert store.resolve(key_of(manifest)) == manifest.id


def _add_run(connection: sa.Connection, run: str) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO runs (id, generation, session_id, owner, created, last_request, state,"
            " body_hash, corrupted, recoveries, replayed, divergences)"
            " VALUES (:run, 0, 's', 'local', 1, 1, 'live', '', false, 0, 0, 0)"
        ),
        {"run": run},
    )
