"""Checkpointing as a habit, against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from holdfast import (
    AdamParams,
    CheckpointSchedule,
    RestClient,
    Resumed,
    ServiceClient,
    TrainingClient,
    resume_or_create,
    resume_or_create_async,
    types,
)
from holdfast.client.schedule import SavedCheckpoint
from holdfast.errors import ConflictError, NotFoundError, RequestError
from tests.client.scenario import MODEL, batch, seen
from tests.support.server import ServerProcess

pytestmark = pytest.mark.timeout(120)

STEPS = 8


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{time.time_ns()}"


@pytest.fixture
def rest(server: ServerProcess) -> RestClient:
    return RestClient(base_url=server.url)


def begin(service: ServiceClient, name: str) -> Resumed:
    return resume_or_create(service, name, base_model=MODEL, rank=4, seed=3)


def step(client: TrainingClient, number: int) -> dict[str, object]:
    gradients = client.forward_backward(batch(types, number), "cross_entropy")
    client.optim_step(AdamParams(learning_rate=2e-3)).result(60)
    return seen(gradients.result(60))


def names(rest: RestClient, client: TrainingClient) -> list[str]:
    found = rest.list_checkpoints(client.model_id).result(10).checkpoints
    return sorted(checkpoint.checkpoint_id.removeprefix("weights/") for checkpoint in found)


def script(service: ServiceClient, name: str, stop_before: int) -> dict[int, dict[str, object]]:
    """A training script that dies before step `stop_before`; the steps it did."""
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=3, keep_last=2)
    done: dict[int, dict[str, object]] = {}
    for number in range(run.start_step, STEPS):
        if number == stop_before:
            return done
        done[number] = step(run.training_client, number)
        saving = schedule.step_done(number)
        if saving is not None:
            saving.result(60)
    schedule.finish(60)
    return done


@pytest.fixture
def whole(server: ServerProcess, name: str) -> Iterator[dict[int, dict[str, object]]]:
    with ServiceClient(base_url=server.url) as service:
        yield script(service, f"{name}-whole", STEPS)


def test_a_script_that_is_killed_again_and_again_trains_each_batch_as_if_it_had_not_been(
    server: ServerProcess, name: str, whole: dict[int, dict[str, object]]
) -> None:
    done: dict[int, dict[str, object]] = {}
    starts = []
    for stop in (2, 5, 7, STEPS):
        with ServiceClient(base_url=server.url) as service:
            life = script(service, name, stop)
            starts.append(min(life))
            # Steps after the last checkpoint are done again, with the same bits.
            for number in done.keys() & life.keys():
                assert done[number] == life[number]
            done |= life
    assert starts == [0, 0, 3, 6]
    assert done == whole


def test_older_checkpoints_go_only_when_the_newer_is_durable(
    service: ServiceClient, rest: RestClient, name: str
) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1, keep_last=2)
    for number in range(4):
        step(run.training_client, number)
        saving = schedule.step_done(number)
        assert saving is not None
        saving.result(60)
        present = names(rest, run.training_client)
        assert f"step-{number + 1:06d}" in present
        assert len(present) == min(number + 1, 2)
    assert [saved.step for saved in schedule.saved] == [3, 4]


def test_a_save_that_fails_deletes_nothing_and_is_tried_again(
    service: ServiceClient, rest: RestClient, name: str
) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1, keep_last=1)
    client = run.training_client
    step(client, 0)
    first = schedule.step_done(0)
    assert first is not None
    first.result(60)
    client.save_state("step-000002").result(60)  # the name that the next save wants
    step(client, 1)
    second = schedule.step_done(1)
    assert second is not None
    assert second.result(60) is None
    assert isinstance(schedule.error, ConflictError)
    assert "step-000001" in names(rest, client)
    step(client, 2)
    third = schedule.step_done(2)
    assert third is not None
    assert third.result(60) is not None
    assert not schedule.error
    assert "step-000001" not in names(rest, client)


def test_what_keep_says_is_kept(service: ServiceClient, rest: RestClient, name: str) -> None:
    def even(saved: SavedCheckpoint) -> bool:
        return saved.step % 2 == 0

    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1, keep_last=1, keep=even, prefix="at")
    for number in range(5):
        step(run.training_client, number)
        saving = schedule.step_done(number)
        assert saving is not None
        saving.result(60)
    assert names(rest, run.training_client) == ["at-000002", "at-000004", "at-000005"]


def test_saving_does_not_stall_the_loop_and_one_save_is_under_way_at_a_time(
    service: ServiceClient, rest: RestClient, name: str
) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1, keep_last=None)
    slowest = 0.0
    for number in range(10):
        run.training_client.forward_backward(batch(types, number), "cross_entropy")
        run.training_client.optim_step(AdamParams(learning_rate=1e-3))
        started = time.monotonic()
        schedule.step_done(number)
        slowest = max(slowest, time.monotonic() - started)
    newest = schedule.finish(60)
    assert slowest < 0.25
    assert newest is not None
    assert newest.step == 10
    assert names(rest, run.training_client)[-1] == "step-000010"
    assert schedule.finish(60) == newest


def test_time_makes_a_save_due(service: ServiceClient, name: str) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_seconds=0.5)
    step(run.training_client, 0)
    schedule.step_done(0)
    time.sleep(0.6)
    step(run.training_client, 1)
    saving = schedule.step_done(1)
    assert saving is not None
    saved = saving.result(60)
    assert saved is not None
    assert saved.step == 2


def test_a_checkpoint_that_is_broken_is_passed_over(
    server: ServerProcess, service: ServiceClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1)
    for number in range(2):
        step(run.training_client, number)
        saving = schedule.step_done(number)
        assert saving is not None
        saving.result(60)
    newest = schedule.saved[-1].path
    # The first session stays open: a snapshot at its end would write the same bytes anew.
    damage(server, newest)
    with ServiceClient(base_url=server.url) as other:
        again = begin(other, name)
        assert again.start_step == 1
        assert f"{newest} cannot be resumed from" in caplog.text
        step(again.training_client, 1)


def damage(server: ServerProcess, path: str) -> None:
    """Flip a bit of the optimizer state of a checkpoint."""
    blob = server.manifest(path).files["optimizer.safetensors"]
    (file,) = [p for p in server.data_dir.rglob(f"*{blob.hash[2:]}*") if p.is_file()]
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_run_of_another_shape_is_refused_by_name(service: ServiceClient, name: str) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1)
    step(run.training_client, 0)
    schedule.step_done(0)
    schedule.finish(60)
    with pytest.raises(RequestError, match="rank 4, not 'holdfast-tiny' and 8"):
        resume_or_create(service, name, base_model=MODEL, rank=8)


@pytest.mark.parametrize("flag", ["train_mlp", "train_attn", "train_unembed"])
def test_a_run_that_trains_something_else_is_refused_by_name(
    service: ServiceClient, name: str, flag: str
) -> None:
    def start(on: bool) -> Resumed:
        return resume_or_create(
            service,
            name,
            base_model=MODEL,
            rank=4,
            train_mlp=on or flag != "train_mlp",
            train_attn=on or flag != "train_attn",
            train_unembed=on or flag != "train_unembed",
        )

    run = start(False)
    schedule = CheckpointSchedule(run, every_steps=1)
    step(run.training_client, 0)
    schedule.step_done(0)
    schedule.finish(60)
    with pytest.raises(RequestError, match=f"has {flag}=False, not True"):
        start(True)
    assert start(False).start_step == 1


def test_no_usable_checkpoint_is_an_error_and_not_a_new_run(
    server: ServerProcess, service: ServiceClient, name: str
) -> None:
    run = begin(service, name)
    schedule = CheckpointSchedule(run, every_steps=1)
    step(run.training_client, 0)
    schedule.step_done(0)
    newest = schedule.finish(60)
    assert newest is not None
    damage(server, newest.path)
    with pytest.raises(NotFoundError, match="none of the 1 checkpoints"):
        begin(service, name)


@pytest.mark.anyio
async def test_it_resumes_in_async_code_too(server: ServerProcess, name: str) -> None:
    async with ServiceClient(base_url=server.url) as service:
        run = await resume_or_create_async(service, name, base_model=MODEL, rank=4)
        schedule = CheckpointSchedule(run, every_steps=5)
        await run.training_client.optim_step()
        schedule.step_done(0)
        saved = await schedule.finish_async()
        assert saved is not None
        again = await resume_or_create_async(service, name, base_model=MODEL, rank=4)
        assert again.start_step == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"every_steps": 0}, {"every_seconds": 0.0}, {"every_steps": 1, "keep_last": 0}],
)
def test_a_schedule_without_sense_is_refused(
    service: ServiceClient, name: str, options: dict[str, int]
) -> None:
    run = begin(service, name)
    with pytest.raises(RequestError):
        CheckpointSchedule(run, **options)  # type: ignore[arg-type]
