"""Scripts that train on a server which is killed again and again see nothing of it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest

from holdfast import failpoints
from tests.faults.campaign import Campaign
from tests.faults.script import Seen

STEPS = 16
KILLS = 20

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("campaign"), STEPS)
    with campaign.server:
        yield campaign
    assert "driver failed" not in campaign.server.log, campaign.server.log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def undisturbed(campaign: Campaign) -> list[Seen]:
    return campaign.undisturbed()


def test_the_script_sees_enough_to_notice(undisturbed: list[Seen]) -> None:
    first, second = undisturbed
    assert first.losses != second.losses
    assert len(set(first.losses)) == len(first.losses) > STEPS
    assert len(set(first.blobs.values())) > 8


def test_it_survives_a_death_at_every_point(campaign: Campaign, undisturbed: list[Seen]) -> None:
    outcome = campaign.dying_at_every_point()
    assert outcome.not_reached == []
    assert outcome.kills == len(failpoints.POINTS)
    assert outcome.seen == undisturbed


def test_it_survives_kills_at_random_moments(campaign: Campaign, undisturbed: list[Seen]) -> None:
    kills, seed = len(failpoints.POINTS), 1
    while kills < KILLS:
        outcome = campaign.disturbed(seed)
        assert outcome.seen == undisturbed, f"seed {seed}: {dict(outcome.done)}"
        kills += outcome.kills
        seed += 1
