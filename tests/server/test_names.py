"""Checkpoint names: the good ones work, the bad ones are refused at once and do no harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.support.sdk import WAIT, service_client, step
from tests.support.server import ServerProcess

GOOD = ["epoch-3-loss-1.23", "final", "000060", "step_000100", "A", "a..b", "x" * 128]

BAD = [
    "../../x",
    "a/b",
    "",
    "x" * 500,
    "x" * 129,
    "a\nb",
    "a\0b",
    "a\x7fb",
    ".",
    "..",
    ".hidden",
    "-rf",
    "/etc/passwd",
    "a b",
    "a:b",
    "a\\b",
    "..%2f..%2fx",
    "final\n",
    "é",
    "\u202efinal",
    "auto.5",
]

AT_ONCE = 3.0
"""Seconds: far below any client's retries and any wait for a missing number."""


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[tinker.TrainingClient]:
    """One run for all names: whatever is refused, the run must go on."""
    with service_client(server) as service:
        yield service.create_lora_training_client("small-llama", rank=4).result(timeout=WAIT)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_works(client: tinker.TrainingClient, name: str) -> None:
    saved = client.save_state(name).result(timeout=WAIT)
    assert saved.path == f"tinker://{client.model_id}/weights/{name}"
    client.load_state_with_optimizer(saved.path).result(timeout=WAIT)
    sampler = client.save_weights_for_sampler(name).result(timeout=WAIT)
    assert sampler.path == f"tinker://{client.model_id}/sampler_weights/{name}"


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_bad_name_is_refused_at_once_and_the_run_stays_usable(
    server: ServerProcess, client: tinker.TrainingClient, name: str
) -> None:
    started = time.monotonic()
    for save in (client.save_state, client.save_weights_for_sampler):
        with pytest.raises(tinker.BadRequestError) as refusal:
            save(name).result(timeout=WAIT)
        shown = repr(name)[1:-1][:60]
        assert shown in str(refusal.value).replace("\\\\", "\\"), refusal.value
        assert "checkpoint name" in str(refusal.value)
    step(client, 1)
    assert time.monotonic() - started < AT_ONCE


def test_a_bad_name_writes_nothing(server: ServerProcess, client: tinker.TrainingClient) -> None:
    def outside() -> set[Path]:
        inside = server.data_dir / "store"
        return {p for p in server.directory.rglob("*") if not p.is_relative_to(inside)}

    before = outside()
    for name in ("../../x", "../x", str(server.directory / "x")):
        with pytest.raises(tinker.BadRequestError):
            client.save_state(name).result(timeout=WAIT)
    assert outside() == before


@pytest.mark.parametrize(
    "path",
    [
        "final",
        "",
        "tinker://",
        "tinker://run/weights",
        "tinker://run/weights/a/b",
        "tinker://run/weights/../../../etc/passwd",
        "tinker://../weights/final",
        "tinker://run/nonsense/final",
        "http://run/weights/final",
        "tinker://" + "r" * 3000 + "/weights/final",
    ],
    ids=lambda path: path[:50] or "empty",
)
def test_a_malformed_path_is_refused_at_once_and_the_run_stays_usable(
    client: tinker.TrainingClient, path: str
) -> None:
    started = time.monotonic()
    with pytest.raises((tinker.BadRequestError, tinker.UnprocessableEntityError), match="path"):
        client.load_state(path).result(timeout=WAIT)
    step(client, 1)
    assert time.monotonic() - started < AT_ONCE
