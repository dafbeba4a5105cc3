"""64 training clients in one process, each with 20 submissions in flight, on a real server."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from holdfast import Datum, Future, ModelInput, ServiceClient
from tests.client.scenario import MODEL

CLIENTS, EACH = 64, 20
DATUM = Datum(
    ModelInput.from_ints(list(range(10, 26))),
    {"target_tokens": list(range(11, 27)), "weights": [1.0] * 16},
)


def sockets() -> int:
    count = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            count += str(name.readlink()).startswith("socket:")
        except OSError:
            pass
    return count


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.timeout(280)
def test_64_clients_finish_in_order_in_bounded_memory_under_200_sockets(
    service: ServiceClient,
) -> None:
    making = [service.create_lora_training_client(MODEL, rank=2) for _ in range(CLIENTS)]
    clients = [made.result(200) for made in making]
    order: dict[str, list[int]] = {client.model_id: [] for client in clients}
    futures: list[Future[object]] = []
    before = resident_megabytes()
    most_sockets = 0
    most_memory = 0.0

    def note(model_id: str, i: int, _: object) -> None:
        order[model_id].append(i)

    started = time.monotonic()
    for i in range(EACH):
        for client in clients:
            future: Future[object] = (
                client.forward_backward([DATUM], "cross_entropy")  # type: ignore[assignment]
                if i % 2 == 0
                else client.optim_step()
            )
            future.add_done_callback(partial(note, client.model_id, i))
            futures.append(future)
    # Submitting waits for nothing that the server does.
    assert time.monotonic() - started < 5
    while not all(future.done() for future in futures):
        most_sockets = max(most_sockets, sockets())
        most_memory = max(most_memory, resident_megabytes())
        time.sleep(0.05)
    for future in futures:
        future.result()
    assert all(seen == list(range(EACH)) for seen in order.values())
    assert most_sockets < 200
    assert most_memory - before < 100
