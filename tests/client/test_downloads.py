"""Archives: fetched whole, gone on with after a break, never unpacked unless they are right."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from holdfast import RestClient
from holdfast.errors import InvalidAnswerError, NotFoundError, ServerFaultError
from tests.client.conftest import QUICK
from tests.client.scripted import BROKEN_BODY, Fault, Reply, Request, ScriptedServer, status

PATH = "tinker://r:train:0/weights/a"
ADDRESS = "training_runs/r:train:0/checkpoints/weights/a/archive"
FILES = {"adapter_model.safetensors": bytes(range(256)) * 400, "adapter_config.json": b"{}"}


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Archive:
    """What the server keeps, and the ranges that were asked for."""

    def __init__(self, server: ScriptedServer, data: bytes) -> None:
        self.data = data
        self.etag = '"one"'
        self.digest_of: bytes | None = None
        self.has_digest = True
        self.ranges: list[str | None] = []
        server.results[ADDRESS] = lambda request, seq: Reply.json({"url": f"{server.url}/api/v1/x"})
        server.results["x"] = self.answer

    def answer(self, request: Request, seq: int) -> Reply:
        wanted = request.headers.get("range")
        if request.headers.get("if-range") != self.etag:
            wanted = None
        self.ranges.append(wanted)
        digest = hashlib.sha256(self.data if self.digest_of is None else self.digest_of).digest()
        headers = {
            "etag": self.etag,
            "repr-digest": f"sha-256=:{base64.b64encode(digest).decode()}:",
        }
        if not self.has_digest:
            del headers["repr-digest"]
        if wanted is None:
            return Reply(200, self.data, headers)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        return Reply(206, self.data[start:], headers)


@pytest.fixture
def kept(scripted: ScriptedServer) -> Archive:
    return Archive(scripted, archive(FILES))


@pytest.fixture
def rest(scripted: ScriptedServer) -> RestClient:
    return RestClient(base_url=scripted.url, retry_config=QUICK)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_arrive_with_progress(kept: Archive, rest: RestClient, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "folder"
    made = rest.download_checkpoint(
        PATH, target, progress=lambda done, total: seen.append((done, total))
    ).result(10)
    assert made == target
    assert contents(target) == FILES
    assert seen[-1] == (len(kept.data), len(kept.data))


def test_a_broken_download_goes_on_where_it_stopped(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults["x"].extend([BROKEN_BODY, BROKEN_BODY])
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == FILES
    starts = [0 if wanted is None else int(wanted[6:-1]) for wanted in kept.ranges]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] > len(kept.data) / 4, "it began anew each time"


def test_a_download_goes_on_without_a_digest(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    """Which the server leaves out when it takes long to compute."""
    kept.has_digest = False
    scripted.faults["x"].append(BROKEN_BODY)
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == FILES
    assert kept.ranges[-1] is not None


def test_a_download_is_resumed_by_a_later_call(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults["x"].extend([BROKEN_BODY, status(403, {"detail": "gone"})])
    with pytest.raises(Exception, match="gone"):
        rest.download_checkpoint(PATH, tmp_path).result(10)
    assert not (tmp_path / "adapter_config.json").exists()
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == FILES
    assert kept.ranges[-1] is not None


@pytest.mark.parametrize("there_before", [False, True])
def test_a_download_that_fails_leaves_no_empty_directory(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path, there_before: bool
) -> None:
    target = tmp_path / "folder"
    if there_before:
        target.mkdir()
    scripted.faults["x"].append(status(403, {"detail": "gone"}))
    with pytest.raises(Exception, match="gone"):
        rest.download_checkpoint(PATH, target).result(10)
    kept.digest_of = b"other bytes"
    with pytest.raises(InvalidAnswerError, match="digest"):
        rest.download_checkpoint(PATH, target).result(10)
    assert target.exists() == there_before
    # What has arrived stays, to be gone on with.
    scripted.faults["x"].extend([BROKEN_BODY, status(403)])
    with pytest.raises(Exception, match="403"):
        rest.download_checkpoint(PATH, target).result(10)
    assert any(path.suffix == ".part" for path in target.iterdir())


def test_an_archive_that_changed_is_fetched_anew(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults["x"].extend([BROKEN_BODY, status(403)])
    with pytest.raises(Exception, match="403"):
        rest.download_checkpoint(PATH, tmp_path).result(10)
    other = {**FILES, "adapter_config.json": b'{"r": 8}'}
    kept.data, kept.etag = archive(other), '"two"'
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == other


def test_bytes_that_do_not_match_the_digest_are_refused(
    kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    kept.digest_of = b"other bytes"
    with pytest.raises(InvalidAnswerError, match="digest"):
        rest.download_checkpoint(PATH, tmp_path).result(10)
    assert "adapter_config.json" not in contents(tmp_path)


def test_an_archive_that_always_breaks_at_one_place_is_an_error(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    kept.data = b"ab"
    scripted.faults["x"].extend([BROKEN_BODY] * 40)
    with pytest.raises(ServerFaultError, match="breaks off at byte 1 "):
        rest.download_checkpoint(PATH, tmp_path).result(10)


def test_a_redirect_is_followed(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults[ADDRESS].append(
        Fault(reply=Reply(302, b"", {"location": f"{scripted.url}/api/v1/x"}))
    )
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == FILES


def test_503_while_it_is_being_built_is_waited_for(
    scripted: ScriptedServer, kept: Archive, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults[ADDRESS].extend([status(503), status(503)])
    rest.download_checkpoint(PATH, tmp_path).result(10)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("name", ["../outside", "/absolute"])
def test_an_archive_cannot_write_outside_of_the_directory(
    kept: Archive, rest: RestClient, tmp_path: Path, name: str
) -> None:
    kept.data = archive({name: b"x"})
    target = tmp_path / "target"
    try:
        rest.download_checkpoint(PATH, target).result(10)
    except InvalidAnswerError:
        pass
    assert not (tmp_path / "outside").exists()
    assert not Path("/absolute").exists()


def test_a_checkpoint_that_is_not_there(
    scripted: ScriptedServer, rest: RestClient, tmp_path: Path
) -> None:
    scripted.faults[ADDRESS].append(status(404))
    with pytest.raises(NotFoundError):
        rest.download_checkpoint(PATH, tmp_path).result(10)
