"""Flipped bits, truncations, foreign files and hostile manifests: refused, by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.store import (
    Corrupt,
    CorruptManifest,
    InvalidValue,
    LocalStore,
    Manifest,
    Missing,
    NameKey,
    NotAStore,
    ObjectStore,
    Store,
    StoreError,
    UnsupportedFormat,
)
from holdfast.store.model import MAX_MANIFEST, canonical_json, content_hash
from holdfast.store.records import NameRecord, file_name, seal
from tests.store.model import Clock
from tests.store.samples import CONFIG, OPTIMIZER, PLAIN, WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

KEY = key_of(PLAIN)
RANDOM = random.Random(5)
SIZES = {WEIGHTS: 30_000, OPTIMIZER: 9_500_000, CONFIG: 300}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one checkpoint: small files, and large ones that are read in many pieces."""
    root = tmp_path_factory.mktemp("damage") / "store"
    with LocalStore(root) as store:
        files = {name: store.put_blob([RANDOM.randbytes(size)]) for name, size in SIZES.items()}
        manifest = manifest_of(files, user_metadata={"note": "für alle"}, expires=4e9)
        store.set_name(KEY, store.publish(manifest))
    return root


def load(store: LocalStore) -> dict[str, bytes]:
    """The checkpoint, the way anybody loads it."""
    manifest_id = store.resolve(KEY)
    assert manifest_id is not None
    manifest = store.read_manifest(manifest_id)
    return {n: store.read_blob(b, what=n) for n, b in manifest.files.items()}


def files_of(root: Path) -> list[Path]:
    return [
        path
        for directory in ("names", "manifests", "blobs")
        for path in sorted((root / directory).iterdir())
    ]


def load_fails_naming(store: LocalStore, path: Path) -> None:
    with pytest.raises(Corrupt) as error:
        load(store)
    assert str(path) in str(error.value)
    assert error.value.path == str(path)


def places(size: int) -> list[int]:
    """Every byte of a small file; the ends, piece boundaries and 100 others of a large one."""
    if size <= 2000:
        return list(range(size))
    edges = [0, 1, size - 2, size - 1]
    edges += [n + d for n in range(1 << 21, size, 1 << 21) for d in (-1, 0)]
    return sorted({*edges, *(RANDOM.randrange(size) for _ in range(100))})


def test_every_flipped_byte_is_refused_with_the_files_name(saved: Path) -> None:
    cases = 0
    store = LocalStore(saved)
    for path in files_of(saved):
        with path.open("r+b") as file:
            for place in places(path.stat().st_size):
                byte = os.pread(file.fileno(), 1, place)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << RANDOM.randrange(8)]), place)
                load_fails_naming(store, path)
                os.pwrite(file.fileno(), byte, place)
                cases += 1
    assert cases > 1000
    assert {name: len(data) for name, data in load(store).items()} == SIZES


def test_every_truncation_and_extension_is_refused_with_the_files_name(saved: Path) -> None:
    cases = 0
    store = LocalStore(saved)
    for path in files_of(saved):
        whole = path.read_bytes()
        with path.open("r+b") as file:
            for place in places(len(whole)):
                file.truncate(place)
                load_fails_naming(store, path)
                # A torn write: the size is right, what was not written reads as zeros.
                file.truncate(len(whole))
                if any(whole[place : place + 100]):
                    load_fails_naming(store, path)
                    cases += 1
                os.pwrite(file.fileno(), whole[place:], place)
                cases += 1
            os.pwrite(file.fileno(), b"\0", len(whole))
            load_fails_naming(store, path)
            file.truncate(len(whole))
    assert cases > 2000
    assert {name: len(data) for name, data in load(store).items()} == SIZES


