"""A disk that does not answer, or the database on it, keeps nobody waiting without a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from holdfast.runs.bodies import FORWARD_BACKWARD
from holdfast.runs.errors import Unavailable
from holdfast.runs.run import SUBMISSION_WAITS

from .sim import World
from .test_service import OWNER, Clients
from .toy import batch

HOUR = 3600.0


@contextmanager
def hanging(world: World, what: str) -> Iterator[None]:
    """What is begun meanwhile ends an hour later."""
    with pytest.MonkeyPatch.context() as changes:
        honest = world.pause
        changes.setattr(world, "pause", lambda w: HOUR if w == what else honest(w))
        yield


def test_a_submission_waits_half_a_minute_for_one_that_hangs_in_the_catalog(
    clients: Clients,
) -> None:
    """And none is lost, nor taken twice: what was sent is journaled as soon as the disk answers."""
    world, (run,) = clients._world, clients.all
    first, second = clients._next_requests(run, 2, 1)

    async def send() -> float:
        live = await world.runs.live(run.id, OWNER)
        with hanging(world, "commit"):
            hung = asyncio.create_task(live.submit(first.seq, FORWARD_BACKWARD, batch(1)))
            await asyncio.sleep(1.0)
        began = world.clock.now
        for seq in (second.seq, first.seq):  # the next one, and the same one again
            with pytest.raises(Unavailable, match="has not been journaled"):
                await live.submit(seq, FORWARD_BACKWARD, batch(1))
        took = world.clock.now - began
        assert not hung.done()
        assert (
            await hung
            == await live.submit(first.seq, FORWARD_BACKWARD, batch(1))
            == first.request_id
        )
        assert await live.submit(second.seq, FORWARD_BACKWARD, batch(1)) == second.request_id
        return took

    assert world.loop.run_until_complete(send()) == pytest.approx(2 * SUBMISSION_WAITS, abs=1.0)
    for op in (first, second):
        outcome, _ = clients._poll(op, 30.0)
        assert outcome is not None and outcome.failure is None
