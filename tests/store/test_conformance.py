"""What the public calls promise, wherever a store keeps its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

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
    UnsupportedFormat,
    open_store,
)
from holdfast.store.records import file_name
from tests.store.crash import Disk, Process
from tests.store.model import Clock, open_on
from tests.store.samples import WEIGHTS, key_of, manifest_of


@pytest.fixture(params=["local disk", "crashing disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    """A store of each kind: the same is asked of all."""
    if request.param == "local disk":
        store = LocalStore(tmp_path / "store")
    else:
        store = open_on(Process(Disk()), Clock())
    with store:
        yield store


def made(store: LocalStore, content: bytes = b"weights", **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([content])}, **changes)


def test_what_was_put_is_read_back_in_full(store: LocalStore) -> None:
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


def test_a_missing_blob_is_named(store: LocalStore) -> None:
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


def test_a_name_is_set_once_unless_replaced(store: LocalStore) -> None:
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


def test_a_name_points_only_to_its_own_manifest(store: LocalStore) -> None:
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


def test_names_are_listed_by_run(store: LocalStore) -> None:
    keys = []
    for run in ("a", "a:1", "ab"):
        manifest = made(store, run=run)
        store.set_name(key_of(manifest), store.publish(manifest))
        keys.append(key_of(manifest))
    assert [key for key, _ in store.names()] == [keys[1], keys[0], keys[2]]
    assert [key for key, _ in store.names("a")] == [keys[0]]


def test_the_same_name_may_exist_in_each_kind_and_case(store: LocalStore) -> None:
    for kind, name in (("training", "A"), ("training", "a"), ("sampler", "a")):
        manifest = made(store, kind=kind, name=name)
        store.set_name(key_of(manifest), store.publish(manifest))
    assert len(list(store.names())) == 3


def test_unnamed_manifests_stay_until_discarded(store: LocalStore) -> None:
    one, other = made(store, name=None), made(store, name=None, run="other")
    for manifest in (one, other):
        store.publish(manifest)
    assert dict(store.unnamed()) == {one.id: one, other.id: other}
    assert list(store.unnamed("other")) == [(other.id, other)]
    assert store.read_manifest(one.id) == one
    assert store.discard(one.id) is True
    assert store.discard(one.id) is False
    assert list(store.unnamed()) == [(other.id, other)]


def test_amending_moves_the_name_to_a_changed_copy(store: LocalStore) -> None:
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


class Busy(LocalStore):
    """Something else happens to the name while it is amended."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def publish(self, manifest: Manifest) -> str:
        manifest_id = super().publish(manifest)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return manifest_id


def test_amending_does_not_bring_back_what_is_deleted_meanwhile(tmp_path: Path) -> None:
    store = Busy(tmp_path / "store")
    manifest = made(store)
    key = key_of(manifest)
    store.set_name(key, store.publish(manifest))
    store.meanwhile = lambda: store.delete_name(key)
    with pytest.raises(MissingName, match="there is no checkpoint 3f0c:train:0/weights/final"):
        store.amend(key, public=True)
    assert store.resolve(key) is None


def test_amending_applies_to_what_is_saved_over_it_meanwhile(tmp_path: Path) -> None:
    store, other = Busy(tmp_path / "store"), LocalStore(tmp_path / "store")
    old, new = made(store, b"old"), made(store, b"new")
    key = key_of(old)
    store.set_name(key, store.publish(old))
    store.meanwhile = lambda: other.set_name(key, other.publish(new), replace=True)
    assert store.read_manifest(store.amend(key, public=True)) == dataclasses.replace(
        new, public=True
    )


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