def test_swapped_files_are_refused(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    store = LocalStore(root)
    one, other = sorted((root / "blobs").iterdir(), key=lambda path: path.stat().st_size)[:2]
    data = other.read_bytes()
    shutil.copy(one, other)
    load_fails_naming(store, other)
    other.write_bytes(data)
    manifest = manifest_of({}, name="second")
    store.set_name(key_of(manifest), store.publish(manifest))
    name = root / "names" / file_name(KEY)
    shutil.copy(root / "names" / file_name(key_of(manifest)), name)
    load_fails_naming(store, name)


def test_verify_finds_all_that_is_wrong_at_once(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    with LocalStore(root) as store:
        report = store.verify()
        assert report.ok
        assert (report.manifests, report.blobs, report.size) == (1, 3, sum(SIZES.values()))
        small, _, large = sorted((root / "blobs").iterdir(), key=lambda p: p.stat().st_size)
        small.unlink()
        flip(large, 5)
        orphan = store.put_blob([b"nobody's"])
        flip(root / "blobs" / orphan.hash, 0)
        flip(root / "names" / file_name(KEY), 40)
        problems = store.verify().problems
        assert sorted(problem.code for problem in problems) == [
            "corrupt_blob",
            "corrupt_blob",
            "corrupt_name",
            "missing_blob",
        ]
        manifest_id = next((root / "manifests").iterdir()).name
        assert {p.code for p in store.verify(manifest_id).problems} == {
            "corrupt_blob",
            "missing_blob",
        }
        (root / "manifests" / manifest_id).unlink()
        flip(root / "names" / file_name(KEY), 40)
        assert "missing_manifest" in {problem.code for problem in store.verify().problems}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


# What others may put into the store's directory


@pytest.mark.parametrize("directory", ["blobs", "manifests", "names"])
def test_a_symbolic_link_is_refused(saved: Path, tmp_path: Path, directory: str) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    path = next((root / directory).iterdir())
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(StoreError, match=path.name), LocalStore(root) as store:
        assert not store.verify().ok
        load(store)


@pytest.mark.parametrize("directory", ["blobs", "names", "tmp"])
def test_a_linked_directory_is_refused(saved: Path, tmp_path: Path, directory: str) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    (root / directory).rename(tmp_path / "outside")
    (root / directory).symlink_to(tmp_path / "outside")
    with pytest.raises(NotAStore, match="must be a directory, not a link"):
        LocalStore(root)


def test_a_pipe_in_a_files_place_does_not_block(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    path = next((root / "manifests").iterdir())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="not a regular file"):
        load(LocalStore(root))


def test_foreign_files_in_the_store_are_reported_and_not_followed(saved: Path) -> None:
    foreign = [saved / "names" / "notes.txt", saved / "manifests" / "x", saved / "blobs" / "y"]
    for path in foreign:
        path.write_text("hello")
    try:
        with LocalStore(saved) as store:
            reported = " ".join(str(problem) for problem in store.verify().problems)
            assert all(str(path) in reported for path in foreign)
            assert store.sweep().damaged
            damage: list[StoreError] = []
            assert len(list(store.names(on_damage=damage.append))) == 1
            assert len(damage) == 1
    finally:
        for path in foreign:
            path.unlink()


@pytest.mark.parametrize("directory", ["names", "manifests", "unnamed", "blobs", "fresh", "pins"])
def test_a_directory_among_the_files_does_not_keep_sweeps_from_going_on(
    saved: Path, tmp_path: Path, directory: str
) -> None:
    root = tmp_path / "store"
    shutil.copytree(saved, root)
    clock = Clock()
    with LocalStore(root, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic) as store:
        expired = manifest_of({}, name="expired", expires=clock.wall - 1)
        store.set_name(key_of(expired), store.publish(expired))
        left_over = store.put_blob([b"left over"])
        (root / directory / ("0" * 64)).mkdir()
        removed = set()
        for _ in range(6):
            clock.monotonic += 1800.0
            report = store.sweep()
            removed |= {*report.names}
            if directory != "pins":
                assert str(root / directory / ("0" * 64)) in report.damaged
        assert removed == {key_of(expired)}
        # Of what it may refer to nothing goes.
        assert store.has_blob(left_over) == (directory in ("manifests", "unnamed"))
        assert len(load(store)) == len(SIZES)


@pytest.mark.parametrize("shared", [False, True])
def test_every_flipped_bit_of_a_stores_marker_is_refused(tmp_path: Path, shared: bool) -> None:
    storage = Storage()
    marker = tmp_path / "store" / "holdfast-store.json"

    def store() -> Store:
        return ObjectStore(MemoryObjects(storage)) if shared else LocalStore(marker.parent)

    def write(data: bytes) -> None:
        if shared:
            storage.put(marker.name, data)
        else:
            marker.write_bytes(data)

    store().close()
    whole = storage.objects[marker.name][0] if shared else marker.read_bytes()
    flipped = [
        whole[:n] + bytes([whole[n] ^ 1 << bit]) + whole[n + 1 :]
        for n in range(len(whole))
        for bit in range(8)
    ]
    for data in (*flipped, whole + b"\n", b" " + whole, whole[:-1], b"", b"[" * 4000):
        write(data)
        with pytest.raises((NotAStore, UnsupportedFormat), match=marker.name):
            store()
    write(whole)
    store().close()


# Hostile values


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../../x", "a/b", "/etc/passwd", "a\0b", "a\nb", "-a", "x" * 129, "ä", None, 3],
)
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidValue, match="a checkpoint name is"):
        NameKey("run", "weights", name)
    if name is not None:
        with pytest.raises(InvalidValue):
            manifest_of({}, name=name)


