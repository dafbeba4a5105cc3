"""Turns at a worker: in order, those that are waited for first, and nobody is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from holdfast.runs import turns
from holdfast.runs.turns import PATIENCE, Turns


async def order_of(*wanted: Callable[[], bool]) -> list[int]:
    """The order in which those get their turn that ask for it while it is taken."""
    served: list[int] = []
    line = Turns()

    async def one(number: int) -> None:
        async with line.take(wanted[number]):
            served.append(number)

    async with line.take():
        tasks = [asyncio.create_task(one(number)) for number in range(len(wanted))]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return served


def yes() -> bool:
    return True


def no() -> bool:
    return False


@pytest.mark.anyio
async def test_turns_are_taken_in_the_order_they_were_asked_for() -> None:
    assert await order_of(yes, yes, yes) == [0, 1, 2]
    assert await order_of(no, no, no) == [0, 1, 2]


@pytest.mark.anyio
async def test_those_that_are_waited_for_go_first() -> None:
    assert await order_of(no, yes, no, yes) == [1, 3, 0, 2]


@pytest.mark.anyio
async def test_a_turn_that_nobody_waits_for_comes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))
    line, served = Turns(), list[str]()

    async def one(name: str, wanted: Callable[[], bool]) -> None:
        async with line.take(wanted):
            served.append(name)

    async with line.take():
        patient = asyncio.create_task(one("patient", no))
        await asyncio.sleep(0)
        now = PATIENCE
        urgent = asyncio.create_task(one("urgent", yes))
        await asyncio.sleep(0)
    await asyncio.gather(patient, urgent)
    assert served == ["patient", "urgent"]


@pytest.mark.anyio
@pytest.mark.parametrize("given", [False, True])
async def test_who_goes_away_does_not_keep_the_turn(given: bool) -> None:
    line = Turns()

    async def hold() -> None:
        async with line.take():
            await asyncio.sleep(0)

    async with line.take():
        leaver = asyncio.create_task(hold())
        follower = asyncio.create_task(hold())
        await asyncio.sleep(0)
        if not given:
            leaver.cancel()
    if given:  # at the moment at which the turn was passed on to it
        leaver.cancel()
    async with asyncio.timeout(1):
        await follower
    assert leaver.cancelled()
