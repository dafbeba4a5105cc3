"""What a sweep of an object storage removes, when, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast.store import Manifest, Missing, MissingBlob, ObjectStore, SweepReport
from holdfast.store.bucket import name_key
from holdfast.store.objects import Writer
from tests.store.model import Clock
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

HOUR = 3600.0


class Swept:
    """A store whose clocks are moved by hand."""

    def __init__(self) -> None:
        self.storage = Storage()
        self.clock = Clock()
        self.store = self.open()

    def open(self, calling: Callable[[str, str], None] | None = None) -> ObjectStore:
        objects = MemoryObjects(self.storage, calling or (lambda name, key: None))
        return ObjectStore(
            objects,
            writer=Writer(objects, lambda tried: None),
            wall=lambda: self.clock.wall,
            monotonic=lambda: self.clock.monotonic,
        )

    def sweep(self, *after: float, store: ObjectStore | None = None) -> SweepReport:
        """Sweep once after each of these times; the last report."""
        report = SweepReport()
        for seconds in after:
            self.clock.monotonic += seconds
            report = (store or self.store).sweep()
        return report

    def save(self, content: bytes, name: str | None = "final", **changes: object) -> Manifest:
        manifest = manifest_of({WEIGHTS: self.store.put_blob([content])}, name=name, **changes)
        self.store.publish(manifest)
        if name is not None:
            self.store.set_name(key_of(manifest), manifest.id, replace=True)
        return manifest

    def there(self, *directories: str) -> list[str]:
        """Keys of the objects in these directories."""
        return [key for key in self.storage.objects if key.partition("/")[0] in directories]

    def content(self) -> list[str]:
        return self.there("blobs", "manifests", "doomed", "pins")


@pytest.fixture
def swept() -> Swept:
    return Swept()


def test_what_is_referred_to_stays(swept: Swept) -> None:
    swept.save(b"named")
    swept.save(b"snapshot", name=None)
    content = swept.content()
    assert len(content) == 4
    assert swept.sweep(*[HOUR] * 5) == SweepReport()
    assert swept.content() == content


def test_an_overwritten_checkpoint_goes_within_minutes(swept: Swept) -> None:
    swept.save(b"old")
    swept.sweep(0.0)
    kept = swept.save(b"new")
    reports = [swept.sweep(70.0) for _ in range(5)]
    assert sum(report.manifests for report in reports) == 1
    assert sum(report.blobs for report in reports) == 1
    assert sum(report.size for report in reports) == 3
    assert swept.store.read_blob(kept.files[WEIGHTS], what="x") == b"new"
    assert len(swept.content()) == 2


def test_a_blob_that_nobody_published_goes_after_an_hour(swept: Swept) -> None:
    blob = swept.store.put_blob([b"lost save"])
    swept.sweep(0.0, *[300.0] * 11)
    assert swept.store.has_blob(blob)
    swept.sweep(*[300.0] * 3)
    assert swept.content() == []
    with pytest.raises(MissingBlob):
        swept.store.publish(manifest_of({WEIGHTS: blob}))


def test_a_save_is_not_disturbed_by_another_one_of_the_same_content(swept: Swept) -> None:
    blob = swept.store.put_blob([b"same"])
    swept.store.discard(swept.save(b"same", name=None).id)
    swept.sweep(0.0, *[70.0] * 9)
    swept.store.publish(manifest_of({WEIGHTS: blob}, name=None))
    assert swept.store.verify().ok


def test_an_expired_name_is_hidden_at_once_and_goes_an_hour_later(swept: Swept) -> None:
    manifest = swept.save(b"x", expires=swept.clock.wall + 10)
    key = key_of(manifest)
    swept.clock.wall += 10
    assert swept.store.resolve(key) is None
    assert list(swept.store.names()) == []
    assert swept.sweep(HOUR, HOUR - 1).names == ()
    assert swept.store.read_manifest(manifest.id) == manifest
    assert swept.sweep(1.0).names == (key,)
    assert swept.sweep(70.0).names == ()
    swept.clock.wall -= 20
    assert swept.store.resolve(key) is None
    swept.sweep(*[70.0] * 5)
    assert swept.content() == []
    again = swept.save(b"again")
    assert swept.store.resolve(key) == again.id


@pytest.mark.parametrize("jump", [1e3, 1e9])
def test_a_clock_that_jumps_ahead_for_a_while_removes_nothing(swept: Swept, jump: float) -> None:
    manifest = swept.save(b"x", expires=swept.clock.wall + 500)
    swept.clock.wall += jump
    assert swept.sweep(HOUR, HOUR - 5).waiting == 1
    swept.clock.wall -= jump
    assert swept.sweep(10.0, HOUR).waiting == 0
    swept.clock.wall += jump
    assert swept.sweep(10.0, HOUR - 5).names == ()
    swept.clock.wall -= jump
    assert swept.store.resolve(key_of(manifest)) == manifest.id
    assert swept.store.verify(manifest.id).ok


def test_a_pinned_manifest_stays_while_its_holder_lives(swept: Swept) -> None:
    manifest = swept.save(b"x")
    holder = swept.open()
    with holder.pin(manifest.id):
        swept.store.delete_name(key_of(manifest))
        for _ in range(10):
            holder.beat()
            swept.sweep(HOUR / 2)
        assert swept.store.read_blob(manifest.files[WEIGHTS], what="x") == b"x"
        # Now it stands still, or its machine is gone.
        swept.sweep(*[HOUR / 2] * 8)
        assert swept.content() == []
        holder.beat()
    assert swept.content() == []
    holder.close()


def test_what_a_dead_process_has_not_ended_goes_after_an_hour(swept: Swept) -> None:
    """At whichever call of a save it died."""
    kept = swept.save(b"kept")
    for dying_at in range(100):
        calls = iter(range(dying_at))

        def calling(name: str, key: str, calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        other = swept.open()
        other._objects.calling = calling  # type: ignore[attr-defined]
        try:
            manifest = manifest_of({WEIGHTS: other.put_blob([b"other"])}, name="other")
            other.set_name(key_of(manifest), other.publish(manifest))
        except KeyboardInterrupt:
            swept.sweep(0.0, *[HOUR] * 8)
            swept.store.delete_name(key_of(manifest_of({}, name="other")))
            swept.sweep(*[HOUR] * 8)
            assert len(swept.content()) == 2
            assert swept.store.resolve(key_of(kept)) == kept.id
        else:
            assert dying_at > 8
            return
    raise AssertionError


def test_who_comes_back_late_is_refused_or_begins_anew(swept: Swept) -> None:
    """A save that stands still for hours at any of its calls is whole in the end, or has failed."""
    for stands_at in range(100):
        count = 0

        def calling(name: str, key: str) -> None:
            nonlocal count
            count += 1
            if count == stands_at:  # noqa: B023
                swept.sweep(0.0, *[HOUR] * 8)

        other = swept.open()
        other._objects.calling = calling  # type: ignore[attr-defined]
        manifest = manifest_of({WEIGHTS: other.put_blob([b"other"])}, seq=stands_at)
        try:
            other.set_name(key_of(manifest), other.publish(manifest), replace=True)
        except Missing:
            continue
        assert swept.store.resolve(key_of(manifest)) == manifest.id
        assert swept.store.read_blob(manifest.files[WEIGHTS], what="x") == b"other"
        assert swept.store.verify().ok
        if count < stands_at:
            return
    raise AssertionError


def test_of_two_servers_one_sweeps_and_the_other_takes_over(swept: Swept) -> None:
    other = swept.open()
    swept.store.put_blob([b"x"])
    for _ in range(70):
        assert swept.sweep(60.0).damaged == ()
        assert swept.sweep(0.0, store=other) == SweepReport()
    assert swept.content() == []
    swept.store.put_blob([b"y"])
    swept.sweep(60.0)
    # Now only the other one is there: it waits for ten minutes, and goes on from what is noted.
    for _ in range(80):
        swept.sweep(60.0, store=other)
    assert swept.content() == []


def test_a_damaged_note_of_earlier_sweeps_only_delays(swept: Swept) -> None:
    swept.store.put_blob([b"x"])
    swept.sweep(0.0, HOUR - 1)
    swept.storage.put("sweep.json", b"{}")
    assert swept.sweep(10.0).waiting == 1
    swept.sweep(HOUR, 70.0, 70.0)
    assert swept.content() == []


@pytest.mark.parametrize("damaged", ["names", "manifests"])
def test_damage_keeps_what_it_may_refer_to(swept: Swept, damaged: str) -> None:
    first = swept.save(b"1")
    swept.save(b"2")
    key = name_key(key_of(first)) if damaged == "names" else swept.there("manifests")[1]
    data, _ = swept.storage.objects[key]
    swept.storage.put(key, data[:-1])
    swept.store = swept.open()
    blobs = swept.there("blobs")
    report = swept.sweep(*[HOUR] * 8)
    assert report.damaged == (f"mem://bucket/prefix/{key}",)
    assert swept.there("blobs") == blobs
    swept.storage.put(key, data)
    swept.sweep(*[HOUR] * 8)
    assert len(swept.there("blobs")) == 1


def test_a_copy_that_goes_while_it_is_read_gives_way_to_another(swept: Swept) -> None:
    content = bytes(5 << 20)
    kept = swept.save(content)
    blob = swept.store.put_blob([content])
    assert blob == kept.files[WEIGHTS]
    newest = swept.there("blobs")[1]
    pieces = swept.store.stream_blob(blob, what="weights")
    read = next(pieces)
    del swept.storage.objects[newest]
    assert read + b"".join(pieces) == content
    pieces = swept.store.stream_blob(blob, what="weights")
    next(pieces)
    swept.storage.objects.clear()
    with pytest.raises(MissingBlob, match="weights is missing: it was removed meanwhile"):
        list(pieces)