@pytest.mark.parametrize("run", ["", "../x", "a/b", "a b", "x" * 257, ":a", None])
def test_a_run_id_that_is_none_is_refused(run: Any) -> None:
    with pytest.raises(InvalidValue, match="a run id is"):
        NameKey(run, "weights", "a")


@pytest.mark.parametrize("manifest_id", ["", "../x", "A" * 64, "0" * 63, "0" * 64 + "\n", None])
def test_an_id_that_is_none_never_becomes_a_path(tmp_path: Path, manifest_id: Any) -> None:
    with LocalStore(tmp_path / "store") as store:
        calls: list[Callable[[], object]] = [
            lambda: store.read_manifest(manifest_id),
            lambda: store.discard(manifest_id),
            lambda: store.set_name(KEY, manifest_id),
            lambda: store.pin(manifest_id).__enter__(),
            lambda: store.verify(manifest_id) if manifest_id is not None else check_none(),
        ]
        for call in calls:
            with pytest.raises(InvalidValue, match="64 lower-case hex digits"):
                call()


def check_none() -> None:
    raise InvalidValue("64 lower-case hex digits")


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True),
)
def test_every_valid_name_is_a_plain_file_name(run: str, name: str) -> None:
    entry = file_name(NameKey(run, "sampler_weights", name))
    assert len(entry.encode()) <= 255
    assert "/" not in entry
    assert entry == entry.lower()
    assert not entry.startswith(".")


@given(
    st.lists(
        st.builds(
            NameKey,
            st.from_regex(r"[AaZz0%][AaZz0.:-]{0,3}", fullmatch=True).filter(
                lambda r: "%" not in r
            ),
            st.sampled_from(["weights", "sampler_weights"]),
            st.from_regex(r"[AaZz0][AaZz0._-]{0,3}", fullmatch=True),
        ),
        unique=True,
        max_size=20,
    )
)
def test_different_names_have_different_files(keys: list[NameKey]) -> None:
    assert len({file_name(key) for key in keys}) == len(keys)


def document(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(manifest_of({WEIGHTS: blob()}).to_bytes())
    return plain | changes


def blob(size: int = 3) -> Any:
    from holdfast.store import Blob

    return Blob("0" * 64, size)


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"\x80abc",
    "a list": b"[]",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge number": b'{"seq":' + b"9" * 5000 + b"}",
    "too large": b" " * (MAX_MANIFEST + 1),
    "infinite": canonical_json(document()).replace(b'"created":1700000000.0', b'"created":1e999'),
    "not a number": canonical_json(document()).replace(b'"step":3', b'"step":NaN'),
    "twice the same key": canonical_json(document()).replace(b'"step":3', b'"step":3,"step":3'),
    "spaces": canonical_json(document()).replace(b'"step":3', b'"step": 3'),
    "no such field": canonical_json(document(extra=1)),
    "missing field": canonical_json({k: v for k, v in document().items() if k != "owner"}),
    "format 0": canonical_json(document(format_version=0)),
    "format true": canonical_json(document(format_version=True)),
    "path as file name": canonical_json(document(files={"../x": {"hash": "0" * 64, "size": 1}})),
    "path as hash": canonical_json(document(files={WEIGHTS: {"hash": "../../x", "size": 1}})),
    "upper-case hash": canonical_json(document(files={WEIGHTS: {"hash": "A" * 64, "size": 1}})),
    "huge size": canonical_json(document(files={WEIGHTS: {"hash": "0" * 64, "size": 1 << 60}})),
    "negative size": canonical_json(document(files={WEIGHTS: {"hash": "0" * 64, "size": -1}})),
    "size of text": canonical_json(document(files={WEIGHTS: {"hash": "0" * 64, "size": "1"}})),
    "true size": canonical_json(document(files={WEIGHTS: {"hash": "0" * 64, "size": True}})),
    "files as list": canonical_json(document(files=[])),
    "blob as text": canonical_json(document(files={WEIGHTS: "x"})),
    "lora as text": canonical_json(document(lora="x")),
    "lora too little": canonical_json(document(lora={"rank": 1})),
    "name as path": canonical_json(document(name="../x")),
    "run as path": canonical_json(document(run="../x")),
    "kind": canonical_json(document(kind="pickle")),
    "metadata of numbers": canonical_json(document(user_metadata={"a": 1})),
    "nested fingerprint": canonical_json(document(fingerprint={"a": {}})),
    "parent": canonical_json(document(parent="x")),
    "negative step": canonical_json(document(step=-1)),
    "mark as text": canonical_json(document(incomplete="x")),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    """Even one that somebody wrote into the store under its right hash."""
    with LocalStore(tmp_path / "store") as store:
        path = tmp_path / "store" / "manifests" / content_hash(data)
        path.write_bytes(data)
        with pytest.raises(CorruptManifest) as error:
            store.read_manifest(path.name)
        assert str(path) in str(error.value)
        assert len(str(error.value)) < 1000


