"""What the disturbed scripts have in common: the model, what is to be seen."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.script import Seen
from tests.support.models import save_small_model

STEPS = 60


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    directory = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (directory / "faults").mkdir(exist_ok=True)
    return directory / "faults"


@pytest.fixture(scope="session")
def model(shared: Path) -> Path:
    with _locked(shared / "model.lock"):
        if not (shared / "model").exists():
            save_small_model("llama", shared / "model")
    return shared / "model"


@pytest.fixture(scope="session")
def undisturbed(shared: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """What a script sees of a server that nobody disturbs, and that starts as a user's does."""
    kept = shared / "undisturbed.json"
    with _locked(shared / "undisturbed.lock"):
        if not kept.exists():
            directory = tmp_path_factory.mktemp("undisturbed")
            campaign = Campaign(directory, STEPS, model=model, quick=False)
            with campaigning(campaign):
                seen = campaign.undisturbed()
            segments = list((campaign.server.data_dir / "segments").iterdir())
            assert segments, "no body and no result was large enough for a file of its own"
            kept.write_text(json.dumps([asdict(tenant) for tenant in seen]))
    return [Seen(**tenant) for tenant in json.loads(kept.read_text())]


@contextmanager
def campaigning(*campaigns: Campaign) -> Iterator[None]:
    """Their servers run; at the end, none of them may have met a defect."""
    with ExitStack() as stack:
        # The official SDK's own ways: what it reports, what it warns of, what it leaves open.
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("TINKER_TELEMETRY", "0")
        for campaign in campaigns:
            stack.enter_context(campaign.server)
        yield
    for campaign in campaigns:
        assert "Traceback" not in campaign.server.log, campaign.server.log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Whoever comes first does it, the others wait."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
