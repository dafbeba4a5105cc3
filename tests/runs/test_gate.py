"""Who is alone is alone, nobody is kept out for good, and who goes away leaves no trace."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from holdfast.runs.gate import Gate

pytestmark = pytest.mark.anyio


class Inside:
    """Who is behind a gate, and who was."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.together: list[set[str]] = []

    def enter(
        self, name: str, gate: AbstractAsyncContextManager[None], leave: asyncio.Event
    ) -> asyncio.Task[None]:
        async def enter() -> None:
            async with gate:
                self.now.add(name)
                self.together.append(set(self.now))
                try:
                    await leave.wait()
                finally:
                    self.now.remove(name)

        return asyncio.create_task(enter())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_many_go_together_and_one_alone() -> None:
    gate, inside = Gate(), Inside()
    first, second = asyncio.Event(), asyncio.Event()
    tasks = [inside.enter(name, gate.among_others(), first) for name in "ab"]
    await settle()
    assert inside.now == {"a", "b"}
    tasks.append(inside.enter("x", gate.alone(), second))
    await settle()
    tasks += [inside.enter(name, gate.among_others(), second) for name in "cd"]
    await settle()
    assert inside.now == {"a", "b"}, "newcomers wait behind who is to be alone"
    first.set()
    await settle()
    assert inside.now == {"x"}
    second.set()
    await asyncio.gather(*tasks)
    assert all(names == {"x"} for names in inside.together if "x" in names)
    assert inside.together[-1] >= {"d"}


async def test_those_who_are_to_be_alone_come_one_after_the_other() -> None:
    gate, inside, leave = Gate(), Inside(), asyncio.Event()
    leave.set()
    await asyncio.gather(*(inside.enter(name, gate.alone(), leave) for name in "xyz"))
    assert inside.together == [{"x"}, {"y"}, {"z"}]


@pytest.mark.parametrize("alone", [False, True])
async def test_who_is_cancelled_keeps_nobody_out(alone: bool) -> None:
    gate, inside, leave = Gate(), Inside(), asyncio.Event()

    def enter(name: str) -> asyncio.Task[None]:
        return inside.enter(name, gate.alone() if alone else gate.among_others(), leave)

    holds = enter("a")
    await settle()
    waits = inside.enter("x", gate.alone(), leave)
    await settle()
    for task in (waits, holds):
        task.cancel()
    await settle()
    leave.set()
    async with asyncio.timeout(1.0):
        await inside.enter("b", gate.among_others(), leave)
        await inside.enter("y", gate.alone(), leave)


async def test_nobody_is_let_through_before_what_it_is_closed_for_has_ended() -> None:
    gate, inside, over, leave = Gate(), Inside(), asyncio.Event(), asyncio.Event()
    leave.set()

    async def first() -> None:
        await over.wait()

    gate.close_until(asyncio.create_task(first()))
    entering = [
        inside.enter("one of many", gate.among_others(), leave),
        inside.enter("alone", gate.alone(), leave),
    ]
    await settle()
    assert inside.together == []
    over.set()
    await asyncio.wait_for(asyncio.gather(*entering), 10)
    assert sorted(map(sorted, inside.together)) == [["alone"], ["one of many"]]
