"""Scripts that train on a server which is disturbed again and again see nothing of it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pytest

from holdfast import failpoints
from tests.faults.campaign import Campaign, Outcome
from tests.faults.conftest import STEPS, campaigning
from tests.faults.disturb import DisturbingFailed
from tests.faults.plan import KINDS, Disturbance, Kind, plan
from tests.faults.script import Seen
from tests.faults.surroundings import SmallDisk

T = TypeVar("T")

KILLS = 20

# Some are there for as long as a server waits for a lock before it says that it cannot write.
PLANS = [
    [
        Disturbance("kill server", 0.1),
        Disturbance("lost answers", seconds=2.0),
        Disturbance("suspend worker", 0.02, seconds=2.0),
        Disturbance("damaged snapshot", 0.05),
        Disturbance("clock", clock=+2 * 24 * 3600),
        Disturbance("kill while starting", 0.1, seconds=1.2),
        Disturbance("kill worker", 0.15),
        Disturbance("full disk", 0.02, seconds=2.5),
        Disturbance("kill, full disk", 0.1, seconds=4.0),
        Disturbance("kill while stopping", 0.1, seconds=0.1),
        Disturbance("restart", 0.1),
        Disturbance("kill both", 0.0),
    ],
    [
        Disturbance("kill both", 0.2),
        Disturbance("restart, locked database", 0.1, seconds=3.0),
        Disturbance("clock", clock=-3 * 24 * 3600),
        Disturbance("locked database", 0.0, seconds=5.5),
        Disturbance("kill worker", 0.03),
        Disturbance("restart, full disk", 0.1, seconds=2.0),
        Disturbance("suspend server", 0.05, seconds=2.0),
        Disturbance("restart", 0.05),
        Disturbance("kill, locked database", 0.1, seconds=3.0),
        Disturbance("no room", 0.02, seconds=2.5),
        Disturbance("kill while starting", 0.1, seconds=0.3),
        Disturbance("damaged manifest", 0.1),
    ],
]
"""Every kind of disturbance, in sessions that outlive them all; one of them has its own tests."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def campaigns(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Campaign]]:
    """Two of them, disturbed side by side: much of the time goes into clients' pauses."""
    with ExitStack() as stack:
        made = []
        for _ in PLANS:
            directory = tmp_path_factory.mktemp("campaign")
            disk = None
            with suppress(OSError):  # only root can make one
                disk = SmallDisk(directory / "server", 256)
                stack.callback(disk.remove)
                stack.callback(_keep_log, directory)
            made.append(Campaign(directory, STEPS, model=model, disk=disk, network=True))
        stack.enter_context(campaigning(*made))
        yield made


def _keep_log(directory: Path) -> None:
    """For whoever looks for the cause of a failure."""
    shutil.copy(directory / "server" / "server.log", directory)


def side_by_side(
    campaigns: list[Campaign], run: Callable[[Campaign, T], Outcome], plans: list[T]
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
    # Those of a load first: there are only a few.
    points = sorted(failpoints.POINTS, key=lambda point: not point.startswith("load."))
    halves = [points[::2], points[1::2]]
    outcomes = side_by_side(campaigns, Campaign.dying_at, halves)
    for outcome, half in zip(outcomes, halves, strict=True):
        assert outcome.not_reached == []
        assert outcome.kills == len(half)
        assert outcome.seen == undisturbed


def test_it_survives_everything_else(campaigns: list[Campaign], undisturbed: list[Seen]) -> None:
    plans = [[_possible(campaigns[0], each) for each in plan] for plan in PLANS]
    done = Counter[str]()
    kills = 0
    while any(plans):
        outcomes = side_by_side(campaigns, Campaign.disturbed, plans)
        for outcome in outcomes:
            assert outcome.seen == undisturbed, f"after {dict(outcome.done)}"
            done += outcome.done
            kills += outcome.kills
        plans = [plan[each.done.total() :] for plan, each in zip(plans, outcomes, strict=True)]
    assert kills + len(failpoints.POINTS) >= KILLS
    assert done["lost answers"] and done["damaged snapshot"] and done["damaged manifest"]
    # One that is damaged is not met where a newer one was made in the meantime.
    assert any("snapshot not usable" in campaign.server.log for campaign in campaigns)


def _possible(campaign: Campaign, wanted: Disturbance) -> Disturbance:
    """Where there is no disk of one's own, its files are given no room."""
    if campaign.has_disk or not wanted.kind.endswith("full disk"):
        return wanted
    kinds: dict[Kind, Kind] = {"kill, full disk": "kill both", "restart, full disk": "restart"}
    return replace(wanted, kind=kinds.get(wanted.kind, "no room"))


def test_the_same_seed_is_the_same_plan() -> None:
    def first(seed: int) -> list[Disturbance]:
        return list(islice(plan(seed), 1000))

    assert first(7) == first(7) != first(8)
    assert {each.kind for each in first(7)} == set(KINDS)
    assert {each.point for each in first(7) if each.kind == "die at a point"} == set(
        failpoints.POINTS
    )


def test_every_kind_is_in_a_test() -> None:
    hung: set[Kind] = {"hung worker", "worker hung while loading"}
    planned = {each.kind for plan in PLANS for each in plan}
    assert planned | hung | {"die at a point"} == set(KINDS)


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
