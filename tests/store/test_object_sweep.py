"""What a sweep of an object storage removes, when, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast.store import Missing, MissingBlob, ObjectStore, SweepReport
from holdfast.store.bucket import name_key
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects
from tests.store.swept import HOUR, StoredSwept


@pytest.fixture
def swept() -> StoredSwept:
    return StoredSwept()


def call_before_each(store: ObjectStore, calling: Callable[[str, str], None]) -> None:
    """From now on, before each call to the storage."""
    objects = store._objects
    assert isinstance(objects, MemoryObjects)
    objects.calling = calling


def test_an_expired_name_can_be_used_again(swept: StoredSwept) -> None:
    """Its object stays, without content, since deleting it could meet the next one of that name."""
    manifest = swept.save(b"x", expires=swept.clock.wall - 1)
    swept.sweep(0.0, HOUR, *[70.0] * 6)
    assert swept.files() == {name_key(key_of(manifest))}
    assert swept.store.delete_name(key_of(manifest)) is False
    again = swept.save(b"again")
    assert list(swept.store.names()) == [(key_of(again), again.id)]


def test_a_pinned_manifest_stays_while_its_holder_lives(swept: StoredSwept) -> None:
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
        assert swept.content() == set()
        holder.beat()
    assert swept.content() == set()
    holder.close()


def test_what_a_dead_process_has_not_ended_goes_after_an_hour(swept: StoredSwept) -> None:
    """At whichever call of a save it died."""
    kept = swept.save(b"kept")
    for dying_at in range(100):
        calls = iter(range(dying_at))

        def calling(name: str, key: str, calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        other = swept.open()
        call_before_each(other, calling)
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


def test_who_comes_back_late_is_refused_or_begins_anew(swept: StoredSwept) -> None:
    """A save that stands still for hours at any of its calls is whole in the end, or has failed."""
    for stands_at in range(100):
        count = 0

        def calling(name: str, key: str) -> None:
            nonlocal count
            count += 1
            if count == stands_at:  # noqa: B023
                swept.sweep(0.0, *[HOUR] * 8)

        other = swept.open()
        call_before_each(other, calling)
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


def test_of_two_servers_one_sweeps_and_the_other_takes_over(swept: StoredSwept) -> None:
    other = swept.open()
    swept.store.put_blob([b"x"])
    for _ in range(70):
        assert swept.sweep(60.0).damaged == ()
        assert swept.sweep(0.0, store=other) == SweepReport()
    assert swept.content() == set()
    swept.store.put_blob([b"y"])
    swept.sweep(60.0)
    # Now only the other one is there: it waits for ten minutes, and goes on from what is noted.
    for _ in range(80):
        swept.sweep(60.0, store=other)
    assert swept.content() == set()


@pytest.mark.parametrize("damaged", ["names", "manifests"])
def test_damage_keeps_what_it_may_refer_to(swept: StoredSwept, damaged: str) -> None:
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


def test_a_copy_that_goes_while_it_is_read_gives_way_to_another(swept: StoredSwept) -> None:
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
    with pytest.raises(MissingBlob, match=r"weights is missing: .* was removed meanwhile"):
        list(pieces)
