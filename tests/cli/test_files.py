"""verify and export: on the files, with or without a server."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.store import ReadOnly, Store
from holdfast.store.files import LocalFiles, WriteFile
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


def test_a_damaged_checkpoint_does_not_keep_the_others_from_being_verified(
    store: Store, data_dir: Path
) -> None:
    broken, lost, whole = (add_checkpoint(store, name=name) for name in ("broken", "lost", "whole"))
    manifest = data_dir / "store" / "manifests" / broken.id
    manifest.write_bytes(manifest.read_bytes()[:-1])
    (data_dir / "store" / "manifests" / lost.id).unlink()
    none = "tinker://R/weights/none"
    paths = [f"tinker://{m.key}" for m in (broken, lost, whole)]
    flipped = add_checkpoint(store, {WEIGHTS: b"other weights"}, name="flipped")
    blob = flip(store, data_dir, flipped.files[WEIGHTS].hash)
    result = holdfast("checkpoint", "verify", *paths, none, f"tinker://{flipped.key}", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["checked"]["manifests"] == 2
    assert document["checked"]["bytes"] == whole.size + flipped.size
    told = {problem["path"]: problem for problem in document["problems"]}
    assert {path: problem["code"] for path, problem in told.items()} == {
        paths[0]: "corrupt_manifest",
        paths[1]: "missing_manifest",
        none: "missing_name",
        f"tinker://{flipped.key}": "corrupt_blob",
    }
    assert str(manifest) in told[paths[0]]["message"]
    assert str(blob) in told[f"tinker://{flipped.key}"]["message"]
    assert all(path[9:] in problem["message"] for path, problem in told.items())
    assert paths[0] in fails("checkpoint", "export", paths[0], data_dir / "x.tar")
    lines = holdfast("checkpoint", "verify", *paths).stderr.splitlines()
    assert lines[0].endswith("read: 2 problems")
    assert [line.partition(paths[0])[0] for line in lines[1:2]] == ["Error: "]


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


@pytest.mark.parametrize("target", ["a.tar", "d"])
def test_an_export_is_on_the_disk_when_it_appears(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    manifest = add_checkpoint(store)
    out = tmp_path / "out"
    out.mkdir()
    synced: set[tuple[int, int, int]] = set()
    appeared: list[set[str]] = []

    def state(found: os.stat_result) -> tuple[int, int, int]:
        return found.st_ino, found.st_size, found.st_mtime_ns

    def unsynced() -> set[str]:
        return {path.name for path in out.rglob("*") if state(path.stat()) not in synced}

    def sync(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
        fsync(handle)
        synced.add(state(os.fstat(handle)))

    def rename(path: Path, to: Path, rename: Callable[..., Path] = Path.rename) -> Path:
        appeared.append(unsynced())
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    holdfast("checkpoint", "export", f"tinker://{manifest.key}", out / target)
    assert appeared == [set()]
    assert [path.name for path in out.iterdir()] == [target]
    assert state(out.stat()) in synced
    (out / target / "more" if target == "d" else out / "more").write_bytes(b"not synced")
    assert unsynced() >= {"more"}


def test_a_checkpoint_is_exported_from_a_disk_that_is_read_only(
    store: Store, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = add_checkpoint(store)
    create = LocalFiles.create

    def read_only(files: LocalFiles, path: str) -> WriteFile:
        if path.startswith(str(data_dir)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return create(files, path)

    monkeypatch.setattr(LocalFiles, "create", read_only)
    holdfast("checkpoint", "export", f"tinker://{manifest.key}", tmp_path / "d")
    for name, blob in manifest.files.items():
        assert len((tmp_path / "d" / name).read_bytes()) == blob.size
    with pytest.raises(ReadOnly, match="Read-only file system"):
        store.put_blob([b"new"])


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
