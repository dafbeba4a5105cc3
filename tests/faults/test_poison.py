"""An operation with which every server ends fails in the end; everybody else goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker
from tinker import types

from holdfast.runs.poison import MOST_BEGUN_AGAIN
from tests.faults.server import BASE_MODEL, FaultyServer
from tests.support.processes import wait_until
from tests.support.sdk import batch, service_client

ADAM = types.AdamParams(learning_rate=1e-3)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_operation_that_ends_the_server_fails_and_its_run_goes_on(
    model: Path, tmp_path: Path
) -> None:
    with (
        FaultyServer(tmp_path / "server", model) as server,
        service_client(server) as service,
    ):
        client = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1)
        client.forward_backward(batch(1), "cross_entropy").result(timeout=120)
        point = server.points / "operation.computed"
        point.touch()
        poison = client.forward_backward(batch(2), "cross_entropy")
        step = client.optim_step(ADAM)
        for _ in range(1 + MOST_BEGUN_AGAIN):
            wait_until(lambda: not server.alive, otherwise="the server does not come to it")
            point.touch()
            server.start()
        with pytest.raises(tinker.RequestFailedError, match="the server ended 5 times"):
            poison.result(timeout=120)
        with pytest.raises(tinker.RequestFailedError, match="the server ended 5 times"):
            step.result(timeout=120)  # the gradients are not complete
        point.unlink()
        client.forward_backward(batch(3), "cross_entropy").result(timeout=120)
        client.optim_step(ADAM).result(timeout=120)
        assert server.alive
