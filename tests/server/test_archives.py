"""A checkpoint's archive: whole, in ranges, checked, and only for those who may read it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import Response

from holdfast.engine.interface import OPTIMIZER_STATE
from holdfast.server.archive import Download, Reading, parse_range
from holdfast.server.routes import archives
from holdfast.store import CorruptBlob, LocalStore
from tests.store.samples import manifest_of
from tests.support.raw import RawRun
from tests.support.server import ServerProcess


@pytest.fixture(scope="module")
def run(server: ServerProcess) -> Iterator[RawRun]:
    with RawRun.open(server) as run:
        run.forward_backward(1)
        run.optim_step(2)
        run.save(3, "kept")
        yield run


def address(run: RawRun) -> str:
    answer = run.http.get(f"training_runs/{run.model_id}/checkpoints/weights/kept/archive")
    assert answer.status_code == 200, answer.text
    url = answer.json()["url"]
    assert isinstance(url, str)
    return url


def test_the_archive_holds_the_blobs_that_its_manifest_names(
    run: RawRun, server: ServerProcess
) -> None:
    whole = httpx2.get(address(run))  # the address needs no key
    digest = base64.b64encode(hashlib.sha256(whole.content).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    manifest = server.manifest(f"tinker://{run.model_id}/weights/kept")
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as archive:
        files = {m.name: archive.extractfile(m) for m in archive}
    assert set(files) == {"holdfast.json", *manifest.files}
    described = files["holdfast.json"]
    assert described is not None
    assert json.load(described)["files"].keys() == manifest.files.keys()
    for name, blob in manifest.files.items():
        stream = files[name]
        assert stream is not None
        assert stream.read() == server.store().read_blob(blob, what=name)


def test_ranges_join_to_the_whole(run: RawRun) -> None:
    url = address(run)
    whole = httpx2.get(url)
    joined, size = b"", len(whole.content)
    while len(joined) < size:
        end = min(len(joined) + 10_007, size) - 1
        part = httpx2.get(url, headers={"range": f"bytes={len(joined)}-{end}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {len(joined)}-{end}/{size}"
        assert part.headers["etag"] == whole.headers["etag"]
        joined += part.content
    assert joined == whole.content
    beyond = httpx2.get(url, headers={"range": f"bytes={size}-"})
    assert beyond.status_code == 416
    assert beyond.headers["content-range"] == f"bytes */{size}"
    changed = httpx2.get(url, headers={"range": "bytes=0-9", "if-range": '"another"'})
    assert changed.status_code == 200


def test_damage_breaks_a_download_off_in_one_line_of_the_log(
    run: RawRun, server: ServerProcess
) -> None:
    with RawRun.open(server) as other:
        other.forward_backward(1)
        other.optim_step(2)
        other.save(3, "kept")
        url = address(other)
        whole = httpx2.get(url).content
        manifest = server.manifest(f"tinker://{other.model_id}/weights/kept")
        damaged = manifest.files[OPTIMIZER_STATE].hash
        path = server.data_dir / "store" / "blobs" / damaged
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        before = len(server.log)
        with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete"):
            httpx2.get(url)
        told = server.log[before:]
        assert "Traceback" not in told
        assert told.count("a download broke off") == told.count(damaged) == 1
        path.write_bytes(data)
        assert httpx2.get(url).content == whole


@pytest.mark.anyio
async def test_one_digest_at_a_time_is_computed_of_the_same_bytes(tmp_path: Path) -> None:
    begun = 0
    go_on = threading.Event()

    class Counted(Download):
        def digest(self) -> str:
            nonlocal begun
            begun += 1
            assert go_on.wait(10)
            return super().digest()

    with LocalStore(tmp_path) as store:
        manifests = [
            manifest_of({"a": store.put_blob([content])}, name=None)
            for content in (b"one", b"other")
        ]
        for manifest in manifests:
            store.publish(manifest)
        reading = Reading()
        asked = [
            asyncio.ensure_future(reading.digest(Counted(store, manifest, file)))
            for file in (None, "a")
            for manifest in (manifests[0], *manifests)
        ]
        await asyncio.sleep(0)
        asked[0].cancel()  # a client that has gone does not keep the others from theirs
        go_on.set()
        found = [await digest for digest in asked[1:]]
        assert begun == len(set(found)) == 4
        digest = base64.b64encode(hashlib.sha256(b"one").digest()).decode()
        assert found[-2] == f"sha-256=:{digest}:"
        damaged = manifest_of({"a": store.put_blob([b"third"])}, name=None)
        store.publish(damaged)
        path = tmp_path / "blobs" / damaged.files["a"].hash
        path.write_bytes(b"th1rd")
        with pytest.raises(CorruptBlob):
            await reading.digest(Counted(store, damaged))
        path.write_bytes(b"third")
        assert await reading.digest(Counted(store, damaged))  # an error is not kept
        reading.close()


@pytest.mark.anyio
async def test_a_download_does_not_wait_long_for_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one has it."""
    monkeypatch.setattr(archives, "DIGEST_TAKES", 0.1)
    go_on = threading.Event()

    class Slow(Download):
        def digest(self) -> str:
            assert go_on.wait(10)
            return super().digest()

    with LocalStore(tmp_path) as store:
        manifest = manifest_of({"a": store.put_blob([b"content"])}, name=None)
        store.publish(manifest)
        reading, found = Reading(), Slow(store, manifest)

        async def answer(range_: str | None = None) -> Response:
            async with asyncio.timeout(5.0):
                return await archives._answer(found, reading, range_, None)

        for range_ in (None, "bytes=0-9"):
            early = await answer(range_)
            assert "repr-digest" not in early.headers
            assert early.headers["content-length"] == str(10 if range_ else found.size)
        go_on.set()
        digest = await reading.digest(found)
        assert (await answer()).headers["repr-digest"] == digest
        reading.close()


def test_an_address_that_was_tampered_with_is_refused(run: RawRun) -> None:
    url = httpx2.URL(address(run))
    later = url.copy_set_param("expires", str(int(url.params["expires"]) + 1))
    answer = httpx2.get(later)
    assert answer.status_code == 403
    assert "ask for the archive again" in answer.json()["message"]


def test_an_unknown_checkpoint_has_no_archive(run: RawRun) -> None:
    answer = run.http.get(f"training_runs/{run.model_id}/checkpoints/weights/none/archive")
    assert answer.status_code == 404
    assert f"tinker://{run.model_id}/weights/none" in answer.json()["message"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 100)),
        ("bytes=-7", (93, 100)),
        ("bytes=-700", (0, 100)),
        ("bytes=5-700", (5, 100)),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=-", None),
    ],
)
def test_ranges(text: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(text, 100) == expected


@pytest.mark.parametrize("text", ["bytes=100-", "bytes=7-6", "bytes=-0"])
def test_ranges_outside_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="outside of the 100 bytes"):
        parse_range(text, 100)
