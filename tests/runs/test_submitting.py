"""The turn of a run's submissions: held until what was begun under it is written."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.runs import submitting
from holdfast.runs.errors import Unavailable
from holdfast.runs.submitting import Submitting

pytestmark = pytest.mark.anyio


async def turn(turns: Submitting, taken: list[str], name: str) -> None:
    async with turns:
        taken.append(name)


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_the_next_one_waits_for_the_write_of_a_holder_that_is_gone(
    is_cancelled: bool,
) -> None:
    turns, taken = Submitting(), list[str]()
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with turns:
            turns.writing()
            begun.set()
            await goes_on.wait()

    holder = asyncio.create_task(first())
    await begun.wait()
    following = [asyncio.create_task(turn(turns, taken, name)) for name in "bc"]
    if is_cancelled:
        holder.cancel()
    else:
        goes_on.set()
    await asyncio.wait([holder])
    await asyncio.sleep(0.01)
    assert taken == [], "it is written still"
    turns.written()
    await asyncio.gather(*following)
    assert taken == ["b", "c"]
    assert not turns.lock.locked()


async def test_what_is_written_before_its_holder_leaves_holds_nobody_up() -> None:
    turns, taken = Submitting(), list[str]()
    async with turns:
        turns.writing()
        turns.written()
        following = asyncio.create_task(turn(turns, taken, "b"))
        await asyncio.sleep(0.01)
        assert taken == [], "the turn is its holder's still"
    await following
    assert taken == ["b"]
    assert not turns.lock.locked()


async def test_who_waits_too_long_is_told_and_takes_no_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submitting, "SUBMISSION_WAITS", 0.05)
    turns, taken = Submitting(), list[str]()
    async with turns:
        turns.writing()
    with pytest.raises(Unavailable, match="has not been journaled"):
        await turn(turns, taken, "b")
    turns.written()
    await turn(turns, taken, "c")
    assert taken == ["c"]
