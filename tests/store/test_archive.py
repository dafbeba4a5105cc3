"""Archives: any range, byte for byte the same; and what is refused when one is brought in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from holdfast.store import (
    Archive,
    Corrupt,
    InvalidFile,
    InvalidValue,
    LocalStore,
    Manifest,
    MissingBlob,
    import_archive,
)
from holdfast.store.archive import MANIFEST
from holdfast.store.tensors import TensorInfo, header_size, read_tensors
from tests.store.crash import Disk, Process
from tests.store.model import Clock, open_on
from tests.store.samples import CONFIG, WEIGHTS, manifest_of

TENSORS: dict[str, Any] = {
    "a.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.lora_B.weight": np.zeros((3, 2), dtype=np.float16),
    "scalar": np.array(3, dtype=np.int64),
}
SAVED = save(TENSORS, metadata={"format": "pt"})


@pytest.fixture
def store() -> Iterator[LocalStore]:
    """In memory: nothing here is about the disk."""
    with open_on(Process(Disk()), Clock()) as store:
        yield store


def saved(store: LocalStore, *, large: int = 0) -> Manifest:
    files = {WEIGHTS: store.put_blob([SAVED]), CONFIG: store.put_blob([b'{"r": 8}'])}
    if large:
        files["large.bin"] = store.put_blob([b"0123456789" * (large // 10)])
    manifest = manifest_of(files)
    store.publish(manifest)
    return manifest


def content(archive: Archive) -> bytes:
    return b"".join(archive.read())


def test_an_archive_is_a_tar_of_the_files(store: LocalStore, tmp_path: Path) -> None:
    archive = Archive(store, saved(store))
    data = content(archive)
    assert len(data) == archive.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == [CONFIG, WEIGHTS, MANIFEST]
        tar.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == SAVED


def test_a_download_can_go_on_anywhere(store: LocalStore) -> None:
    archive = Archive(store, saved(store, large=5_000_000))
    data = content(archive)
    assert archive.checksum == blake3(data).hexdigest()
    edges = [0, 1, 511, 512, 513, 1_000_000, 2_097_152, len(data) - 1, len(data), len(data) + 9]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert b"".join(archive.read(start, stop)) == data[start:stop]
    assert content(Archive(store, saved(store, large=5_000_000))) == data


def test_a_damaged_blob_is_never_given_in_full(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    manifest = saved(store, large=5_000_000)
    blob = manifest.files["large.bin"]
    path = tmp_path / "store" / "blobs" / blob.hash
    data = path.read_bytes()
    path.write_bytes(b"x" + data[1:])
    archive = Archive(store, manifest)
    with pytest.raises(Corrupt, match=blob.hash):
        content(archive)
    with pytest.raises(Corrupt, match=blob.hash):
        list(store.stream_blob(blob, 3_000_000, 3_000_001, what="x"))
    given = bytearray()
    with pytest.raises(Corrupt):
        for piece in store.stream_blob(blob, what="x"):
            given += piece
    assert len(given) < blob.size
    path.unlink()
    with pytest.raises(MissingBlob):
        content(archive)
    with pytest.raises(InvalidValue, match="asked for 3 to 2"):
        list(store.stream_blob(blob, 3, 2, what="x"))


def test_an_archive_comes_back_as_it_was(store: LocalStore, tmp_path: Path) -> None:
    manifest = saved(store)
    with LocalStore(tmp_path / "other") as other:
        imported = import_archive(other, io.BytesIO(content(Archive(store, manifest))))
        assert imported.manifest == manifest
        assert imported.files == manifest.files
        other.publish(manifest)
        assert other.verify(manifest.id).ok


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "adapter/"])
def test_archives_that_others_make_are_read(store: LocalStore, form: int, prefix: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        directory = tarfile.TarInfo(prefix or "./")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, data in ((WEIGHTS, SAVED), (CONFIG, b"{}")):
            add(tar, prefix + name, data, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    buffer.seek(0)
    imported = import_archive(store, buffer)
    assert imported.manifest is None
    assert store.read_blob(imported.files[WEIGHTS], what="x") == SAVED


def add(tar: tarfile.TarFile, name: str, data: bytes = b"{}", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def archive_of(*names: str, form: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in names:
            add(tar, name, **fields)
    return buffer.getvalue()


def with_size(size: int) -> bytes:
    info = tarfile.TarInfo(CONFIG)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


WHOLE = archive_of(CONFIG)
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
    "empty": bytes(1024),
    "parent": archive_of("../x"),
    "absolute": archive_of("/etc/passwd"),
    "deep": archive_of("a/b/c"),
    "deep in the prefix": archive_of("a" * 90 + "/" + "b" * 60, form=tarfile.USTAR_FORMAT),
    "hidden": archive_of(".bashrc"),
    "dots within": archive_of("a/../b"),
    "long name": archive_of("x" * 200),
    "long name of GNU": archive_of("x" * 200, form=tarfile.GNU_FORMAT),
    "not text": archive_of("\udcff", form=tarfile.GNU_FORMAT),
    "twice": archive_of(CONFIG, CONFIG),
    "twice, one within": archive_of(CONFIG, f"a/{CONFIG}"),
    "symbolic link": archive_of(CONFIG, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": archive_of(CONFIG, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": archive_of(CONFIG, type=tarfile.CHRTYPE),
    "pipe": archive_of(CONFIG, type=tarfile.FIFOTYPE),
    "pax path": archive_of(CONFIG, pax_headers={"path": "/etc/passwd"}),
    "pax size": archive_of(CONFIG, pax_headers={"size": "9"}),
    "pax sparse": archive_of(CONFIG, pax_headers={"GNU.sparse.major": "1"}),
    "huge pax": archive_of(CONFIG, pax_headers={"comment": "x" * 100_000}),
    "cut in the header": WHOLE[:300],
    "cut in the file": WHOLE[:513],
    "cut before the end": WHOLE[:1024],
    "huge size": with_size(1 << 60),
    "large size, no data": with_size(1 << 40),
    "checksum": WHOLE[:10] + b"x" + WHOLE[11:],
    "data in the padding": WHOLE[:600] + b"x" + WHOLE[601:],
    "too many": archive_of(*(f"f{i}" for i in range(102))),
    "manifest of others": archive_of(CONFIG, MANIFEST),
    "not tensors": archive_of(WEIGHTS),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused(store: LocalStore, data: bytes) -> None:
    with pytest.raises(InvalidFile):
        import_archive(store, io.BytesIO(data), what="x.tar")
    assert not list(store.names())
    assert not list(store.unnamed())


def test_a_manifest_must_fit_its_files(store: LocalStore) -> None:
    data = content(Archive(store, saved(store)))
    place = data.index(b'{"r": 8}')
    with pytest.raises(InvalidFile, match="are not those that its"):
        import_archive(store, io.BytesIO(data[:place] + b'{"r": 9}' + data[place + 8 :]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_changed_archive_does_anything_but_be_refused_or_read(
    store: LocalStore, data: st.DataObject
) -> None:
    changed = bytearray(content(Archive(store, saved(store))))
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    try:
        imported = import_archive(store, io.BytesIO(changed))
    except InvalidFile:
        return
    for name, blob in imported.files.items():
        assert "/" not in name
        store.read_blob(blob, what=name)


# safetensors


def tensors_of(data: bytes) -> dict[str, TensorInfo]:
    length = header_size(data[:8], len(data), "x")
    return read_tensors(data[8 : 8 + length], len(data), "x")


def document(tensors: str, size: int = 8, pad: str = "") -> bytes:
    header = (tensors + pad).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def tensor(start: int, stop: int, dtype: str = "U8", shape: list[int] | None = None) -> str:
    shape = [stop - start] if shape is None else shape
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop]})


def test_well_formed_tensors_are_found_where_they_are() -> None:
    assert {name: info.shape for name, info in tensors_of(SAVED).items()} == {
        name: value.shape for name, value in TENSORS.items()
    }
    assert tensors_of(document("{}", 0)) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"\xff" * 8, "claims a header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "claims a header"),
        (document("[]"), "not a JSON object"),
        (document("{" * 100_000), "not valid JSON"),
        (document('{"a":' + "[" * 100_000), "not valid JSON"),
        (document(f'{{"a":{tensor(0, 4)},"a":{tensor(4, 8)}}}'), "a key appears twice"),
        (document(f'{{"a":{tensor(0, 5)},"b":{tensor(4, 8)}}}'), "overlaps"),
        (document(f'{{"a":{tensor(0, 8)},"b":{tensor(0, 8)}}}'), "overlaps"),
        (document(f'{{"a":{tensor(0, 3)},"b":{tensor(4, 8)}}}'), "leaves a gap"),
        (document(f'{{"a":{tensor(0, 8)}}}', 9), "end at"),
        (document(f'{{"a":{tensor(0, 8)}}}', 7), "end at"),
        (document(f'{{"a":{tensor(0, 8, "F32")}}}'), "needs 32 bytes"),
        (document(f'{{"a":{tensor(0, 8, "P8")}}}'), "has the dtype 'P8'"),
        (document(f'{{"a":{tensor(8, 0, shape=[8])}}}'), "a start and an end"),
        (document(f'{{"a":{tensor(0, 8, shape=[-8])}}}'), "list of counts"),
        (document(f'{{"a":{tensor(0, 8, shape=[1 << 62, 1 << 62, 0, 8])}}}'), "needs 0 bytes"),
        (document('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}'), "list of counts"),
        (document('{"a":{"dtype":[],"shape":[],"data_offsets":[0,1]}}'), "has the dtype"),
        (document('{"a":3}'), "must have a dtype"),
        (document('{"__metadata__":{"a":1}}'), "must map text to text"),
    ],
)
def test_malformed_tensors_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidFile, match=message):
        tensors_of(data)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise(data: bytes) -> None:
    with suppress(InvalidFile):
        tensors_of(len(data).to_bytes(8, "little") + data)


def test_usage_tells_own_from_shared(store: LocalStore) -> None:
    shared, own = store.put_blob([b"s" * 100]), store.put_blob([b"o" * 7])
    first = manifest_of({WEIGHTS: shared, CONFIG: own})
    second = manifest_of({WEIGHTS: shared}, run="other")
    snapshot = manifest_of({WEIGHTS: shared}, run="other", name=None)
    for manifest in (first, second, snapshot):
        store.publish(manifest)
        if manifest.key is not None:
            store.set_name(manifest.key, manifest.id)
    usage = store.usage()
    assert usage.total == 107
    assert {m: (s.own, s.shared) for m, s in usage.checkpoints.items()} == {
        first.id: (7, 100),
        second.id: (0, 100),
        snapshot.id: (0, 100),
    }
    assert store.usage("other").total == 100
    assert set(store.usage("other").checkpoints) == {second.id, snapshot.id}
