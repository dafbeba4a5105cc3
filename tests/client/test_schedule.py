"""A save whose answer was lost: it is tried again, and taken as made when it was made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from holdfast import CheckpointSchedule, Resumed, ServiceClient, TrainingClient
from holdfast.client.schedule import NAME_KEY, STEP_KEY, _find
from holdfast.errors import ConflictError, ResultLostError
from holdfast.protocol.errors import failed_future_body
from tests.client.scripted import Reply, Request, ScriptedServer, status

NAME = "dates"


class Checkpoints:
    """The scripted server's checkpoints: a name can be taken once."""

    def __init__(self, server: ScriptedServer, client: TrainingClient) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        self.run = client.model_id
        server.results["save_weights"] = self.save
        server.results[f"training_runs/{self.run}/checkpoints"] = self.list

    def save(self, request: Request, seq: int) -> Reply:
        body = request.json()
        name = body["path"]
        if name in self.made:
            text = f"checkpoint {name!r} exists already"
            return Reply.json(failed_future_body(text, category="user", code="checkpoint_exists"))
        self.made[name] = body.get("user_metadata") or {}
        return Reply.json({"path": self.path(name), "type": "save_weights"})

    def list(self, request: Request, seq: int) -> Reply:
        shown = [
            {
                "checkpoint_id": f"weights/{name}",
                "checkpoint_type": "training",
                "time": "2026-01-02T03:04:05Z",
                "tinker_path": self.path(name),
                "user_metadata": metadata,
            }
            for name, metadata in self.made.items()
        ]
        return Reply.json({"checkpoints": shown})

    def path(self, name: str) -> str:
        return f"tinker://{self.run}/weights/{name}"


@pytest.fixture
def checkpoints(scripted: ScriptedServer, training: TrainingClient) -> Checkpoints:
    return Checkpoints(scripted, training)


def lose_the_save(scripted: ScriptedServer, schedule: CheckpointSchedule) -> None:
    """The result of step 1's save never reaches the client; the test says whether it was made."""
    scripted.results["retrieve_future"] = lose
    saving = schedule.step_done(0)
    assert saving is not None
    assert saving.result(10) is None
    assert isinstance(schedule.error, ResultLostError)
    del scripted.results["retrieve_future"]


def lose(request: Request, seq: int) -> Reply:
    return status(410).reply or Reply()


def again(training: TrainingClient, named: bool) -> CheckpointSchedule:
    run = Resumed(NAME, training, 0, None) if named else training
    return CheckpointSchedule(run, every_steps=1)


@pytest.mark.parametrize("named", [True, False])
def test_finish_takes_the_checkpoint_that_the_lost_save_made(
    scripted: ScriptedServer, training: TrainingClient, checkpoints: Checkpoints, named: bool
) -> None:
    schedule = again(training, named)
    lose_the_save(scripted, schedule)
    expected = {STEP_KEY: "1", **({NAME_KEY: NAME} if named else {})}
    checkpoints.made["step-000001"] = expected
    saved = schedule.finish(10)
    assert saved is not None
    assert (saved.path, saved.step) == (checkpoints.path("step-000001"), 1)
    assert schedule.error is None
    assert list(schedule.saved) == [saved]
    assert json.loads(scripted.sent("save_weights")[-1].body)["user_metadata"] == expected


def test_finish_saves_again_when_the_lost_save_made_nothing(
    scripted: ScriptedServer, training: TrainingClient, checkpoints: Checkpoints
) -> None:
    schedule = again(training, True)
    lose_the_save(scripted, schedule)
    assert schedule.finish(10) is not None
    assert checkpoints.made == {"step-000001": {STEP_KEY: "1", NAME_KEY: NAME}}


@pytest.mark.parametrize(
    "metadata",
    [{}, {STEP_KEY: "2", NAME_KEY: NAME}, {STEP_KEY: "1", NAME_KEY: "other"}, {STEP_KEY: "1"}],
)
def test_a_checkpoint_of_something_else_under_that_name_stays_a_conflict(
    scripted: ScriptedServer,
    training: TrainingClient,
    checkpoints: Checkpoints,
    metadata: dict[str, str],
) -> None:
    schedule = again(training, True)
    lose_the_save(scripted, schedule)
    checkpoints.made["step-000001"] = metadata
    with pytest.raises(ConflictError):
        schedule.finish(10)
    assert not schedule.saved


def test_a_name_that_was_taken_before_the_first_try_stays_a_conflict(
    training: TrainingClient, checkpoints: Checkpoints
) -> None:
    """Steps done again after a load: what is there holds another training state."""
    checkpoints.made["step-000001"] = {STEP_KEY: "1", NAME_KEY: NAME}
    schedule = again(training, True)
    saving = schedule.step_done(0)
    assert saving is not None
    assert saving.result(10) is None
    assert isinstance(schedule.error, ConflictError)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        # The clock was set back before step 3.
        ([("A", 1, "10:00"), ("A", 2, "11:00"), ("A", 3, "09:00")], [1, 2, 3]),
        # B was resumed from an older step of A, after A had gone on: it is what came last.
        (
            [("B", 2, "12:00"), ("A", 3, "11:00"), ("A", 1, "10:00"), ("B", 1, "11:30")],
            [1, 3, 1, 2],
        ),
        ([("A", 10, "10:00"), ("A", 9, "09:00")], [9, 10]),
    ],
)
def test_what_a_run_saved_is_in_the_order_of_its_steps(
    scripted: ScriptedServer,
    client: ServiceClient,
    made: list[tuple[str, int, str]],
    expected: list[int],
) -> None:
    scripted.results["checkpoints"] = lambda *_: Reply.json(
        {
            "checkpoints": [
                {
                    "checkpoint_id": f"weights/step-{step}",
                    "checkpoint_type": "training",
                    "time": f"2026-01-02T{time}:00Z",
                    "tinker_path": f"tinker://{run}/weights/step-{step}",
                    "user_metadata": {STEP_KEY: str(step), NAME_KEY: NAME},
                }
                for run, step, time in made
            ]
        }
    )
    found = client._future(_find(client.create_rest_client(), NAME)).result(10)
    assert [saved.step for saved in found] == expected
