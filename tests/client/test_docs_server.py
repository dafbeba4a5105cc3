"""The guide's code runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ServerProcess

GUIDE = Path(__file__).parents[2] / "docs" / "persistence.md"


def code() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    return "\n".join(blocks)


def run(server: ServerProcess, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script],
        env={"HOLDFAST_BASE_URL": server.url, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.timeout(120)
def test_the_guides_code_runs_from_top_to_bottom(server: ServerProcess) -> None:
    done = run(server, code())
    assert done.returncode == 0, done.stderr
    assert "checkpoint_not_found user" in done.stdout or "_not_found user" in done.stdout


@pytest.mark.timeout(120)
def test_its_assertions_are_meant(server: ServerProcess) -> None:
    """The weights-only load in place of the other makes the guide fail."""
    changed = code().replace("load_state_with_optimizer(path)", "load_state(path)", 1)
    assert changed != code()
    done = run(server, changed)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
