"""What earlier versions have journaled is compared by the hashes that they recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import contents, operations
from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Outcome
from holdfast.runs.publishing import Publisher

from .model import Op
from .sim import World
from .test_recovery import train
from .test_service import Clients
from .toy import batch


def record_as_before(clients: Clients, *, of_results: bytes = b"") -> None:
    """Put hashes in the place of all of a journal, as the first versions made them.

    Those `of_results` are of what is there and this.
    """
    with clients._world.catalog._engine.begin() as connection:
        for row in connection.execute(sa.select(contents)).all():
            data = row.data + of_results if row.part == "result" else row.data
            name = "body_hash" if row.part == "body" else "result_hash"
            hashed = hashlib.blake2b(data, digest_size=32).hexdigest()
            this = (operations.c.run_id == row.run_id) & (operations.c.seq == row.seq)
            changed = connection.execute(operations.update().where(this).values({name: hashed}))
            assert changed.rowcount == 1


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    """With all bodies in the catalog, and without snapshots: all is replayed."""
    monkeypatch.setattr(Publisher, "due", False)
    clients = Clients()
    clients.world = World(1, large=False)
    clients.open_session("python")
    clients.create(0, 1)
    yield clients
    clients.close()


def go_on(clients: Clients) -> Outcome:
    """After a kill, with what an earlier version left: the outcome of the next operation."""
    world, (run,) = clients._world, clients.all
    world.kill()
    clients._submit(run, FORWARD_BACKWARD, batch(9))
    outcome, _ = clients._poll(run.ops[run.highest], 60.0)
    assert outcome is not None
    return outcome


def test_a_run_of_an_earlier_version_goes_on(clients: Clients) -> None:
    """Its replay is compared, and what is sent again is the same request."""
    (run,) = clients.all
    train(clients, 3)
    clients.all_end()
    record_as_before(clients)
    assert go_on(clients).failure is None
    first = run.ops[1]
    assert clients._send(run, first) == first.request_id
    for other in (Op(1, FORWARD_BACKWARD, batch(77)), Op(1, OPTIM_STEP, first.body)):
        with pytest.raises(RunError, match="was used for another request"):
            clients._send(run, other)


def test_a_replay_is_compared_by_them(clients: Clients) -> None:
    train(clients, 3)
    clients.all_end()
    record_as_before(clients, of_results=b"!")
    failure = go_on(clients).failure
    assert failure is not None and failure.code == "replay_diverged"
