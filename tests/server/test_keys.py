"""API keys: who may do what, and that a credential is kept nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.support.sdk import WAIT, step
from tests.support.server import ServerProcess

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))


@pytest.fixture(scope="module")
def keyed(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, dict[str, str]]]:
    """A server with keys of two owners."""
    server = ServerProcess(tmp_path_factory.mktemp("keyed"), models=models)
    keys = {
        owner: subprocess.run(
            [HOLDFAST, "key", "create", owner, f"--data-dir={server.data_dir}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for owner in ("alice", "bob")
    }
    with server:
        yield server, keys
    assert "Traceback" not in server.log, server.log
    for key in keys.values():
        assert key not in server.log


@pytest.fixture
def alice(
    keyed: tuple[ServerProcess, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tinker.ServiceClient]:
    server, keys = keyed
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=server.url, api_key=keys["alice"]) as service:
        yield service


@pytest.fixture
def bob(
    keyed: tuple[ServerProcess, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tinker.ServiceClient]:
    server, keys = keyed
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=server.url, api_key=keys["bob"]) as service:
        yield service


def saved_by(service: tinker.ServiceClient, name: str) -> tuple[tinker.TrainingClient, str]:
    client = service.create_lora_training_client("small-llama", rank=4).result(timeout=WAIT)
    step(client, 1)
    return client, client.save_state(name).result(timeout=WAIT).path


def test_an_unknown_key_is_refused(
    keyed: tuple[ServerProcess, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with pytest.raises(tinker.AuthenticationError, match="API key") as refusal:
        stranger = tinker.RestClient(base_url=keyed[0].url, api_key="tml-stranger-secret")
        stranger.list_training_runs().result(timeout=WAIT)
    assert "tml-stranger-secret" not in str(refusal.value)


def test_runs_and_checkpoints_of_others_do_not_exist(
    alice: tinker.ServiceClient, bob: tinker.ServiceClient
) -> None:
    rest = bob.create_rest_client()
    before = runs_of(rest)
    client, path = saved_by(alice, "private")
    with pytest.raises(tinker.NotFoundError, match="not found"):
        rest.get_training_run(client.model_id).result(timeout=WAIT)
    with pytest.raises(tinker.NotFoundError, match="not found"):
        rest.delete_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    with pytest.raises(tinker.NotFoundError, match="not found"):
        rest.get_weights_info_by_tinker_path(path).result(timeout=WAIT)
    with pytest.raises(tinker.RequestFailedError, match="not found"):
        bob.create_training_client_from_state(path).result(timeout=WAIT)
    listed = rest.list_user_checkpoints().result(timeout=WAIT).checkpoints
    assert path not in [checkpoint.tinker_path for checkpoint in listed]
    assert runs_of(rest) == before


def runs_of(rest: tinker.RestClient) -> list[str]:
    """The ids of all runs that its user has."""
    found = rest.list_training_runs(limit=1000).result(timeout=WAIT).training_runs
    return [run.training_run_id for run in found]


def test_a_published_checkpoint_can_be_read_and_not_changed(
    alice: tinker.ServiceClient, bob: tinker.ServiceClient
) -> None:
    _, path = saved_by(alice, "public")
    alice.create_rest_client().publish_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    copy = bob.create_training_client_from_state_with_optimizer(path).result(timeout=WAIT)
    step(copy, 2)
    with pytest.raises(tinker.PermissionDeniedError, match="another owner"):
        bob.create_rest_client().delete_checkpoint_from_tinker_path(path).result(timeout=WAIT)


def test_an_access_token_opens_a_checkpoint_and_is_kept_nowhere(
    keyed: tuple[ServerProcess, dict[str, str]],
    alice: tinker.ServiceClient,
    bob: tinker.ServiceClient,
) -> None:
    server, keys = keyed
    _, path = saved_by(alice, "shared")
    opened = bob.create_training_client_from_state(path, weights_access_token=keys["alice"])
    client = opened.result(timeout=WAIT)
    client.load_state_with_optimizer(path, weights_access_token=keys["alice"]).result(timeout=WAIT)
    step(client, 2)
    kept = [
        file
        for file in server.directory.rglob("*")
        if file.is_file() and keys["alice"].encode() in file.read_bytes()
    ]
    assert not kept
