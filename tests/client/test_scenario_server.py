"""The same scenario through our client and the official one: equal to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess

SCRIPT = Path(__file__).with_name("scenario.py")

pytestmark = pytest.mark.timeout(180)


def run(server: ServerProcess, client: str, *more: str) -> dict[str, Any]:
    """The scenario in a process of its own, as a user's script runs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--client", client, "--url", server.url, *more],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def ours(server: ServerProcess) -> Iterator[dict[str, Any]]:
    yield run(server, "holdfast")


@pytest.fixture(scope="module")
def official(server: ServerProcess) -> Iterator[dict[str, Any]]:
    yield run(server, "tinker")


def test_both_clients_see_the_same_to_the_last_bit(
    ours: dict[str, Any], official: dict[str, Any]
) -> None:
    assert set(ours) == set(official)
    for name in ours.keys() - {"path"}:
        assert ours[name] == official[name], name


def test_resumed_is_uninterrupted_and_cold_is_not(ours: dict[str, Any]) -> None:
    assert ours["resumed"] == ours["uninterrupted"] == ours["in place"]
    assert ours["cold"] == ours["in place, cold"]
    # The first loss is of the same weights; then the optimizers differ.
    assert ours["cold"][0] == ours["uninterrupted"][0]
    assert ours["cold"][1:] != ours["uninterrupted"][1:]


def test_what_the_official_client_saved_goes_on_in_ours(
    server: ServerProcess, official: dict[str, Any]
) -> None:
    found = run(server, "holdfast", "--path", official["path"])
    assert found == {name: official[name] for name in ("resumed", "cold")}


def test_what_ours_saved_goes_on_in_the_official_client(
    server: ServerProcess, ours: dict[str, Any]
) -> None:
    found = run(server, "tinker", "--path", ours["path"])
    assert found == {name: ours[name] for name in ("resumed", "cold")}
