"""Copies of checkpoints: one for each request, and nobody waits for those of others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import runs
from holdfast.runs import bodies
from holdfast.runs.bodies import Save
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.copies import Destination
from holdfast.runs.errors import RunError
from holdfast.runs.stored import STORED
from holdfast.store import Manifest, NameKey

from .test_service import OWNER, Clients, create_run
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

HOUR = 3600.0


@pytest.fixture
def source(clients: Clients) -> NameKey:
    """A saved checkpoint."""
    (run,) = clients.all
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(1))
    clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    clients.all_end()
    return NameKey(run.id, "weights", "a")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs of the copies that were published, each of which takes an hour."""
    honest, found = Checkpoints.publish, list[str]()

    async def publish(checkpoints: Checkpoints, manifest: Manifest, **others: Any) -> str:
        if (manifest.request_id or "").endswith(":copy"):
            found.append(manifest.run)
            await asyncio.sleep(HOUR)
        return await honest(checkpoints, manifest, **others)

    monkeypatch.setattr(Checkpoints, "publish", publish)
    return found


async def copy(
    clients: Clients, source: NameKey, key: str, destination: Destination | None = None
) -> NameKey:
    return await clients._world.runs.copies.copy(
        source, OWNER, [OWNER], destination=destination, idempotency_key=key
    )


def copies(clients: Clients) -> list[str]:
    """The runs that hold copies."""
    with clients._world.catalog._engine.connect() as connection:
        return list(connection.scalars(sa.select(runs.c.id).where(runs.c.state == STORED)))


def test_a_copy_that_takes_an_hour_delays_neither_creations_nor_ends(
    clients: Clients, source: NameKey, published: list[str]
) -> None:
    world, (session,) = clients._world, clients.sessions
    clients.all[0].ending = "session_ended"

    async def meanwhile() -> tuple[float, str]:
        copying = asyncio.create_task(copy(clients, source, "k"))
        # One more within the session itself, so that its end could wait for that.
        into = asyncio.create_task(copy(clients, source, "l", Destination(session, 8)))
        await asyncio.sleep(1.0)
        began = world.clock.now
        made = await create_run(world, session, 77, {"rank": 1, "seed": 1})
        took = world.clock.now - began
        await world.runs.end_session(session.id, "success")
        await asyncio.sleep(60.0)
        assert not copying.done() and not into.done()
        state = (await world.runs.record(made.key.id, OWNER)).state
        await asyncio.gather(copying, into)
        return took, state

    took, state = world.loop.run_until_complete(meanwhile())
    assert took < 1.0
    assert state == "unloaded"
    assert sorted(copies(clients)) == sorted(published)


def asked_twice(clients: Clients, source: NameKey) -> list[NameKey]:
    async def both() -> list[NameKey]:
        return await asyncio.gather(*(copy(clients, source, "k") for _ in range(2)))

    return clients._world.loop.run_until_complete(both())


def test_a_copy_that_is_asked_for_twice_at_once_is_one(
    clients: Clients, source: NameKey, published: list[str]
) -> None:
    first, second = asked_twice(clients, source)
    assert first == second
    assert copies(clients) == published == [first.run]


def test_a_copy_that_has_begun_is_made_though_its_client_goes_away(
    clients: Clients, source: NameKey, published: list[str]
) -> None:
    """And the same request again finds it."""

    async def ask_and_go_away() -> NameKey:
        copying = asyncio.create_task(copy(clients, source, "k"))
        await asyncio.sleep(60.0)
        copying.cancel()
        await asyncio.wait([copying])
        assert copying.cancelled() and not copies(clients)
        return await copy(clients, source, "k")

    copied = clients._world.loop.run_until_complete(ask_and_go_away())
    assert copies(clients) == published == [copied.run]


def test_without_a_lock_on_its_run_a_copy_is_made_twice(
    clients: Clients, source: NameKey, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "creating", lambda *_: asyncio.Lock())
    with pytest.raises(sa.exc.IntegrityError):
        asked_twice(clients, source)


@pytest.mark.parametrize("copy_first", [False, True])
def test_of_a_copy_and_a_creation_of_the_same_number_one_is_refused(
    clients: Clients, source: NameKey, published: list[str], copy_first: bool
) -> None:
    world, (session,) = clients._world, clients.sessions

    async def create() -> None:
        run = await create_run(world, session, 77, {"rank": 1, "seed": 1})
        await run.submit(1, bodies.FORWARD_BACKWARD, batch(1))

    async def both() -> list[BaseException | None]:
        calls: list[Any] = [create(), copy(clients, source, "k", Destination(session, 77))]
        tasks = []
        for call in reversed(calls) if copy_first else calls:
            tasks.append(asyncio.create_task(call))
            await asyncio.sleep(1.0)
        await asyncio.wait(tasks)
        return [task.exception() for task in tasks]

    won, lost = world.loop.run_until_complete(both())
    assert won is None
    assert isinstance(lost, RunError) and lost.code == "model_exists"
