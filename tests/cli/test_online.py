"""The commands that ask a server, against a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from holdfast import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from holdfast.cli.run import _standing
from holdfast.cli.server_process import free_port
from holdfast.protocol.rest import RunStatus, TrainingRun
from tests.cli.samples import fails, holdfast
from tests.support.server import ServerProcess

MODEL = "holdfast-tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server")) as running:
        yield running
    assert "Traceback" not in running.log, running.log


@pytest.fixture(scope="module")
def run(server: ServerProcess) -> Iterator[str]:
    """A run with the checkpoints weights/one, weights/two and sampler_weights/two."""
    batch = [
        Datum(
            model_input=ModelInput.from_ints([72, 101, 108]),
            loss_fn_inputs={
                "target_tokens": TensorData([101, 108, 108], "int64"),
                "weights": TensorData([1.0] * 3, "float32"),
            },
        )
    ]
    with ServiceClient(base_url=server.url, api_key="tml-x") as service:
        client = service.create_lora_training_client(
            MODEL, rank=4, user_metadata={"task": "[bold]greeting[/]"}
        ).result()
        for name in ("one", "two"):
            client.forward_backward(batch, "cross_entropy").result()
            client.optim_step(AdamParams(learning_rate=1e-3)).result()
            client.save_state(name, user_metadata={"n": name}).result()
        client.save_weights_for_sampler("two").result()
        yield client.model_id


@pytest.fixture(autouse=True)
def address(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)


def json_of(*args: object) -> Any:
    result = holdfast(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_list_names_every_checkpoint(run: str) -> None:
    found = json_of("checkpoint", "list", "--run", run)
    assert [item["path"] for item in found] == [
        f"tinker://{run}/{kind}" for kind in ("sampler_weights/two", "weights/two", "weights/one")
    ]
    (one,) = [item for item in found if item["name"] == "one"]
    assert one.keys() == {
        "path", "run", "kind", "name", "type", "step", "size_bytes", "own_bytes", "created",
        "expires", "public", "user_metadata",
    }  # fmt: skip
    assert (one["run"], one["type"], one["step"]) == (run, "training", 1)
    assert (one["expires"], one["public"], one["user_metadata"]) == (None, False, {"n": "one"})
    assert datetime.fromisoformat(one["created"]).tzinfo is not None
    assert 0 < one["own_bytes"] < one["size_bytes"]
    assert json_of("checkpoint", "list", "--run", run, "--limit", 1) == found[:1]
    assert json_of("checkpoint", "list", "--limit", 1) == json_of("checkpoint", "list")[:1]
    text = holdfast("checkpoint", "list", "--run", run, "--limit", 2)
    assert f"tinker://{run}/\n" in text.stdout  # whole, and no name of a smiley
    assert "weights/two" in text.stdout
    assert "2 of 3 shown" in text.stderr


def test_a_run_is_shown_with_its_checkpoints(run: str) -> None:
    (listed,) = [item for item in json_of("run", "list") if item["run"] == run]
    shown = json_of("run", "info", run)
    assert {k: v for k, v in shown.items() if k != "checkpoints"} == listed
    assert (shown["base_model"], shown["lora_rank"]) == (MODEL, 4)
    assert shown["last_checkpoint"] == f"tinker://{run}/weights/two"
    assert len(shown["checkpoints"]) == 3
    status = shown["status"]
    assert status["state"] in ("live", "idle", "evicted")
    assert status["position"] == 7
    assert 0 < status["snapshot"]["position"] <= 7
    assert status["recoveries"] == status["replayed"] == 0
    text = holdfast("run", "info", run).stdout
    assert f"position {status['snapshot']['position']}" in text
    assert "[bold]greeting[/]" in text
    facts = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    assert facts["last checkpoint"].strip() == shown["last_checkpoint"]
    assert facts["last request"].rstrip().endswith(" UTC")
    assert run in holdfast("run", "list").stdout


def test_info_tells_everything(run: str, server: ServerProcess) -> None:
    path = f"tinker://{run}/weights/two"
    manifest = server.manifest(path)
    shown = json_of("checkpoint", "info", path)
    assert shown["manifest"] == manifest.id
    assert shown["base_revision"] == manifest.base_revision
    assert shown["lora"]["rank"] == 4
    assert shown["files"] == {
        name: {"bytes": blob.size, "blake3": blob.hash} for name, blob in manifest.files.items()
    }
    text = holdfast("checkpoint", "info", path).stdout
    assert all(blob.hash in text for blob in manifest.files.values())


def test_a_checkpoint_lives_from_copy_to_deletion(run: str, tmp_path: Path) -> None:
    copy = holdfast("checkpoint", "copy", f"tinker://{run}/weights/one").stdout.strip()
    assert json_of("checkpoint", "info", copy)["expires"] is None
    before = datetime.now().astimezone()
    changed = json_of("checkpoint", "ttl", copy, "2d")
    left = datetime.fromisoformat(changed["expires"]) - before
    assert 2 * 86400 <= left.total_seconds() < 2 * 86400 + 60
    assert json_of("checkpoint", "ttl", copy, "never")["expires"] is None
    assert json_of("checkpoint", "publish", copy)["public"] is True
    assert json_of("checkpoint", "publish", copy)["public"] is True
    assert json_of("checkpoint", "unpublish", copy)["public"] is False
    directory = tmp_path / "down"
    fetched = json_of("checkpoint", "download", copy, directory)
    assert {p.name for p in directory.iterdir()} >= set(fetched["files"])
    other = json_of("checkpoint", "copy", copy, "--ttl", "1h")["path"]
    asked = holdfast("checkpoint", "delete", copy, other, input="n\n")
    assert asked.exit_code == 1
    assert "Delete 2 checkpoints?" in asked.stderr
    missing = f"tinker://{run}/weights/none"
    result = holdfast("checkpoint", "delete", copy, missing, other, "--yes", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["deleted"] == [copy, other]
    assert list(document["failed"]) == [missing]
    assert "not found" in fails("checkpoint", "info", copy)


def test_what_was_downloaded_can_be_imported_beside_the_server(
    run: str, server: ServerProcess, tmp_path: Path
) -> None:
    directory = tmp_path / "two"
    json_of("checkpoint", "download", f"tinker://{run}/weights/two", directory)
    back = json_of(
        "checkpoint", "import", directory, "--name", "back", "--data-dir", server.data_dir
    )["path"]
    # The running server lists it, and trains on from it.
    assert back in [item["path"] for item in json_of("checkpoint", "list")]
    new_run = back.removeprefix("tinker://").partition("/")[0]
    assert json_of("run", "info", new_run)["base_model"] == MODEL
    with ServiceClient(base_url=server.url, api_key="tml-x") as service:
        resumed = service.create_training_client_from_state_with_optimizer(back).result()
        saved = resumed.save_state("again").result().path
    assert dict(server.manifest(saved).files) == dict(
        server.manifest(f"tinker://{run}/weights/two").files
    )
    assert holdfast("doctor", "--data-dir", server.data_dir).exit_code == 0


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["chekpoint", "list"], 2, "did you mean checkpoint?"),
        (["checkpoint", "lst"], 2, "did you mean list?"),
        (["run", "xyzzy"], 2, "there are info, list"),
        (["checkpoint", "info", "tinker://R/weights"], 2, "2 parts"),
        (["checkpoint", "info", "tinker://R/weights/none"], 1, "tinker://R/weights/none"),
        (["checkpoint", "ttl", "tinker://R/weights/x", "soon"], 2, "'soon' is not a time"),
        (["checkpoint", "ttl", "tinker://R/weights/x", "5m"], 1, "one hour"),
        (["checkpoint", "delete"], 2, "PATHs"),
        (["checkpoint", "list", "--limit", "0"], 2, "--limit"),
        (["checkpoint", "list", "--run", "none"], 1, "'none' not found"),
        (["run", "info", "none"], 1, "no run 'none' on http"),
        (["run", "info", "none"], 1, "`holdfast run list` shows those"),
        (["run", "info", "tinker://R/weights/x"], 1, "run id 'tinker://R/weights/x' is not"),
        (["run", "list", "--url", "nonsense"], 1, "http://HOST:PORT"),
        (["run", "list", "--api-key", "tml-\n"], 1, "API key"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], status: int, message: str) -> None:
    assert message in fails(*args, status=status)


def test_recoveries_are_told_as_people_count() -> None:
    def told(**status: Any) -> dict[str, Any]:
        run = TrainingRun(
            training_run_id="R",
            base_model=MODEL,
            model_owner="local",
            is_lora=True,
            last_request_time=datetime.now(UTC),
            status=RunStatus(state="idle", **status),
        )
        return dict(_standing(run))

    assert told(recoveries=1, replayed=1)["recoveries"] == "1, with 1 operation replayed"
    assert told(recoveries=2, replayed=9)["recoveries"] == "2, with 9 operations replayed"
    assert told(recoveries=2, replayed=9)["diverged"] is None
    assert told(recoveries=2, replayed=9, divergences=3, diverged_at=5)["diverged"] == (
        "3 replayed operations gave other results under other numerics, most recently from "
        "position 5 on"
    )


def test_no_server_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.cli.online.PATIENCE", 0.1)
    url = f"http://127.0.0.1:{free_port()}"
    assert "is a server running there?" in fails("checkpoint", "list", "--url", url)
