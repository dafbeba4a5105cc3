"""A server whose checkpoints are in an object storage: a real S3 server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from holdfast.catalog import Catalog
from holdfast.cli.main import main
from holdfast.cli.serve import command as serve_command
from holdfast.server.data_dir import CannotUse, existing_store, location, remember
from holdfast.server.settings import Settings
from holdfast.store import open_store
from tests.server.test_exact_resume import assert_three_way, created, saved_run
from tests.support.s3 import S3Server
from tests.support.sdk import service_client
from tests.support.server import ServerProcess


@pytest.fixture
def url(s3: S3Server) -> str:
    """The address of a store in a new bucket."""
    return f"s3://{s3.bucket()}/team/holdfast"


@pytest.fixture
def stored(models: dict[str, Path], tmp_path: Path, url: str) -> Iterator[ServerProcess]:
    """A server of the test's own that keeps its checkpoints there."""
    with ServerProcess(tmp_path / "server", models=models, args=[f"--store={url}"]) as running:
        yield running


def holdfast(*args: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("holdfast")), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_resumes_exactly_from_an_object_storage_after_a_kill(
    stored: ServerProcess, url: str, tmp_path: Path
) -> None:
    with service_client(stored) as service:
        saved = saved_run(stored, created(service), pending=True)
        stored.kill_and_restart()
        assert_three_way(stored, service, saved)
    stored.stop()
    assert not (stored.data_dir / "store").exists()
    assert url in stored.log

    checked = CliRunner().invoke(
        main, ["checkpoint", "verify", "--all", f"--store={url}", "--json"]
    )
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["checked"]["blobs"] > 0
    # The data directory knows where its checkpoints are.
    found = CliRunner().invoke(main, ["doctor", f"--data-dir={stored.data_dir}"])
    assert found.exit_code == 0, found.output
    # Without it, the store alone is enough to know them again.
    new = ["doctor", f"--data-dir={tmp_path / 'new'}", f"--store={url}", "--repair"]
    lost = CliRunner().invoke(main, new)
    assert lost.exit_code == 0, lost.output
    assert "checkpoints listed" in lost.stderr, lost.stderr


def test_a_store_that_cannot_be_used_is_told_in_one_sentence(s3: S3Server, tmp_path: Path) -> None:
    missing = holdfast("serve", "--store=s3://no-such-bucket/x", f"--data-dir={tmp_path}")
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: ")
    assert "there is no such bucket: NoSuchBucket" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert missing.stderr.count("\n") == 1


# Which store a data directory belongs to


def test_a_data_directory_stays_with_its_store(tmp_path: Path) -> None:
    assert location(tmp_path, None) == tmp_path / "store"
    assert location(tmp_path, "s3://bucket/x/") == "s3://bucket/x"
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    remember(tmp_path, None, catalog)
    assert location(tmp_path, None) == tmp_path / "store"
    remember(tmp_path, "s3://bucket/x/", catalog)
    remember(tmp_path, "s3://bucket/x", catalog)
    catalog.close()
    assert location(tmp_path, None) == "s3://bucket/x" == location(tmp_path, "s3://bucket/x/")
    with pytest.raises(CannotUse, match=r"are in s3://bucket/x, not in gs://other: leave --store"):
        location(tmp_path, "gs://other")


def test_a_data_directory_with_checkpoints_in_it_is_not_used_with_a_storage(tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    with pytest.raises(CannotUse, match=r"/store, not in s3://bucket/x: leave --store out, or"):
        location(tmp_path, "s3://bucket/x")


def test_looking_creates_no_store(s3: S3Server, url: str, tmp_path: Path) -> None:
    with pytest.raises(CannotUse, match=f"^there is no store at {url}$"):
        existing_store(tmp_path, url)
    with pytest.raises(CannotUse, match="is not the address of a store"):
        existing_store(tmp_path, "http://bucket/x")
    with pytest.raises(CannotUse, match="name the one that `holdfast serve` uses with --data-dir"):
        existing_store(tmp_path, None)


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_a_store_is_named_by_a_flag_the_environment_or_a_file(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Settings] = []
    monkeypatch.setattr("holdfast.server.serve.serve", started.append)
    args = [f"--data-dir={tmp_path}"]
    if how == "flag":
        args.append("--store=s3://bucket/x")
    elif how == "environment":
        monkeypatch.setenv("HOLDFAST_STORE", "s3://bucket/x")
    else:
        (tmp_path / "holdfast.toml").write_text('store = "s3://bucket/x"')
        args.append(f"--config={tmp_path / 'holdfast.toml'}")
    result = CliRunner().invoke(serve_command, args)
    assert result.exit_code == 0, result.output
    assert [settings.store for settings in started] == ["s3://bucket/x"]
