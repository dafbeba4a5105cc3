"""The quickstart, from its first line to its verdict."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from holdfast.cli.quickstart import Line, command

EXACT = "resumed == uninterrupted, in every bit; cold differs"


@pytest.mark.timeout(600)
def test_it_learns_is_killed_and_resumes_exactly(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "holdfast.cli", "quickstart", "--data-dir", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert EXACT in done.stdout
    assert "server killed with SIGKILL" in done.stdout
    before, after = (
        int(part.strip().rstrip("%"))
        for part in next(line for line in done.stdout.splitlines() if "exact, of 50" in line).split(
            "│"
        )[2:4]
    )
    assert before < 10
    assert after > 80


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [0.5, 0.25 + 2**-54]},
        {"logprobs": [b"\x00\x00\x00\x3f", b"\x01\x00\x00\x3f"]},
        {"weights": "0" * 64},
    ],
)
def test_one_bit_is_a_difference(changes: dict[str, list[float] | list[bytes] | str]) -> None:
    line = Line("a", [0.5, 0.25], [b"\x00\x00\x00\x3f", b"\x00\x00\x00\x3f"], "f" * 64)
    assert line.same_as(dataclasses.replace(line, name="b"))
    assert not line.same_as(dataclasses.replace(line, **changes))  # type: ignore[arg-type]


def test_a_data_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/nope"), tmp_path / "file" / "data"):
        shown = CliRunner().invoke(command, ["--data-dir", str(place)])
        assert shown.exit_code == 1
        assert shown.output.startswith(f"Error: {place}: ")
        assert shown.output.count("\n") == 1
