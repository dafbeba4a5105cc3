"""What a sweep removes, when, and what it leaves alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from holdfast.store import Blob, LocalStore, MissingBlob, NameTaken, SweepReport
from holdfast.store.aging import Ages
from holdfast.store.files import LocalFiles
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.swept import HOUR, LocalSwept, StoredSwept, Swept


@pytest.fixture
def swept(tmp_path: Path) -> LocalSwept:
    return LocalSwept(tmp_path / "store")


@pytest.fixture(params=["local disk", "object storage"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Swept[Any]:
    """The same is asked of both."""
    return LocalSwept(tmp_path / "store") if request.param == "local disk" else StoredSwept()


def test_what_is_referred_to_stays(either: Swept[Any]) -> None:
    either.save(b"named")
    either.save(b"snapshot", name=None)
    files = either.files()
    assert len(files) == 5
    assert either.sweep(*[HOUR] * 5) == SweepReport()
    assert either.files() == files


def test_an_overwritten_checkpoint_goes_within_minutes(either: Swept[Any]) -> None:
    either.save(b"old")
    either.sweep(0.0)
    kept = either.save(b"new")
    reports = [either.sweep(70.0) for _ in range(5)]
    assert sum(report.manifests for report in reports) == 1
    assert sum(report.blobs for report in reports) == 1
    assert sum(report.size for report in reports) == 3
    assert either.store.read_blob(kept.files[WEIGHTS], what="x") == b"new"
    assert len(either.files()) == 3


def test_a_discarded_snapshot_goes_and_what_it_shares_stays(swept: LocalSwept) -> None:
    snapshot = swept.save(b"shared", name=None)
    kept = swept.save(b"shared")
    swept.store.discard(snapshot.id)
    swept.sweep(*[70.0] * 5)
    assert swept.store.read_blob(kept.files[WEIGHTS], what="x") == b"shared"
    assert swept.files() == {
        f"blobs/{kept.files[WEIGHTS].hash}",
        f"manifests/{kept.id}",
        "names/3f0c%3atrain%3a0@weights@final",
    }


def test_a_blob_that_waits_for_its_manifest_stays_for_an_hour(either: Swept[Any]) -> None:
    blob = either.store.put_blob([b"slow save"])
    either.sweep(0.0, *[300.0] * 11)
    manifest = manifest_of({WEIGHTS: blob}, name=None)
    either.store.publish(manifest)
    either.sweep(*[300.0] * 30)
    assert either.store.read_blob(blob, what="x") == b"slow save"


def test_a_blob_that_nobody_published_goes_after_an_hour(either: Swept[Any]) -> None:
    blob = either.store.put_blob([b"lost save"])
    either.sweep(0.0, *[300.0] * 11)
    assert either.store.has_blob(blob)
    either.sweep(*[300.0] * 3)
    assert either.files() == set()
    with pytest.raises(MissingBlob):
        either.store.publish(manifest_of({WEIGHTS: blob}))


def test_a_save_is_not_disturbed_by_another_one_of_the_same_content(either: Swept[Any]) -> None:
    blob = either.store.put_blob([b"same"])
    either.store.discard(either.save(b"same", name=None).id)
    either.sweep(*[70.0] * 9)
    either.store.publish(manifest_of({WEIGHTS: blob}, name=None))
    assert either.store.verify().ok


def test_a_name_that_is_set_again_starts_its_time_anew(swept: LocalSwept) -> None:
    swept.save(b"first", expires=swept.clock.wall - 1)
    swept.sweep(0.0, HOUR - 1)
    manifest = swept.save(b"second", expires=swept.clock.wall - 1)
    assert swept.sweep(1.0, HOUR - 1).names == ()
    assert swept.sweep(1.0).names == (key_of(manifest),)


class Interrupted(LocalFiles):
    """Something happens between a sweep's look at the store and its lock."""

    def __init__(self) -> None:
        self.between: Callable[[], object] = lambda: None

    def lock(self, path: str, *, exclusive: bool) -> AbstractContextManager[object]:
        if exclusive and path.endswith("sweep.lock"):
            self.between()
        return super().lock(path, exclusive=exclusive)


