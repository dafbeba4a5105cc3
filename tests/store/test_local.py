"""The public calls of a store on a real disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.store import (
    Blob,
    CorruptBlob,
    InvalidValue,
    LocalStore,
    Lora,
    Manifest,
    MissingBlob,
    MissingManifest,
    NameKey,
    NameTaken,
    NotAStore,
    UnsupportedFormat,
    open_store,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store") as store:
        yield store


def manifest_of(store: LocalStore, content: bytes = b"weights", **changes: object) -> Manifest:
    manifest = Manifest(
        kind="training",
        run="3f0c:train:0",
        name="final",
        seq=7,
        step=3,
        base_model="tiny",
        base_revision="r1",
        lora=Lora(rank=8, alpha=32.0, seed=1, train_attn=True, train_mlp=True, train_unembed=False),
        optimizer="adamw",
        owner="local",
        created=1.7e9,
        files={"adapter_model.safetensors": store.put_blob([content])},
    )
    return dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]


def key_of(manifest: Manifest) -> NameKey:
    assert manifest.key is not None
    return manifest.key


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


def test_putting_content_again_repairs_a_damaged_file(store: LocalStore, tmp_path: Path) -> None:
    blob = store.put_blob([b"content"])
    path = tmp_path / "store" / "blobs" / blob.hash
    path.write_bytes(b"c0ntent")
    with pytest.raises(CorruptBlob, match=blob.hash):
        store.read_blob(blob, what="x")
    assert store.put_blob([b"content"]) == blob
    assert store.read_blob(blob, what="x") == b"content"


def test_a_manifest_is_published_only_over_whole_blobs(store: LocalStore, tmp_path: Path) -> None:
    manifest = manifest_of(store)
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
    first, second = manifest_of(store, b"1"), manifest_of(store, b"2")
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
    manifest = manifest_of(store)
    store.publish(manifest)
    with pytest.raises(InvalidValue, match="not other/weights/final"):
        store.set_name(NameKey("other", "weights", "final"), manifest.id)
    snapshot = manifest_of(store, name=None)
    store.publish(snapshot)
    with pytest.raises(InvalidValue, match="is unnamed"):
        store.set_name(key_of(manifest), snapshot.id)
    with pytest.raises(MissingManifest):
        store.set_name(key_of(manifest), "0" * 64)


def test_names_are_listed_by_run(store: LocalStore) -> None:
    keys = []
    for run in ("a", "a:1", "ab"):
        manifest = manifest_of(store, run=run)
        store.set_name(key_of(manifest), store.publish(manifest))
        keys.append(key_of(manifest))
    assert [key for key, _ in store.names()] == [keys[1], keys[0], keys[2]]
    assert [key for key, _ in store.names("a")] == [keys[0]]


def test_the_same_name_may_exist_in_each_kind_and_case(store: LocalStore) -> None:
    for kind, name in (("training", "A"), ("training", "a"), ("sampler", "a")):
        manifest = manifest_of(store, kind=kind, name=name)
        store.set_name(key_of(manifest), store.publish(manifest))
    assert len(list(store.names())) == 3


def test_unnamed_manifests_stay_until_discarded(store: LocalStore) -> None:
    one, other = manifest_of(store, name=None), manifest_of(store, name=None, run="other")
    for manifest in (one, other):
        store.publish(manifest)
    assert dict(store.unnamed()) == {one.id: one, other.id: other}
    assert list(store.unnamed("other")) == [(other.id, other)]
    assert store.read_manifest(one.id) == one
    assert store.discard(one.id) is True
    assert store.discard(one.id) is False
    assert list(store.unnamed()) == [(other.id, other)]


def test_amending_moves_the_name_to_a_changed_copy(store: LocalStore) -> None:
    manifest = manifest_of(store)
    key = key_of(manifest)
    store.set_name(key, store.publish(manifest))
    amended = store.amend(key, public=True, user_metadata={"a": "b"})
    assert store.resolve(key) == amended != manifest.id
    assert store.read_manifest(amended) == dataclasses.replace(
        manifest, public=True, user_metadata={"a": "b"}
    )


def test_a_store_of_a_newer_version_is_refused(store: LocalStore, tmp_path: Path) -> None:
    marker = tmp_path / "store" / "holdfast-store.json"
    marker.write_bytes(marker.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(UnsupportedFormat, match="version 2; this Holdfast reads up to 1"):
        open_store(tmp_path / "store")


def test_another_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(NotAStore, match="letters"):
        open_store(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]