def test_a_manifest_of_a_newer_format_says_so() -> None:
    with pytest.raises(UnsupportedFormat, match="format version 2; this Holdfast reads up to 1"):
        Manifest.from_bytes(canonical_json(document(format_version=2, brand_new=True)))


def test_a_name_of_a_newer_format_says_so() -> None:
    record = json.loads(NameRecord(KEY, "0" * 64, None).encode().splitlines()[0])
    with pytest.raises(UnsupportedFormat, match="format version 2"):
        NameRecord.decode(seal(canonical_json(record | {"version": 2})), "name")


@given(st.binary(max_size=300))
def test_no_bytes_at_all_make_a_manifest_fail_otherwise(data: bytes) -> None:
    with pytest.raises(CorruptManifest):
        Manifest.from_bytes(data)


@given(st.data())
def test_a_manifest_with_changed_bytes_is_refused_or_another_manifest(data: st.DataObject) -> None:
    original = manifest_of({WEIGHTS: blob()}).to_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = Manifest.from_bytes(bytes(changed))
    except (CorruptManifest, UnsupportedFormat):
        return
    assert manifest.to_bytes() == bytes(changed)


@given(
    metadata=st.none() | st.dictionaries(st.text(), st.text(), max_size=5),
    fingerprint=st.dictionaries(
        st.text(),
        st.text() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False),
        max_size=5,
    ),
    created=st.floats(allow_nan=False, allow_infinity=False),
)
def test_every_manifest_is_read_back_equal_or_refused_at_once(
    metadata: dict[str, str] | None, fingerprint: dict[str, Any], created: float
) -> None:
    try:
        manifest = manifest_of({}, user_metadata=metadata, fingerprint=fingerprint, created=created)
        data = manifest.to_bytes()
    except InvalidValue:
        return
    assert Manifest.from_bytes(data) == manifest
    assert Manifest.from_bytes(data).id == manifest.id


# Files of every format version that was ever released


FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


@pytest.fixture(params=FIXTURES, ids=lambda path: path.name)
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A copy of a store as an older version wrote it."""
    shutil.copytree(request.param, tmp_path / "store")
    yield tmp_path / "store"


def test_a_store_of_every_format_version_stays_readable(released: Path) -> None:
    expected = json.loads((released / "expected.json").read_text())
    (released / "expected.json").unlink()
    with LocalStore(released) as store:
        assert store.verify().ok
        names = {str(key): manifest_id for key, manifest_id in store.names()}
        assert names == expected["names"]
        assert {manifest_id for manifest_id, _ in store.unnamed()} == set(expected["unnamed"])
        for manifest_id, fields in expected["manifests"].items():
            manifest = store.read_manifest(manifest_id)
            assert {key: getattr(manifest, key) for key in fields} == fields
            for name, blob in manifest.files.items():
                assert content_hash(store.read_blob(blob, what=name)) == blob.hash
        with pytest.raises(Missing):
            store.read_manifest("0" * 64)
