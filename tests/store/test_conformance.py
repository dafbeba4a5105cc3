"""What the public calls promise, wherever a store keeps its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from holdfast.store import (
    Blob,
    CorruptBlob,
    CorruptName,
    InvalidValue,
    LocalStore,
    Manifest,
    MissingBlob,
    MissingManifest,
    MissingName,
    NameKey,
    NameTaken,
    NotAStore,
    ObjectStore,
    Store,
    UnsupportedFormat,
    open_store,
)
from holdfast.store.records import file_name
from tests.store.crash import Disk, Process
from tests.store.model import Clock, open_on
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage


@pytest.fixture(params=["local disk", "crashing disk", "storage in memory", "S3 server"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Two processes' ways to a store of each kind: the same is asked of all."""
    opened: Callable[[], Store]
    if request.param == "local disk":
        opened = partial(LocalStore, tmp_path / "store")
    elif request.param == "crashing disk":
        disk = Disk()
        opened = lambda: open_on(Process(disk), Clock())  # noqa: E731
    elif request.param == "storage in memory":
        storage = Storage()
        opened = lambda: ObjectStore(MemoryObjects(storage))  # noqa: E731
    else:
        server = request.getfixturevalue("s3")
        opened = partial(open_store, f"s3://{server.bucket()}/some/prefix")
    with opened() as one, opened() as other:
        yield one, other


@pytest.fixture
def store(stores: tuple[Store, Store]) -> Store:
    return stores[0]


def made(store: Store, content: bytes = b"weights", **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([content])}, **changes)


def test_what_was_put_is_read_back_in_full(store: Store) -> None:
    parts: list[bytes | memoryview] = [b"a" * 3, memoryview(b"b" * 5_000_000), b""]
    blob = store.put_blob(parts)
    assert blob.size == 5_000_003
    assert store.has_blob(blob)
    assert store.read_blob(blob, what="x") == b"".join(parts)
    buffer = bytearray(blob.size)
    store.read_blob_into(blob, memoryview(buffer), what="x")
    assert buffer == b"".join(parts)
    with pytest.raises(InvalidValue, match="5000003 bytes, the buffer 3"):
        store.read_blob_into(blob, memoryview(bytearray(3)), what="x")


def test_each_piece_that_moves_is_told(store: Store) -> None:
    moved: list[None] = []
    store.while_moving(lambda: moved.append(None))
    size = 24 << 20
    blob = store.put_blob([bytes(size)])
    written = len(moved)
    assert written > 5
    store.read_blob(blob, what="x")
    assert len(moved) - written > 5
    moved.clear()
    store.publish(manifest_of({WEIGHTS: blob}))
    assert store.has_blob(blob) and moved == []


def test_a_missing_blob_is_named(store: Store) -> None:
    blob = Blob("0" * 64, 3)
    assert not store.has_blob(blob)
    with pytest.raises(MissingBlob, match=r"weights of final is missing.*0000"):
        store.read_blob(blob, what="weights of final")


def test_putting_content_again_repairs_a_damaged_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    blob = store.put_blob([b"content"])
    path = tmp_path / "store" / "blobs" / blob.hash
    path.write_bytes(b"c0ntent")
    with pytest.raises(CorruptBlob, match=blob.hash):
        store.read_blob(blob, what="x")
    assert store.put_blob([b"content"]) == blob
    assert store.read_blob(blob, what="x") == b"content"


def test_a_manifest_is_published_only_over_whole_blobs(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    manifest = made(store)
    path = tmp_path / "store" / "blobs" / manifest.files["adapter_model.safetensors"].hash
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptBlob, match="has 6 bytes, not 7"):
        store.publish(manifest)
    path.unlink()
    with pytest.raises(MissingBlob, match=r"adapter_model\.safetensors"):
        store.publish(manifest)
    with pytest.raises(MissingManifest):
        store.read_manifest(manifest.id)


def test_a_name_is_set_once_unless_replaced(store: Store) -> None:
    first, second = made(store, b"1"), made(store, b"2")
    key = key_of(first)
    assert store.resolve(key) is None
    store.set_name(key, store.publish(first))
    store.set_name(key, first.id)
    store.publish(second)
    with pytest.raises(NameTaken) as taken:
        store.set_name(key, second.id)
    assert taken.value.existing == first.id == store.resolve(key)
    store.set_name(key, second.id, replace=True)
    assert store.resolve(key) == second.id
    assert list(store.names()) == [(key, second.id)]
    assert store.delete_name(key) is True
    assert store.delete_name(key) is False
    assert store.resolve(key) is None