def test_what_is_used_at_the_last_moment_stays(swept: LocalSwept) -> None:
    blob = swept.store.put_blob([b"x"])
    swept.sweep(0.0, HOUR, 0.0)
    assert swept.files() == {f"blobs/{blob.hash}"}
    named, snapshot = manifest_of({WEIGHTS: blob}), manifest_of({WEIGHTS: blob}, name=None)
    other = swept.store
    files = Interrupted()
    swept.store = LocalStore(swept.root, files=files, monotonic=lambda: swept.clock.monotonic)
    swept.sweep(0.0)
    files.between = lambda: other.publish(snapshot)
    assert swept.sweep(70.0).blobs == 0
    swept.store.publish(named)
    swept.sweep(HOUR)
    for entry in (swept.root / "fresh").iterdir():
        entry.unlink()
    files.between = lambda: None
    swept.sweep(0.0)
    files.between = lambda: other.set_name(key_of(named), named.id)
    assert swept.sweep(70.0).manifests == 0
    assert swept.store.verify().ok
    assert swept.store.resolve(key_of(named)) == named.id


def test_a_published_manifest_may_get_its_name_later(either: Swept[Any]) -> None:
    manifest = manifest_of({WEIGHTS: either.store.put_blob([b"x"])})
    either.store.publish(manifest)
    either.sweep(*[300.0] * 12)
    either.store.set_name(key_of(manifest), manifest.id)
    either.sweep(*[300.0] * 30)
    assert either.store.verify().ok
    assert either.store.resolve(key_of(manifest)) == manifest.id


def test_an_expired_name_is_hidden_at_once_and_goes_an_hour_later(either: Swept[Any]) -> None:
    manifest = either.save(b"x", expires=either.clock.wall + 10)
    key = key_of(manifest)
    either.clock.wall += 10
    assert either.store.resolve(key) is None
    assert list(either.store.names()) == []
    assert either.sweep(HOUR, HOUR - 1).names == ()
    assert either.store.read_manifest(manifest.id) == manifest
    assert either.sweep(1.0).names == (key,)
    either.clock.wall -= 20
    assert either.store.resolve(key) is None
    either.sweep(*[70.0] * 6)
    assert either.content() == set()


def test_the_name_of_an_expired_checkpoint_is_free(either: Swept[Any]) -> None:
    manifest = either.save(b"x", expires=either.clock.wall + 10)
    other = manifest_of({}, seq=99)
    either.store.publish(other)
    with pytest.raises(NameTaken):
        either.store.set_name(key_of(other), other.id)
    either.clock.wall += 10
    either.store.set_name(key_of(other), other.id)
    assert either.store.resolve(key_of(manifest)) == other.id


@pytest.mark.parametrize("jump", [1e3, 1e9])
def test_a_clock_that_jumps_ahead_for_a_while_removes_nothing(
    either: Swept[Any], jump: float
) -> None:
    manifest = either.save(b"x", expires=either.clock.wall + 500)
    either.clock.wall += jump
    assert either.sweep(HOUR, HOUR - 5).waiting == 1
    either.clock.wall -= jump
    assert either.sweep(10.0, HOUR).waiting == 0
    either.clock.wall += jump
    assert either.sweep(10.0, HOUR - 5).names == ()
    either.clock.wall -= jump
    assert either.store.resolve(key_of(manifest)) == manifest.id
    assert either.store.verify(manifest.id).ok


def test_only_time_between_sweeps_of_the_same_process_counts(swept: LocalSwept) -> None:
    blob = swept.store.put_blob([b"x"])
    swept.sweep(0.0)
    for _ in range(5):
        swept.store = swept.open()  # as after a restart
        swept.sweep(10 * HOUR)
    assert swept.store.has_blob(blob)
    swept.sweep(HOUR / 2)
    swept.store = swept.open()
    swept.sweep(HOUR, HOUR / 2, 70.0, 70.0)
    assert not swept.store.has_blob(blob)


