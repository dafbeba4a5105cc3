"""What a server does while doctor looks is no problem; what a crash has left is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, database
from holdfast.catalog.tables import checkpoints as rows
from holdfast.catalog.tables import runs
from holdfast.runs import doctor, journal, stored
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.doctor import Diagnosis
from holdfast.runs.journal import RunKey
from holdfast.runs.order import Entry
from holdfast.runs.segments import Place, Segments
from holdfast.store import LocalStore, Manifest, NameKey
from holdfast.store.base import OnDamage
from tests.store.samples import WEIGHTS, key_of, manifest_of

Step = Callable[[Checkpoints, Catalog, Manifest], Awaitable[object]]


class Watched(LocalStore):
    """A store in which something happens between looks: after each list of its names."""

    after_list: list[Callable[[], Awaitable[object]]]
    lists = 0

    def names(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[NameKey, str]]:
        found = list(super().names(run, on_damage=on_damage))
        self.lists += 1
        if self.after_list:
            asyncio.run(_awaited(self.after_list.pop(0)))
        return iter(found)


async def _awaited(step: Callable[[], Awaitable[object]]) -> None:
    await step()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Watched]:
    with Watched(tmp_path / "store") as store:
        store.after_list = []
        yield store


def sample(store: LocalStore, **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([b"weights"])}, **changes)


async def examined(store: LocalStore, catalog: Catalog, tmp_path: Path) -> Diagnosis:
    return await doctor.examine(store, catalog, Segments(tmp_path / "segments"))


async def published(checkpoints: Checkpoints, catalog: Catalog, manifest: Manifest) -> None:
    await checkpoints.publish(manifest)
    await catalog.write(lambda c: stored.insert_missing(c, manifest))


async def nothing(_checkpoints: Checkpoints, _catalog: Catalog, _manifest: Manifest) -> None: ...


async def named(checkpoints: Checkpoints, _catalog: Catalog, manifest: Manifest) -> None:
    """The first half of publishing."""
    checkpoints.store.set_name(key_of(manifest), checkpoints.store.publish(manifest))


async def unnamed(checkpoints: Checkpoints, _catalog: Catalog, manifest: Manifest) -> None:
    """The first half of a deletion."""
    checkpoints.store.delete_name(key_of(manifest))


async def deleted(checkpoints: Checkpoints, _catalog: Catalog, manifest: Manifest) -> None:
    await checkpoints.delete(key_of(manifest), manifest.owner)


async def made_public(checkpoints: Checkpoints, _catalog: Catalog, manifest: Manifest) -> None:
    await checkpoints.set_public(key_of(manifest), manifest.owner, True)


async def reconciled(checkpoints: Checkpoints, _catalog: Catalog, _manifest: Manifest) -> None:
    """The second half of whatever was begun."""
    await checkpoints.reconcile()


LATER: list[Step] = [nothing, nothing, reconciled]
WORK: dict[str, tuple[list[Step], list[Step]]] = {
    "a publish": ([], [published]),
    "a publish that has begun": ([named], LATER),
    "a deletion": ([published], [deleted]),
    "a deletion that has begun": ([published, unnamed], LATER),
    "a change": ([published], [made_public]),
}
"""What is done before doctor looks, and then between two looks each."""


@pytest.mark.anyio
@pytest.mark.parametrize("what", WORK)
async def test_work_under_way_is_no_problem(
    catalog: Catalog, store: Watched, tmp_path: Path, what: str
) -> None:
    before, between = WORK[what]
    manifest = sample(store)
    parts = Checkpoints(store, catalog), catalog, manifest
    await published(parts[0], catalog, sample(store, name="other"))
    for step in before:
        await step(*parts)
    store.after_list = [partial(step, *parts) for step in between]
    began = time.monotonic()
    found = await examined(store, catalog, tmp_path)
    assert found.ok, found
    assert not store.after_list and store.lists >= 2
    assert time.monotonic() - began < doctor.STANDS


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("before", "crash", "kind"),
    [(nothing, named, "unlisted"), (published, unnamed, "gone"), (nothing, named, "without_run")],
)
async def test_what_a_crash_has_left_is_one(
    catalog: Catalog,
    store: Watched,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Step,
    crash: Step,
    kind: str,
) -> None:
    monkeypatch.setattr(doctor, "STANDS", 0.1)
    manifest = sample(store)
    parts = Checkpoints(store, catalog), catalog, manifest
    await before(*parts)
    await crash(*parts)
    found = await examined(store, catalog, tmp_path)
    assert not found.ok
    left = manifest.run if kind == "without_run" else key_of(manifest)
    assert list(getattr(found.differences, kind)) == [left]


@pytest.mark.anyio
async def test_who_is_alone_does_not_look_twice(
    catalog: Catalog, store: Watched, tmp_path: Path
) -> None:
    await named(Checkpoints(store, catalog), catalog, sample(store))
    segments = Segments(tmp_path / "segments")
    found = await doctor.examine(store, catalog, segments, alone=True)
    assert len(found.differences.unlisted) == 1
    assert store.lists == 2  # the other list is for what the names lead to


async def after_an_upgrade(catalog: Catalog, **others: object) -> None:
    """Have the rows of checkpoints lack what an older version did not write."""
    await catalog.write(lambda c: c.execute(rows.update().values(seq=None, **others)))


@pytest.mark.anyio
@pytest.mark.parametrize("is_other", [False, True])
async def test_a_row_of_before_an_upgrade_is_no_problem(
    catalog: Catalog, store: Watched, tmp_path: Path, is_other: bool
) -> None:
    """One that is of another manifest besides is."""
    checkpoints, manifest = Checkpoints(store, catalog), sample(store)
    await published(checkpoints, catalog, manifest)
    await after_an_upgrade(catalog, manifest="other" if is_other else manifest.id)
    segments = Segments(tmp_path / "segments")
    found = await doctor.examine(store, catalog, segments, alone=True)
    assert found.ok is (not found.repairable) is (not is_other)
    assert list(found.differences.unlisted) == [key_of(manifest)] * is_other
    assert await checkpoints.reconcile() == (1, 0)
    assert await checkpoints.reconcile() == (0, 0)


@pytest.mark.anyio
async def test_a_damaged_manifest_of_before_an_upgrade_is_reported_once(
    catalog: Catalog, store: Watched, tmp_path: Path
) -> None:
    checkpoints, manifest = Checkpoints(store, catalog), sample(store)
    await published(checkpoints, catalog, manifest)
    await after_an_upgrade(catalog)
    path = tmp_path / "store" / "manifests" / manifest.id
    path.write_bytes(path.read_bytes()[:-1])
    assert await checkpoints.reconcile() == (0, 0)
    segments = Segments(tmp_path / "segments")
    found = await doctor.examine(store, catalog, segments, alone=True)
    assert len(found.damage) == 1 and not found.differences


class Ending(LocalStore):
    """A store in which a run ends just before its recovery point is looked for."""

    at_the_end: list[Callable[[], Awaitable[object]]]
    is_watched = False

    def unnamed(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[str, Manifest]]:
        found = list(super().unnamed(run, on_damage=on_damage))
        self.is_watched = True  # this is what doctor does before
        return iter(found)

    def read_manifest(self, manifest_id: str) -> Manifest:
        if self.is_watched and self.at_the_end:
            asyncio.run(_awaited(self.at_the_end.pop()))
        return super().read_manifest(manifest_id)


@pytest.mark.anyio
@pytest.mark.parametrize("lets_go", [True, False])
async def test_a_recovery_point_of_a_run_that_ends_meanwhile_is_not_missed(
    catalog: Catalog, tmp_path: Path, lets_go: bool
) -> None:
    """A row without its manifest would be."""
    with Ending(tmp_path / "store") as store:
        store.at_the_end = []
        checkpoints = Checkpoints(store, catalog)
        manifest_id = await checkpoints.publish(sample(store, name=None))
        key = RunKey(sample(store).run, 0)

        def live(connection: sa.Connection) -> None:
            stored.insert(connection, sample(store))
            connection.execute(runs.update().values(state="live"))
            journal.add_snapshot(connection, key, 1, manifest_id, now=1.0)

        await catalog.write(live)

        async def end() -> None:
            if lets_go:
                await catalog.write(lambda c: journal.close(c, key, now=1.0))
            await checkpoints.discard([manifest_id])
            manifests = tmp_path / "store" / "manifests"
            (manifests / manifest_id).unlink()  # as a sweep does

        steps = store.at_the_end
        steps.append(end)
        found = await examined(store, catalog, tmp_path)
        assert not steps
        assert found.lost_recovery_points == ({} if lets_go else {key.id: manifest_id})
        assert found.ok == lets_go


class Slow(Segments):
    """Segments on a disk that takes its time."""

    def read(self, place: Place, size: int) -> bytes:
        time.sleep(0.1)
        return super().read(place, size)


@pytest.mark.anyio
async def test_a_journal_may_take_longer_to_read_than_one_read_may(
    catalog: Catalog, store: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = Slow(tmp_path / "segments", above=0)
    catalog.before_commit(segments.sync)
    key = RunKey("run", 0)

    def add(connection: sa.Connection) -> None:
        stored.insert(connection, sample(store, run=key.id))
        for seq in range(1, 13):
            entry = Entry(seq, "forward", journal.digest(b"body"))
            journal.add(connection, segments, key, entry, now=1.0, body=b"body")

    await catalog.write(add)
    (segment,) = (tmp_path / "segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(database, "READ_TAKES", 1.0)
    found = await doctor.examine(store, catalog, segments, alone=True)
    assert len(found.journal_damage) == 1
    segments.close()
