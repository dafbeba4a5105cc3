"""A minute in which the server, or its worker, stands still: longer than clients wait for a poll.

Beside the others, and with two servers at once: nothing computes meanwhile.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.conftest import STEPS, campaigning
from tests.faults.plan import Disturbance, Kind
from tests.faults.script import Seen

MINUTE = 61.0
KINDS: list[Kind] = ["suspend server", "suspend worker"]


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_minute_s_suspension_is_not_seen(
    undisturbed: list[Seen], model: Path, tmp_path: Path
) -> None:
    campaigns = [Campaign(tmp_path / kind, STEPS, model=model) for kind in KINDS]
    plans = [[Disturbance(kind, 0.1, seconds=MINUTE)] for kind in KINDS]
    with campaigning(*campaigns):
        pids = [campaign.server.pid for campaign in campaigns]
        with ThreadPoolExecutor() as pool:
            outcomes = list(pool.map(Campaign.disturbed, campaigns, plans))
        assert [campaign.server.pid for campaign in campaigns] == pids
    for kind, campaign, outcome in zip(KINDS, campaigns, outcomes, strict=True):
        assert outcome.done == {kind: 1}
        assert outcome.seen == undisturbed
        # It was no reason to begin anew.
        assert campaign.server.log.count("base model ready") == 1
