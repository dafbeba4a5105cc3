"""A worker that stands still for good is ended and replaced, and a script sees nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.conftest import STEPS, campaigning
from tests.faults.plan import Disturbance
from tests.faults.script import Seen

LIMITS = {"HUNG_AFTER": 4.0, "LOADING_TAKES": 12.0, "_WATCH_EVERY": 0.5}
"""Seconds; a user's server waits for some minutes."""


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_hung_worker_is_replaced_unseen(
    undisturbed: list[Seen], model: Path, tmp_path: Path
) -> None:
    planned = [Disturbance("hung worker", 0.1), Disturbance("worker hung while loading", 0.1)]
    campaign = Campaign(tmp_path, STEPS, model=model, limits=LIMITS)
    with campaigning(campaign):
        pid = campaign.server.pid
        outcome = campaign.disturbed(planned)
        assert campaign.server.pid == pid
        log = campaign.server.log
    assert outcome.seen == undisturbed
    assert outcome.done == {each.kind: 1 for each in planned}
    assert "worker hangs, ending it" in log
    assert f"did not load its base model within {LIMITS['LOADING_TAKES']:.0f} s" in log