def test_a_name_points_only_to_its_own_manifest(store: Store) -> None:
    manifest = made(store)
    store.publish(manifest)
    with pytest.raises(InvalidValue, match="not other/weights/final"):
        store.set_name(NameKey("other", "weights", "final"), manifest.id)
    snapshot = made(store, name=None)
    store.publish(snapshot)
    with pytest.raises(InvalidValue, match="is unnamed"):
        store.set_name(key_of(manifest), snapshot.id)
    with pytest.raises(MissingManifest):
        store.set_name(key_of(manifest), "0" * 64)


def test_names_are_listed_by_run(store: Store) -> None:
    keys = []
    for run in ("a", "a:1", "ab"):
        manifest = made(store, run=run)
        store.set_name(key_of(manifest), store.publish(manifest))
        keys.append(key_of(manifest))
    assert [key for key, _ in store.names()] == [keys[1], keys[0], keys[2]]
    assert [key for key, _ in store.names("a")] == [keys[0]]


def test_the_same_name_may_exist_in_each_kind_and_case(store: Store) -> None:
    for kind, name in (("training", "A"), ("training", "a"), ("sampler", "a")):
        manifest = made(store, kind=kind, name=name)
        store.set_name(key_of(manifest), store.publish(manifest))
    assert len(list(store.names())) == 3


def test_unnamed_manifests_stay_until_discarded(store: Store) -> None:
    one, other = made(store, name=None), made(store, name=None, run="other")
    for manifest in (one, other):
        store.publish(manifest)
    assert dict(store.unnamed()) == {one.id: one, other.id: other}
    assert list(store.unnamed("other")) == [(other.id, other)]
    assert store.read_manifest(one.id) == one
    assert store.discard(one.id) is True
    assert store.discard(one.id) is False
    assert list(store.unnamed()) == [(other.id, other)]


def test_amending_moves_the_name_to_a_changed_copy(store: Store) -> None:
    manifest = made(store)
    key = key_of(manifest)
    store.set_name(key, store.publish(manifest))
    amended = store.amend(key, public=True, user_metadata={"a": "b"})
    assert store.resolve(key) == amended != manifest.id
    assert store.read_manifest(amended) == dataclasses.replace(
        manifest, public=True, user_metadata={"a": "b"}
    )


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    marker = tmp_path / "store" / "holdfast-store.json"
    marker.write_bytes(marker.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(UnsupportedFormat, match="version 2; this Holdfast reads up to 1"):
        open_store(tmp_path / "store")


def test_another_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(NotAStore, match="letters"):
        open_store(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]


def while_publishing(
    store: Store, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]
) -> None:
    """Something else happens once, before the next publication returns."""
    publish = store.publish

    def busy(manifest: Manifest) -> str:
        manifest_id = publish(manifest)
        monkeypatch.undo()
        meanwhile()
        return manifest_id

    monkeypatch.setattr(store, "publish", busy)


