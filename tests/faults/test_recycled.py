"""A worker that is replaced again and again, as one that grows: scripts see nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.conftest import STEPS, campaigning
from tests.faults.script import Seen

LIMITS = {"_WATCH_EVERY": 0.5, "SHORTEST_LIFE": 1.0, "GROWN": 0.0}
"""Of a user's server a worker lives for some minutes at least, and grows first."""


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_recycled_worker_is_not_missed(
    undisturbed: list[Seen], model: Path, tmp_path: Path
) -> None:
    campaign = Campaign(
        tmp_path,
        STEPS,
        model=model,
        limits=LIMITS,
        args=["--worker-memory=1"],
    )
    with campaigning(campaign):
        pid = campaign.server.pid
        outcome = campaign.disturbed([])
        assert campaign.server.pid == pid
        log = campaign.server.log
    assert outcome.seen == undisturbed
    assert log.count("worker recycled") >= 3
    assert "worker died" not in log
    assert "event=recovered" not in log, "something was replayed"
