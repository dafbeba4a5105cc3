"""verify and export: on the files, with or without a server."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from holdfast.store import Store
from tests.cli.samples import add_checkpoint, fails, holdfast
from tests.store.samples import OPTIMIZER, WEIGHTS


def flip(store: Store, data_dir: Path, digest: str) -> Path:
    path = data_dir / "store" / "blobs" / digest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    return path


def test_whole_checkpoints_are_whole_and_a_flipped_bit_is_named(
    store: Store, data_dir: Path
) -> None:
    whole = add_checkpoint(store, name="whole")
    damaged = add_checkpoint(
        store, {WEIGHTS: b"other weights"}, name="damaged", kind="sampler", optimizer=None
    )
    assert "all whole" in holdfast("checkpoint", "verify", "--all").stderr
    path = flip(store, data_dir, damaged.files[WEIGHTS].hash)
    assert holdfast("checkpoint", "verify", f"tinker://{whole.key}").exit_code == 0
    for args in (["--all"], [f"tinker://{whole.key}", f"tinker://{damaged.key}"]):
        result = holdfast("checkpoint", "verify", *args, "--json")
        assert result.exit_code == 1
        document = json.loads(result.stdout)
        assert document["ok"] is False
        (problem,) = document["problems"]
        assert problem["code"] == "corrupt_blob"
        assert str(path) in problem["message"]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "PATHs"),
        (["--all", "tinker://R/weights/x"], 2, "PATHs"),
        (["tinker://R/weights/none"], 1, "there is no checkpoint tinker://R/weights/none"),
        (["tinker://R/wheights/x"], 2, "'wheights' is not a kind"),
        (["R/weights/x"], 2, "does not begin with"),
    ],
)
def test_mistakes_of_verify(data_dir: Path, args: list[str], status: int, message: str) -> None:
    assert message in fails("checkpoint", "verify", *args, status=status)


@pytest.mark.parametrize(
    "command", [["checkpoint", "verify", "--all"], ["doctor"], ["doctor", "--repair"]]
)
def test_a_wrong_data_directory_is_not_made_into_one(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("typo", "empty"):
        path = tmp_path / name
        assert f"{path}" in fails(*command, "--data-dir", path)
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "typo").exists()


def test_an_export_is_an_archive_or_a_directory(store: Store, tmp_path: Path) -> None:
    manifest = add_checkpoint(store)
    path = f"tinker://{manifest.key}"
    archive, directory = tmp_path / "a.tar", tmp_path / "d"
    assert json.loads(holdfast("checkpoint", "export", path, archive, "--json").stdout) == {
        "path": path,
        "target": str(archive),
        "size_bytes": manifest.size,
    }
    holdfast("checkpoint", "export", path, directory)
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        names = set(tar.getnames())
    assert names == {p.name for p in directory.iterdir()} == {"holdfast.json", *manifest.files}
    for name, blob in manifest.files.items():
        assert (directory / name).read_bytes() == store.read_blob(blob, what=name)
    for target in (archive, directory):
        assert "exists" in fails("checkpoint", "export", path, target)


def test_an_export_that_fails_leaves_nothing(store: Store, data_dir: Path, tmp_path: Path) -> None:
    manifest = add_checkpoint(store)
    flip(store, data_dir, manifest.files[OPTIMIZER].hash)
    path = f"tinker://{manifest.key}"
    out = tmp_path / "out"
    out.mkdir()
    for target in (out / "a.tar", out / "d"):
        assert OPTIMIZER in fails("checkpoint", "export", path, target)
    assert list(out.iterdir()) == []
    missing = fails("checkpoint", "export", path, out / "no" / "such" / "a.tar")
    assert "No such file or directory" in missing
