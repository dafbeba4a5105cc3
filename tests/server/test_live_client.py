"""A client in the middle of its training loop sees a crash as a slow answer, and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tinker

from holdfast.cli.output import count
from tests.cli.samples import holdfast
from tests.support.processes import suspended, wait_until
from tests.support.raw import ELIXIR, RawRun
from tests.support.sdk import ADAM, WAIT, Trace, batch, datum, service_client, step, trace
from tests.support.server import ServerProcess

STEPS = tuple(range(1, 9))

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def crashing(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that tests may kill, as long as they leave one running."""
    with ServerProcess(tmp_path_factory.mktemp("crashing"), models=models) as running:
        yield running
    assert "Traceback" not in running.log, running.log


def train(
    server: ServerProcess,
    service: tinker.ServiceClient,
    during: Callable[[int], None] = lambda _seed: None,
) -> Trace:
    """A user's loop: pipelined steps, a save in the middle, a trace at the end.

    `during` is called while a step has been submitted and not been waited for.
    """
    made = service.create_lora_training_client("small-llama", rank=8, seed=3)
    client = made.result(timeout=WAIT)
    for seed in STEPS:
        gradients = client.forward_backward(batch(seed), "cross_entropy")
        applied = client.optim_step(ADAM)
        during(seed)
        gradients.result(timeout=WAIT)
        applied.result(timeout=WAIT)
        if seed == STEPS[len(STEPS) // 2]:
            client.save_state("middle").result(timeout=WAIT)
    return trace(server, client, (20, 21))


@pytest.fixture(scope="module")
def undisturbed(crashing: ServerProcess) -> Trace:
    with service_client(crashing) as service:
        return train(crashing, service)


def test_survives_kill_9_of_the_server(crashing: ServerProcess, undisturbed: Trace) -> None:
    """Once with a new server at once, once with requests sent while there is none."""
    killed = []
    starting: list[threading.Timer] = []

    def kill(seed: int) -> None:
        if seed == 3:
            crashing.kill_and_restart()
            killed.append(seed)
        elif seed == 6:
            crashing.kill()
            starting.append(threading.Timer(2.0, crashing.start))
            starting[0].start()
            killed.append(seed)

    with service_client(crashing) as service:
        try:
            assert train(crashing, service, kill) == undisturbed
        finally:
            for timer in starting:
                timer.join()
    assert killed == [3, 6]


def test_survives_kill_9_of_the_worker(crashing: ServerProcess, undisturbed: Trace) -> None:
    killed = []

    def kill(seed: int) -> None:
        if seed == 5:
            killed.append(crashing.kill_workers())

    with service_client(crashing) as service:
        assert train(crashing, service, kill) == undisturbed
    assert killed == [1], "there was a worker to kill"


def test_survives_an_orderly_restart(crashing: ServerProcess, undisturbed: Trace) -> None:
    def restart(seed: int) -> None:
        if seed == 4:
            crashing.restart()

    with service_client(crashing) as service:
        assert train(crashing, service, restart) == undisturbed


def test_a_different_batch_after_the_crash_would_be_noticed(
    crashing: ServerProcess, undisturbed: Trace
) -> None:
    """The comparison can fail: one step more, and everything differs."""
    with service_client(crashing) as service:
        made = service.create_lora_training_client("small-llama", rank=8, seed=3)
        client = made.result(timeout=WAIT)
        for seed in (*STEPS, STEPS[-1]):
            step(client, seed)
        other = trace(crashing, client, (20, 21))
    assert other.losses != undisturbed.losses
    assert (
        other.files["adapter_model.safetensors"] != undisturbed.files["adapter_model.safetensors"]
    )


def test_unfinished_gradients_survive_a_crash(crashing: ServerProcess) -> None:
    """Killed between the forward_backwards of one step: none is lost and none counts twice."""

    def accumulate(service: tinker.ServiceClient, crash: Callable[[], object]) -> Trace:
        made = service.create_lora_training_client("small-llama", rank=8, seed=3)
        client = made.result(timeout=WAIT)
        step(client, 1)
        for seed in (2, 3):
            client.forward_backward(batch(seed), "cross_entropy").result(timeout=WAIT)
        crash()
        client.forward_backward(batch(4), "cross_entropy").result(timeout=WAIT)
        return trace(crashing, client, (5,), finish_step=True)

    with service_client(crashing) as service:
        plain = accumulate(service, lambda: None)
        assert accumulate(service, crashing.kill_and_restart) == plain


def test_a_failed_batch_stays_failed_after_a_crash(crashing: ServerProcess) -> None:
    """The mark of incomplete gradients is rebuilt too, to the letter."""

    def fail(service: tinker.ServiceClient, crash: Callable[[], object]) -> tuple[str, Trace]:
        made = service.create_lora_training_client("small-llama", rank=8, seed=3)
        client = made.result(timeout=WAIT)
        step(client, 1)
        bad = client.forward_backward([datum([9999] * 5)], "cross_entropy")
        with pytest.raises(tinker.RequestFailedError, match="9999"):
            bad.result(timeout=WAIT)
        client.forward_backward(batch(2), "cross_entropy").result(timeout=WAIT)
        crash()
        marked = client.save_state("marked").result(timeout=WAIT).path
        files = crashing.manifest(marked).files
        with pytest.raises(tinker.RequestFailedError, match="9999"):
            client.optim_step(ADAM).result(timeout=WAIT)
        return files["optimizer.safetensors"].hash, trace(crashing, client, (3,))

    with service_client(crashing) as service:
        assert fail(service, crashing.kill_and_restart) == fail(service, lambda: None)


def test_results_and_submissions_outlive_a_crash(crashing: ServerProcess) -> None:
    with RawRun.open(crashing) as run:
        first = run.forward_backward(1)
        expected = run.result(first)
        info = "run", "info", run.model_id, "--url", crashing.url
        wait_until(lambda: status_of(info)["snapshot"])
        crashing.kill_and_restart()
        wait_until(crashing.worker_pids)
        with suspended(crashing.worker_pids()):
            assert status_of(info)["recoveries"] == 0, "the run is still to be recovered"
            second = run.optim_step(2)
            assert run.forward_backward(1) == first, "a repeated submission is recognised"
            assert run.result(first) == expected
            run.refused("forward_backward", run.batch(2, seed=9))
        assert run.result(second)["metrics"]["forward_backwards"] == 1
        wait_until(lambda: status_of(info)["recoveries"])  # counted just after it
        status = status_of(info)
        assert (status["recoveries"], status["divergences"]) == (1, 0)
        assert status["replayed"] <= 1  # none with a snapshot of it
        replayed = count(status["replayed"], "operation")
        assert f"1, with {replayed} replayed" in holdfast(*info).stdout


def status_of(info: Sequence[str]) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(holdfast(*info, "--json").stdout)["status"]
    return status


def test_a_gap_is_waited_for_anew_after_a_crash(crashing: ServerProcess) -> None:
    with RawRun.open(crashing, agent=ELIXIR) as run:
        run.result(run.forward_backward(1))
        waiting = run.optim_step(3)
        crashing.kill_and_restart()
        missing = run.forward_backward(2)
        assert run.result(waiting)["metrics"]["forward_backwards"] == 2
        run.result(missing)
