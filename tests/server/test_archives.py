"""A checkpoint's archive: whole, in ranges, checked, and only for those who may read it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator

import httpx2
import pytest

from holdfast.server.archive import parse_range
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
