"""Scripts that train on a server which is disturbed again and again see nothing of it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import pytest

from holdfast import failpoints
from tests.faults.campaign import Campaign, Outcome
from tests.faults.disturb import KINDS, Disturbance, DisturbingFailed, plan
from tests.faults.script import Seen
from tests.support.models import save_small_model

T = TypeVar("T")

STEPS = 16
KILLS = 20

PLANS = [
    [
        Disturbance("kill server", 0.1),
        Disturbance("suspend server", 0.05, seconds=2.0),
        Disturbance("clock", clock=+2 * 24 * 3600),
        Disturbance("kill worker", 0.15),
        Disturbance("no room", 0.02, seconds=2.5),
        Disturbance("kill both", 0.0),
    ],
    [
        Disturbance("suspend worker", 0.02, seconds=2.0),
        Disturbance("kill both", 0.2),
        Disturbance("clock", clock=-3 * 24 * 3600),
        # Longer than the server waits for a lock before it says that it cannot write.
        Disturbance("locked database", 0.0, seconds=5.5),
        Disturbance("kill worker", 0.03),
    ],
]
"""Every kind of disturbance, in sessions that outlive them all."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Campaign]]:
    """Two of them, disturbed side by side: most of the time goes into starting workers."""
    model = save_small_model("llama", tmp_path_factory.mktemp("model"))
    made = [Campaign(tmp_path_factory.mktemp("campaign"), STEPS, model=model) for _ in PLANS]
    with pytest.MonkeyPatch.context() as patch, made[0].server, made[1].server:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield made
    for campaign in made:
        assert "Traceback" not in campaign.server.log, campaign.server.log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def undisturbed(campaigns: list[Campaign]) -> list[Seen]:
    return campaigns[0].undisturbed()


def on_both(
    campaigns: list[Campaign], run: Callable[[Campaign, T], Outcome], plans: Iterable[T]
) -> list[Outcome]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, campaigns, plans))


def test_the_script_sees_enough_to_notice(undisturbed: list[Seen]) -> None:
    for seen in undisturbed:
        assert len(set(seen.losses)) == len(seen.losses) > STEPS
        assert len(set(seen.blobs.values())) > 8
    assert len({seen.losses[0] for seen in undisturbed}) == len(undisturbed)


def test_it_survives_a_death_at_every_point(
    campaigns: list[Campaign], undisturbed: list[Seen]
) -> None:
    halves = [failpoints.POINTS[::2], failpoints.POINTS[1::2]]
    for outcome, half in zip(on_both(campaigns, Campaign.dying_at, halves), halves, strict=True):
        assert outcome.not_reached == []
        assert outcome.kills == len(half)
        assert outcome.seen == undisturbed


def test_it_survives_everything_else(campaigns: list[Campaign], undisturbed: list[Seen]) -> None:
    left, kills = PLANS, len(failpoints.POINTS)
    while any(left):
        outcomes = on_both(campaigns, Campaign.disturbed, left)
        for outcome in outcomes:
            assert outcome.seen == undisturbed, f"after {dict(outcome.done)}"
        kills += sum(outcome.kills for outcome in outcomes)
        left = [plan[each.done.total() :] for plan, each in zip(left, outcomes, strict=True)]
    assert kills >= KILLS


def test_it_survives_a_rolling_restart(campaigns: list[Campaign], undisturbed: list[Seen]) -> None:
    outcome = campaigns[0].disturbed([Disturbance("restart", 0.1)] * 3)
    assert outcome.done == {"restart": 3}
    assert outcome.seen == undisturbed


def test_the_same_seed_is_the_same_plan() -> None:
    def first(seed: int) -> list[Disturbance]:
        return list(islice(plan(seed), 500))

    assert first(7) == first(7) != first(8)
    assert {each.kind for each in first(7)} == set(KINDS)
    assert {each.point for each in first(7) if each.kind == "die at a point"} == set(
        failpoints.POINTS
    )


@pytest.mark.timeout(100)
def test_a_disturber_that_fails_ends_the_script_at_once(campaigns: list[Campaign]) -> None:
    """Instead of letting it wait for a server that nobody starts again."""
    campaign = campaigns[0]

    def planned() -> Iterator[Disturbance]:
        yield Disturbance("suspend worker", seconds=0.1)
        campaign.server.kill()
        raise RuntimeError("no plan")

    with pytest.raises(DisturbingFailed) as caught:
        campaign.disturbed(planned())
    assert str(caught.value.__cause__) == "no plan"
    campaign.server.start()