def test_a_damaged_note_of_earlier_sweeps_only_delays(either: Swept[Any]) -> None:
    either.store.put_blob([b"x"])
    either.sweep(0.0, HOUR - 1)
    for damage in (b"", b"{}", b"\xff" * 100, Ages().encode()[:-3]):
        either.spoil_note(damage)
        assert either.sweep(10.0).waiting == 1
    either.sweep(HOUR, 70.0, 70.0)
    assert either.files() == set()


def test_a_damaged_name_keeps_every_manifest(swept: LocalSwept) -> None:
    first, second = swept.save(b"1"), swept.save(b"2")
    path = swept.root / "names" / "3f0c%3atrain%3a0@weights@final"
    record = path.read_bytes()
    path.write_bytes(record[:-1])
    report = swept.sweep(*[HOUR] * 5)
    assert report.damaged == (str(path),)
    assert report.manifests == 0
    assert swept.store.read_manifest(first.id) == first
    path.write_bytes(record)
    swept.sweep(*[HOUR] * 5)
    assert {m for m in swept.files() if m.startswith("manifests/")} == {f"manifests/{second.id}"}


def test_a_damaged_manifest_keeps_every_blob(swept: LocalSwept) -> None:
    manifest = swept.save(b"1")
    path = swept.root / "manifests" / manifest.id
    path.write_bytes(path.read_bytes()[:-1])
    swept.store.discard(swept.save(b"2", name=None).id)
    # A process that has not read the manifest before it was damaged.
    swept.store = swept.open()
    report = swept.sweep(*[HOUR] * 5)
    assert report.damaged == (str(path),)
    assert len([f for f in swept.files() if f.startswith("blobs/")]) == 2


def test_debris_of_killed_processes_goes(swept: LocalSwept) -> None:
    for name in ("tmp/0", "pins/" + "0" * 64 + ".1", "fresh/" + "0" * 64 + ".1"):
        (swept.root / name).write_bytes(b"")
    swept.sweep(*[HOUR] * 3)
    assert swept.files() == set()


def test_a_file_being_written_is_left_alone(either: Swept[Any]) -> None:
    def parts() -> Iterator[bytes]:
        yield b"first"
        either.sweep(*[HOUR] * 5)
        yield b" second"

    blob = either.store.put_blob(parts())
    assert either.store.read_blob(blob, what="x") == b"first second"


def test_a_pinned_manifest_stays_until_it_is_released(swept: LocalSwept) -> None:
    manifest = swept.save(b"x")
    with swept.store.pin(manifest.id) as pinned:
        assert pinned == manifest
        swept.store.delete_name(key_of(manifest))
        swept.sweep(*[HOUR] * 5)
        assert swept.store.read_blob(manifest.files[WEIGHTS], what="x") == b"x"
    swept.sweep(*[HOUR] * 5)
    assert swept.files() == set()


def _hold_pin(root: Path, manifest_id: str, pipe: Connection) -> None:
    with LocalStore(root).pin(manifest_id):
        pipe.send("pinned")
        pipe.recv()


def test_a_pin_of_another_process_holds_and_ends_with_it(swept: LocalSwept) -> None:
    manifest = swept.save(b"x")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=_hold_pin, args=(swept.root, manifest.id, theirs))
    other.start()
    try:
        assert ours.poll(60) and ours.recv() == "pinned"
        swept.store.delete_name(key_of(manifest))
        swept.sweep(*[HOUR] * 5)
        assert swept.store.verify(manifest.id).ok
    finally:
        other.kill()
        other.join()
    swept.sweep(*[HOUR] * 5)
    assert swept.files() == set()


def test_a_hash_that_was_never_put_is_missing(either: Swept[Any]) -> None:
    with pytest.raises(MissingBlob):
        either.store.read_blob(Blob("1" * 64, 1), what="x")


def test_a_pinned_snapshot_stays_when_it_is_discarded(swept: LocalSwept) -> None:
    snapshot = swept.save(b"x", name=None)
    with swept.store.pin(snapshot.id):
        assert swept.store.discard(snapshot.id)
        assert list(swept.store.unnamed()) == []
        swept.sweep(*[HOUR] * 5)
        assert swept.store.verify(snapshot.id).ok
    swept.sweep(*[HOUR] * 5)
    assert swept.files() == set()
