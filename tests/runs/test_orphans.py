"""Recovery points that a crash left without a row are let go at the next start, others are not."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import snapshots
from holdfast.runs import doctor
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.errors import RunError
from holdfast.runs.segments import Segments
from holdfast.store import LocalStore, Manifest, ObjectStore, open_store
from tests.store.samples import manifest_of
from tests.store.storage import MemoryObjects, Storage


@pytest.mark.anyio
async def test_unnamed_manifests_without_a_row_are_discarded(
    catalog: Catalog, tmp_path: Path
) -> None:
    with open_store(tmp_path / "store") as store:
        checkpoints = Checkpoints(store, catalog)
        blob = store.put_blob([b"weights"])
        sample: Manifest = dataclasses.replace(
            manifest_of({"adapter_model.safetensors": blob}), name=None
        )
        kept = await checkpoints.publish(dataclasses.replace(sample, seq=1))
        orphan = await checkpoints.publish(dataclasses.replace(sample, seq=2))
        # Of an unknown run: it may be the catalog that is new, not the manifests left over.
        started = Checkpoints(store, catalog)
        assert await started.discard_orphans() == 0
        await catalog.write(lambda c: _add_run_with_snapshot(c, kept))
        fresh = await started.publish(dataclasses.replace(sample, seq=3))
        assert await started.discard_orphans() == 1
        left = await asyncio.to_thread(lambda: [found for found, _ in store.unnamed()])
        assert sorted(left) == sorted([kept, fresh]) and orphan not in left
        # Unless it was published after that start.
        assert await Checkpoints(store, catalog).discard_orphans() == 1


class Held(LocalStore):
    """Discards only when it is told to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def discard(self, manifest_id: str) -> bool:
        self.begun.set()
        assert self.go_on.wait(30.0)
        return super().discard(manifest_id)


@pytest.mark.anyio
async def test_an_orphan_is_not_published_while_its_deletion_hangs(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be gone when the disk answers."""
    monkeypatch.setattr("holdfast.runs.checkpoints.STORE_TAKES", 0.3)
    with Held(tmp_path / "store") as store:
        files = {"adapter_model.safetensors": store.put_blob([b"weights"])}
        kept, orphan = (manifest_of(files, name=None, seq=seq) for seq in (1, 2))
        for manifest in (kept, orphan):
            store.publish(manifest)
        await catalog.write(lambda c: _add_run_with_snapshot(c, kept.id))
        checkpoints = Checkpoints(store, catalog)
        discarding = asyncio.create_task(checkpoints.discard_orphans())
        assert await asyncio.to_thread(store.begun.wait, 10.0)
        await asyncio.sleep(0.5)
        with pytest.raises(RunError, match="has not answered"):
            await checkpoints.publish(orphan)
        store.go_on.set()
        assert await discarding == 1
        await checkpoints.publish(orphan)
        assert {id for id, _ in store.unnamed()} == {kept.id, orphan.id}


@pytest.mark.anyio
async def test_what_another_server_keeps_in_the_same_storage_is_left_to_it(tmp_path: Path) -> None:
    """Starting, sweeping and repairing with another catalog lets go of nothing of its runs."""
    theirs = Catalog.open_file(tmp_path / "theirs.db")
    ours = Catalog.open_file(tmp_path / "ours.db")
    segments = Segments(tmp_path / "segments")
    storage = Storage()
    with ObjectStore(MemoryObjects(storage)) as store, ObjectStore(MemoryObjects(storage)) as other:
        checkpoints = Checkpoints(store, theirs)
        files = {"adapter_model.safetensors": store.put_blob([b"weights"])}
        older = await checkpoints.publish(manifest_of(files, name=None, seq=1))
        newer = await checkpoints.publish(manifest_of(files, name=None, seq=2))
        await theirs.write(lambda c: _add_run_with_snapshot(c, newer))

        assert await Checkpoints(other, ours).discard_orphans() == 0
        found = await doctor.examine(other, ours, segments, alone=True)
        assert found.ok and found.repairable
        assert list(found.lost_runs) == ["3f0c:train:0"]
        repaired = await doctor.repair(other, ours)
        assert [key.name for key in repaired.named] == ["auto.2"]
        found = await doctor.examine(other, ours, segments, alone=True)
        assert found.ok and not found.repairable

        assert {id for id, _ in store.unnamed()} == {older, newer}
        assert (await doctor.examine(store, theirs, segments)).lost_recovery_points == {}
    theirs.close()
    ours.close()


def _add_run_with_snapshot(connection: sa.Connection, manifest_id: str) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO runs (id, generation, session_id, owner, created, last_request, state,"
            " body_hash, corrupted) VALUES ('3f0c:train:0', 0, 's', 'o', 1, 1, 'live', '', false)"
        )
    )
    connection.execute(
        snapshots.insert().values(
            run_id="3f0c:train:0", generation=0, seq=1, manifest=manifest_id, created=1.0
        )
    )
