"""A server whose checkpoints are in an object storage: a real S3 server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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

    checked = holdfast("checkpoint", "verify", "--all", f"--store={url}", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["checked"]["blobs"] > 0
    # The data directory knows where its checkpoints are.
    found = holdfast("doctor", f"--data-dir={stored.data_dir}")
    assert found.returncode == 0, found.stdout + found.stderr
    # Without it, the store alone is enough to know them again.
    lost = holdfast("doctor", f"--data-dir={tmp_path / 'new'}", f"--store={url}", "--repair")
    assert lost.returncode == 0, lost.stdout + lost.stderr
    assert "checkpoints listed" in lost.stderr, lost.stderr


def test_a_store_that_cannot_be_used_is_told_in_one_sentence(s3: S3Server, tmp_path: Path) -> None:
    missing = holdfast("serve", "--store=s3://no-such-bucket/x", f"--data-dir={tmp_path}")
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: ")
    assert "there is no such bucket: NoSuchBucket" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert missing.stderr.count("\n") == 1
