"""Order of calls is order of numbers, from any number of threads, with few sockets."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from holdfast import Datum, Future, ModelInput, ServiceClient, TrainingClient
from holdfast.client.runtime import CONNECTIONS
from holdfast.client.types import OptimStepResponse
from holdfast.errors import InvalidTensorError, RequestError
from tests.client.conftest import QUICK
from tests.client.scripted import Fault, Reply, Request, ScriptedServer, status


def datum(length: int = 2) -> Datum:
    tokens = list(range(1, length + 1))
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": [1.0] * length})


def test_calls_from_several_threads_are_numbered_in_their_order(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    """Each thread notes its calls under one lock; the server must see that very order."""
    calls: list[str] = []
    lock = threading.Lock()
    futures: list[Future[object]] = []

    def work(thread: int) -> None:
        for i in range(25):
            name = f"t{thread}-{i}"
            with lock:
                calls.append(name)
                futures.append(training.save_state(name))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future in futures:
        future.result(30)
    sent = [request.json() for request in scripted.sent("save_weights")]
    assert [body["path"] for body in sent] == calls
    assert [body["seq_id"] for body in sent] == list(range(1, 201))


def test_unlocked_threads_get_every_number_once(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    futures: list[Future[object]] = []

    def work() -> None:
        for _ in range(50):
            futures.append(training.optim_step())  # type: ignore[arg-type]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future in futures:
        future.result(30)
    applied = scripted.models[training.model_id].applied
    assert [seq for seq, _ in applied] == list(range(1, 401))


def test_submitting_never_waits_for_earlier_operations(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.2
    started = time.monotonic()
    futures = [training.optim_step() for _ in range(10)]
    assert time.monotonic() - started < 0.15
    futures[-1].result(10)
    assert time.monotonic() - started >= 2.0
    assert all(future.done() for future in futures)


def test_a_large_batch_is_split_and_its_result_is_one(scripted: ScriptedServer) -> None:
    scripted.config = {"fwdbwd_max_chunk_len": 2}
    with ServiceClient(base_url=scripted.url, retry_config=QUICK) as client:
        training = client.create_lora_training_client("tiny").result(10)
        data = [datum(n) for n in (1, 2, 3, 4, 5)]
        whole = training.forward_backward(data, "cross_entropy")
        after = training.optim_step()
        output = whole.result(10)
        after.result(10)
    assert [len(item["logprobs"]) for item in output.loss_fn_outputs] == [1, 2, 3, 4, 5]
    assert output.metrics == {"loss:sum": 5.0}
    applied = scripted.models[training.model_id].applied
    assert applied == [
        (1, "forward_backward"),
        (2, "forward_backward"),
        (3, "forward_backward"),
        (4, "optim_step"),
    ]


def test_a_part_that_fails_fails_the_batch(scripted: ScriptedServer) -> None:
    scripted.config = {"fwdbwd_max_chunk_len": 1}
    with ServiceClient(base_url=scripted.url, retry_config=QUICK) as client:
        training = client.create_lora_training_client("tiny").result(10)
        scripted.faults["forward_backward"].extend(
            [Fault(), status(400, {"detail": "part two"}), Fault()]
        )
        with pytest.raises(RequestError, match="part two"):
            training.forward_backward([datum(), datum(), datum()], "cross_entropy").result(10)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.forward_backward([], "cross_entropy"),
        lambda client: client.forward_backward([datum()], "x", {"a": [1]}),
        lambda client: client.forward_backward(
            [Datum(ModelInput.from_ints([2**40]), {})], "cross_entropy"
        ),
        lambda client: client.save_state("a", ttl_seconds="1"),
        lambda client: client.save_state(3),
        lambda client: client.optim_step("adam"),
    ],
)
def test_what_cannot_be_sent_is_an_error_of_the_call_and_uses_no_number(
    scripted: ScriptedServer, training: TrainingClient, call: Callable[[TrainingClient], object]
) -> None:
    with pytest.raises(RequestError):
        call(training)
    training.optim_step().result(10)
    assert scripted.models[training.model_id].applied == [(1, "optim_step")]


def test_tensors_of_other_kinds_are_refused() -> None:
    with pytest.raises(InvalidTensorError, match="'mine' is a list"):
        Datum(ModelInput.from_ints([1]), {"mine": [1.0]})
    with pytest.raises(InvalidTensorError, match="differ in length"):
        Datum(ModelInput.from_ints([1]), {"weights": [[1.0], [1.0, 2.0]]})


@pytest.mark.timeout(120)
def test_64_clients_with_20_submissions_each_finish_in_order_under_200_sockets(
    scripted: ScriptedServer, client: ServiceClient
) -> None:
    scripted.op_seconds = 0.05
    assert sum(CONNECTIONS.values()) < 200
    trainings = [client.create_lora_training_client("tiny") for _ in range(64)]
    clients = [made.result(30) for made in trainings]
    before = open_sockets()
    finished: dict[str, list[int]] = {one.model_id: [] for one in clients}
    futures: list[Future[OptimStepResponse]] = []
    most = 0

    def note(order: list[int], i: int, _: object) -> None:
        order.append(i)

    for i in range(20):
        for one in clients:
            future = one.optim_step()
            future.add_done_callback(partial(note, finished[one.model_id], i))
            futures.append(future)
    while not all(future.done() for future in futures):
        most = max(most, open_sockets() - before)
        time.sleep(0.02)
    for done in futures:
        done.result()
    assert all(order == list(range(20)) for order in finished.values())
    for one in clients:
        assert [seq for seq, _ in scripted.models[one.model_id].applied] == list(range(1, 21))
    # Both ends are in this process: each connection counts twice.
    assert most / 2 < 200
    assert scripted.peak_connections < 200


def open_sockets() -> int:
    count = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            count += str(name.readlink()).startswith("socket:")
        except OSError:
            pass
    return count


def test_finished_operations_hold_no_memory(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    """What is in flight is bounded by what the caller holds, whatever has gone before."""
    big = [datum(20_000)]
    for _ in range(3):
        training.forward_backward(big, "cross_entropy").result(10)
    scripted.requests.clear()
    gc.collect()
    outbox = training._outbox
    assert not outbox._queue
    assert not outbox._accepted


def test_one_poll_at_a_time_serves_a_model(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.05
    polling = most = 0

    def count(request: Request, seq: int) -> Reply:
        return Reply.json({"type": "optim_step"})

    scripted.results["optim_step"] = count
    futures = [training.optim_step() for _ in range(10)]
    while not futures[-1].done():
        polling = scripted.connections
        most = max(most, polling)
        time.sleep(0.005)
    # One to submit, one to poll, and at most one kept from making the client.
    assert most <= 3