def test_amending_does_not_bring_back_what_is_deleted_meanwhile(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = stores
    manifest = made(store)
    key = key_of(manifest)
    store.set_name(key, store.publish(manifest))
    with monkeypatch.context() as patch:
        while_publishing(store, patch, lambda: other.delete_name(key))
        with pytest.raises(MissingName, match="there is no checkpoint 3f0c:train:0/weights/final"):
            store.amend(key, public=True)
    assert store.resolve(key) is None


def test_amending_applies_to_what_is_saved_over_it_meanwhile(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = stores
    old, new = made(store, b"old"), made(store, b"new")
    key = key_of(old)
    store.set_name(key, store.publish(old))
    with monkeypatch.context() as patch:
        while_publishing(
            store, patch, lambda: other.set_name(key, other.publish(new), replace=True)
        )
        amended = store.amend(key, public=True)
    assert store.read_manifest(amended) == dataclasses.replace(new, public=True)


def test_a_pinned_manifest_can_be_read(store: Store) -> None:
    manifest = made(store)
    store.publish(manifest)
    with store.pin(manifest.id) as pinned:
        assert pinned == manifest
    with pytest.raises(MissingManifest), store.pin("0" * 64):
        pass


def test_everything_is_verified(store: Store) -> None:
    manifest = made(store)
    store.set_name(key_of(manifest), store.publish(manifest))
    store.publish(made(store, b"other", name=None))
    store.put_blob([b"nobody's"])
    report = store.verify()
    assert report.ok
    assert (report.manifests, report.blobs, report.size) == (2, 3, 20)
    assert store.verify(manifest.id).blobs == 1


def test_verifying_tells_how_far_it_is(store: Store) -> None:
    manifest = made(store, b"w" * 5_000_000)
    store.set_name(key_of(manifest), store.publish(manifest))
    store.put_blob([b"left over"])
    for manifest_id, total in ((manifest.id, manifest.size), (None, manifest.size + 9)):
        told: list[tuple[int, int]] = []
        store.verify(manifest_id, progress=lambda *bytes: told.append(bytes))  # noqa: B023
        assert told[-1] == (total, total)
        assert {of for _, of in told} == {total}
        done = [done for done, _ in told]
        assert done == sorted(done)
        assert len(done) >= 3


def test_a_damaged_name_is_replaced_or_deleted_only_when_asked_to(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    manifest = made(store)
    key = key_of(manifest)
    path = tmp_path / "store" / "names" / file_name(key)
    for repair in (
        lambda: store.set_name(key, manifest.id, replace=True),
        lambda: store.delete_name(key),
    ):
        store.set_name(key, store.publish(manifest), replace=True)
        path.write_bytes(b"{}")
        with pytest.raises(CorruptName):
            store.resolve(key)
        with pytest.raises(CorruptName):
            store.set_name(key, manifest.id)
        with pytest.raises(CorruptName):
            store.amend(key, public=True)
        repair()
        assert store.resolve(key) in (manifest.id, None)


class _Refused(Exception):
    pass


def test_what_is_raised_before_a_change_breaks_it_off(stores: tuple[Store, Store]) -> None:
    store, other = stores
    first, second = made(store, b"1"), made(store, b"2", name=None)
    key = key_of(first)
    third = dataclasses.replace(first, seq=99)
    store.set_name(key, store.publish(first))
    for manifest in (second, third):
        store.publish(manifest)
    refused = made(store, b"3", name=None)

    def refuse() -> None:
        raise _Refused

    store.before_change(refuse)
    changes: list[Callable[[], object]] = [
        lambda: store.publish(refused),
        lambda: store.publish(made(store, b"4", name="other")),
        lambda: store.set_name(key, third.id, replace=True),
        lambda: store.amend(key, public=True),
        lambda: store.delete_name(key),
        lambda: store.discard(second.id),
        store.sweep,
    ]
    for change in changes:
        with pytest.raises(_Refused):
            change()
    assert dict(other.names()) == {key: first.id}
    assert dict(other.unnamed()) == {second.id: second}
    with pytest.raises(MissingManifest):
        other.read_manifest(refused.id)
    # Nothing of what was broken off is in the way of others.
    other.set_name(key, third.id, replace=True)
    other.discard(second.id)
    assert store.resolve(key) == third.id


@pytest.mark.parametrize("stores", ["local disk", "storage in memory", "S3 server"], indirect=True)
def test_a_name_that_was_changed_after_the_question_is_not_moved_without_another_one(
    stores: tuple[Store, Store],
) -> None:
    """Whoever is held up between the question and the change does not undo what came meanwhile."""
    store, other = stores
    mine, theirs = made(store, b"mine"), made(store, b"theirs")
    key = key_of(mine)
    for manifest in (mine, theirs):
        store.publish(manifest)
    asked = 0
    overtaking = Thread(target=lambda: other.set_name(key, theirs.id, replace=True))

    def held_up() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            overtaking.start()
            overtaking.join(0.3)
        else:
            raise _Refused

    store.before_change(held_up)
    with suppress(_Refused):
        store.set_name(key, mine.id, replace=True)
    overtaking.join()
    # Either it was asked again, or the other one had to wait until it was done.
    assert store.resolve(key) == theirs.id
