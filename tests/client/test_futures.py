"""Waiting: in threads and in asyncio, with time-outs and cancellation, once and many times."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from holdfast import Datum, ModelInput, ServiceClient, TrainingClient
from holdfast.errors import (
    AwaitTimeoutError,
    ClosedError,
    NotFoundError,
    OperationCancelledError,
    RequestError,
)
from holdfast.protocol.errors import failed_future_body
from tests.client.conftest import quiet
from tests.client.scripted import Reply, ScriptedServer, status

PATH = "tinker://r/weights/a"


def test_a_time_out_of_result_leaves_the_operation_alone(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.5
    future = training.save_state("a")
    with pytest.raises(AwaitTimeoutError, match="may still finish"):
        future.result(timeout=0.05)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0.05)
    assert not future.done()
    assert future.result(10).path.endswith("/a")
    assert future.done()
    assert future.exception() is None
    assert len(scripted.sent("save_weights")) == 1


def test_a_capped_load_says_that_it_may_still_finish_and_the_client_stays_usable(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 1.0
    for load in (training.load_state, training.load_state_with_optimizer):
        with pytest.raises(AwaitTimeoutError, match="may still finish"):
            load(PATH, await_timeout=0.1).result(10)
    training.optim_step().result(10)
    kinds = [kind for _, kind in scripted.models[training.model_id].applied]
    assert kinds == ["load_weights", "load_weights", "optim_step"]


def test_waiting_is_unbounded_by_default(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds, scripted.hold = 2.5, 0.5
    started = time.monotonic()
    training.load_state(PATH).result()
    assert time.monotonic() - started >= 2.5


def test_cancelling_ends_the_wait_and_keeps_the_order(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.3
    first, second, third = (training.optim_step() for _ in range(3))
    assert second.cancel()
    with pytest.raises(OperationCancelledError, match="may still finish"):
        second.result(10)
    assert second.cancelled()
    assert isinstance(second.exception(), OperationCancelledError)
    first.result(10)
    third.result(10)
    assert not first.cancel()
    assert [seq for seq, _ in scripted.models[training.model_id].applied] == [1, 2, 3]


def test_several_threads_may_wait_for_one_result(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.2
    future = training.save_state("a")
    paths: list[str] = []
    threads = [
        threading.Thread(target=lambda: paths.append(future.result(10).path)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 5


def test_waiting_in_a_done_callback_is_refused_instead_of_hanging(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.1
    errors: list[BaseException] = []
    later = training.optim_step()

    def callback(_: object) -> None:
        try:
            training.optim_step().result()
        except RuntimeError as error:
            errors.append(error)

    later.add_done_callback(callback)
    later.result(10)
    time.sleep(0.3)
    assert len(errors) == 1
    assert "wait for ever" in str(errors[0])


def test_a_client_in_the_making_can_be_used_as_the_client(client: ServiceClient) -> None:
    training = client.create_lora_training_client("tiny")
    assert training.get_info().lora_rank == 8
    assert training.optim_step().result(10).type == "optim_step"


def test_a_closed_client_refuses_and_frees_its_model(
    scripted: ScriptedServer, client: ServiceClient
) -> None:
    with client.create_lora_training_client("tiny").result(10) as training:
        training.optim_step().result(10)
    assert scripted.alive == []
    with pytest.raises(ClosedError):
        training.optim_step()
    training.close()


def test_unload_follows_what_was_called_before(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.2
    saved = training.save_state("a")
    unloaded = training.unload()
    assert unloaded.result(10).model_id == training.model_id
    assert saved.done()
    assert saved.result().path.endswith("/a")


def test_close_gives_up_what_waits(scripted: ScriptedServer, training: TrainingClient) -> None:
    scripted.op_seconds = 5.0
    waiting = training.optim_step()
    while not scripted.sent("optim_step"):
        time.sleep(0.01)
    training.close()
    with pytest.raises(ClosedError):
        waiting.result(10)


@pytest.mark.anyio
async def test_async_methods_give_the_same_results_and_errors(
    scripted: ScriptedServer, client: ServiceClient
) -> None:
    training = await client.create_lora_training_client_async("tiny")
    datum = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [1.0]})
    batch = await training.forward_backward_async([datum], "cross_entropy")
    step = await training.optim_step_async()
    assert (await batch).metrics == {"loss:sum": 1.0}
    assert (await step).type == "optim_step"
    saved = await (await training.save_state_async("a"))
    assert saved.path.endswith("/a")
    scripted.faults["load_weights"].append(status(404))
    with pytest.raises(NotFoundError):
        await (await training.load_state_async(PATH))
    with pytest.raises(RequestError):
        await training.forward_async([], "cross_entropy")
    assert [seq for seq, _ in scripted.models[training.model_id].applied] == [1, 2, 3]


@pytest.mark.anyio
async def test_a_cancelled_task_stops_waiting_and_the_result_stays(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.4
    future = training.save_state("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await future
    with pytest.raises(AwaitTimeoutError, match="may still finish"):
        await future.result_async(timeout=0.05)
    first, second = await asyncio.gather(future, future)
    assert first == second


@pytest.mark.anyio
async def test_an_error_that_nobody_waits_for_any_more_prints_nothing(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.2
    failed = failed_future_body("no gradients", category="user", code="x")
    scripted.results["optim_step"] = lambda request, seq: Reply.json(failed)
    with quiet(asyncio.get_running_loop()):
        future = training.optim_step()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await future
        await asyncio.to_thread(future.exception, 10)
        await asyncio.sleep(0.05)  # until this loop has heard of it
        assert isinstance(future.exception(), RequestError)


@pytest.mark.anyio
async def test_waiting_never_stalls_the_callers_loop(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.5
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await training.optim_step()
    ticking.cancel()
    assert ticks >= 20


@pytest.mark.anyio
async def test_a_service_client_is_an_async_context_manager(scripted: ScriptedServer) -> None:
    async with ServiceClient(base_url=scripted.url) as client:
        training = await client.create_lora_training_client("tiny")
        async with training:
            await training.optim_step()
        assert scripted.alive == []
    assert [r.path for r in scripted.requests][-1] == "sessions/S1/finish"
