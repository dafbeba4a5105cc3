"""Whatever ends a run, each request that was accepted has an outcome and nothing is left over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import operations
from holdfast.runs import bodies
from holdfast.runs.bodies import CreateFromState
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Outcome

from .test_service import OWNER, Clients
from .toy import NAME, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(params=[1, 3])
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    clients = Clients()
    clients.begin(seed=request.param, client="python")
    yield clients
    clients.close()


def unsettled(clients: Clients) -> list[tuple[str, int]]:
    """Requests that wait for their outcome, as the journal has them."""
    with clients._world.catalog._engine.connect() as connection:
        query = sa.select(operations.c.run_id, operations.c.seq).where(
            operations.c.settled.is_(None)
        )
        return [(row.run_id, row.seq) for row in connection.execute(query)]


# --- Requests that come while the run ends --------------------------------------------------


def submit_beside(
    clients: Clients, model_id: str, end: Callable[[], Coroutine[Any, Any, None]]
) -> list[str]:
    """Send requests one after the other without waiting, and end the run; those accepted."""
    accepted: list[str] = []

    async def submit(number: int) -> None:
        try:
            run = await clients._world.runs.live(model_id, OWNER)
            accepted.append(await run.submit(number, bodies.FORWARD_BACKWARD, batch(number)))
        except RunError as error:
            assert error.code in ("model_unloaded", "session_ended", "creation_failed")

    async def both() -> None:
        requests = [asyncio.create_task(submit(number)) for number in range(1, 20)]
        await asyncio.gather(end(), *requests)

    clients._do(both)
    return accepted


async def nothing() -> None:
    """It ends by itself."""


def outcomes(clients: Clients, accepted: list[str]) -> list[Outcome | None]:
    async def poll() -> list[Outcome | None]:
        return [(await clients._world.runs.outcome(id, OWNER, 60.0))[0] for id in accepted]

    found: list[Outcome | None] = clients._do(poll)
    return found


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003])
@pytest.mark.parametrize("whole_session", [False, True])
def test_a_request_that_is_accepted_while_its_run_ends_has_an_outcome(
    clients: Clients, whole_session: bool, delay: float
) -> None:
    (run,), (session,) = clients.all, clients.sessions
    clients.all_end()

    async def end() -> None:
        await asyncio.sleep(delay)
        if whole_session:
            await clients._world.runs.end_session(session.id, "success")
        else:
            await clients._world.runs.unload(run.id, OWNER)

    accepted = submit_beside(clients, run.id, end)
    assert accepted
    assert None not in outcomes(clients, accepted)
    clients._world.let(60.0)
    assert unsettled(clients) == []
    assert None not in outcomes(clients, accepted)


def test_a_request_that_is_accepted_while_the_creation_fails_has_an_outcome(
    clients: Clients,
) -> None:
    (session,) = clients.sessions
    for number in range(100, 105):
        body = CreateFromState("nobody", "weights", "nowhere", True, [OWNER])

        async def create(number: int = number, body: CreateFromState = body) -> str:
            run = await clients._world.runs.create_from_state(
                session, number, body, user_metadata=None, idempotency_key=None
            )
            return run.key.id

        accepted = submit_beside(clients, clients._do(create), nothing)
        found = outcomes(clients, accepted)
        assert {x.failure.code for x in found if x and x.failure} <= {"creation_failed"}
        assert None not in found
    clients._world.let(60.0)
    assert unsettled(clients) == []


def test_a_run_that_is_created_while_its_session_ends_ends_with_it(clients: Clients) -> None:
    (session,) = clients.sessions
    world = clients._world

    async def create(number: int) -> str | None:
        lora = {"rank": 1, "seed": 1}
        try:
            run = await world.runs.create(
                session,
                number,
                base_model=NAME,
                lora=lora,
                optimizer="adamw",
                user_metadata=None,
                idempotency_key=None,
            )
        except RunError as error:
            assert error.code == "session_ended"
            return None
        return run.key.id

    async def both() -> list[str | None]:
        creations = [asyncio.create_task(create(number)) for number in range(10, 16)]
        await asyncio.sleep(0.002)
        await world.runs.end_session(session.id, "success")
        return await asyncio.gather(*creations)

    created = [id for id in clients._do(both) if id is not None]
    world.let(60.0)

    async def states() -> set[str]:
        return {(await world.runs.record(id, OWNER)).state for id in created}

    assert clients._do(states) <= {"unloaded"}
    assert unsettled(clients) == []
