"""Threads for calls that may hang: nobody but those who need what hangs waits for it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from holdfast.threads import Closed, Threads

SOON = 10.0
"""Seconds within which what is not kept waiting is done, also on a busy machine."""


class Hanging:
    """Calls that do not come back until they are told to."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self) -> None:
        self.begun.release()
        self.go_on.wait()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.go_on.set()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads("of a test", 3)
    yield threads
    threads.close()


async def hang(threads: Threads, hanging: Hanging, calls: int) -> list[asyncio.Task[None]]:
    """Have so many threads hang."""
    tasks = [asyncio.create_task(threads.run(hanging)) for _ in range(calls)]
    for _ in range(calls):
        assert await asyncio.to_thread(hanging.begun.acquire, timeout=SOON)
    return tasks


@pytest.mark.anyio
async def test_a_call_gives_its_result_or_raises(threads: Threads) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    assert await threads.run(lambda x: x + variable.get(), 1) == 8
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)


@pytest.mark.anyio
async def test_a_call_is_made_beside_those_that_hang_while_there_is_a_thread(
    threads: Threads, hanging: Hanging
) -> None:
    for calls in (1, 1):
        await hang(threads, hanging, calls)
        for _ in range(100):
            async with asyncio.timeout(SOON):
                assert await threads.run(int) == 0
    (third,) = await hang(threads, hanging, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await threads.run(int)
    hanging.go_on.set()
    async with asyncio.timeout(SOON):
        await third
        assert await threads.run(int) == 0


@pytest.mark.anyio
async def test_no_more_threads_are_started_than_calls_are_made_at_once(threads: Threads) -> None:
    names = {await threads.run(lambda: threading.current_thread().name) for _ in range(100)}
    assert len(names) < 3
    at_once = await asyncio.gather(*(threads.run(threading.get_ident) for _ in range(100)))
    assert len(set(at_once)) <= 3


@pytest.mark.anyio
async def test_a_call_that_has_not_begun_is_not_made_when_its_caller_goes_away(
    threads: Threads, hanging: Hanging
) -> None:
    await hang(threads, hanging, 3)
    made: list[int] = []
    waiting = asyncio.create_task(threads.run(made.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    hanging.go_on.set()
    await threads.run(made.append, 2)
    assert made == [2]


@pytest.mark.anyio
async def test_nothing_is_kept_of_a_call_whose_caller_goes_away_before_it_begins(
    threads: Threads, hanging: Hanging
) -> None:
    await hang(threads, hanging, 3)
    kept: list[weakref.ref[Hanging]] = []
    for _ in range(2):
        argument = Hanging()
        kept.append(weakref.ref(argument))
        waiting = asyncio.create_task(threads.run(id, argument))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        del argument, waiting
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.anyio
async def test_close_waits_for_no_call_and_begins_none(threads: Threads, hanging: Hanging) -> None:
    running = await hang(threads, hanging, 3)
    waiting = asyncio.create_task(threads.run(int))
    await asyncio.sleep(0)
    threads.close()
    threads.close()
    await asyncio.wait([waiting], timeout=SOON)
    for call in (waiting, asyncio.create_task(threads.run(int))):
        with pytest.raises(Closed, match="of a test"):
            await call
    hanging.go_on.set()
    await asyncio.wait(running, timeout=SOON)
    assert all(task.done() and task.exception() is None for task in running)


@pytest.mark.anyio
async def test_threads_end_with_close(threads: Threads, hanging: Hanging) -> None:
    running = await hang(threads, hanging, 3)
    hanging.go_on.set()
    await asyncio.wait(running)
    threads.close()
    until = time.monotonic() + SOON
    while any(thread.name.startswith("of a test-") for thread in threading.enumerate()):
        assert time.monotonic() < until, "a thread is left"
        await asyncio.sleep(0.01)


END = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
from holdfast.threads import Threads

async def main():
    begun = threading.Event()
    def hang():
        begun.set()
        threading.Event().wait()
    if sys.argv[1] == "daemons":
        task = asyncio.create_task(Threads("hang", 1).run(hang))
    else:
        task = asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), hang)
    await asyncio.to_thread(begun.wait)
    print("over", flush=True)

asyncio.run(main())
"""


def ends(kind: str, within: float) -> bool:
    """Whether an interpreter ends while a call hangs."""
    command = [sys.executable, "-c", END, kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "over\n"
        return process.wait(within) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.communicate()


def test_the_interpreter_ends_though_a_call_hangs() -> None:
    assert ends("daemons", SOON)


def test_the_interpreter_would_wait_for_a_thread_of_an_executor() -> None:
    assert not ends("executor", 1.0)
