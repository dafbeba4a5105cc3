"""Pauses between attempts."""

from __future__ import annotations

from itertools import islice

import pytest

from holdfast.store import retries
from holdfast.store.retries import pauses


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def test_pauses_double_up_to_the_longest() -> None:
    assert list(islice(pauses(1.0, 5.0), 5)) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_no_attempt_is_later_than_it_may_be(clock: Clock) -> None:
    """Also when the attempts themselves take time."""
    again = pauses(1.0, 60.0, within=10.0)
    clock.now += 2.0
    found = []
    for pause in again:
        clock.now += pause
        found.append(pause)
    assert found == [1.0, 2.0, 4.0]
    assert clock.now <= 110.0
    assert next(again, None) is None
