"""A flipped bit in the journal: told with its place, and never computed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import contents as rows
from holdfast.engine.interface import EngineError
from holdfast.runs import bodies, contents, journal
from holdfast.runs.bodies import Save
from holdfast.runs.contents import Address
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Failure
from holdfast.runs.publishing import Publisher
from holdfast.runs.segments import Segments

from .sim import World
from .test_service import Clients, steps
from .toy import ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

FORWARD_BACKWARD, OPTIM_STEP = bodies.FORWARD_BACKWARD, bodies.OPTIM_STEP
_RECORD_HEADER = 40


@pytest.fixture(params=["in segments", "in the catalog"])
def clients(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    monkeypatch.setattr(Publisher, "due", False)
    clients = Clients()
    clients.world = World(1, large=request.param == "in segments")
    clients.open_session("python")
    clients.create(0, 1)
    yield clients
    clients.close()


def damage(clients: Clients, run: int, seq: int, part: str) -> str:
    """Flip a bit of a body or result; where that is."""
    this = (rows.c.run_id == clients.all[run].id) & (rows.c.seq == seq) & (rows.c.part == part)
    with clients._world.catalog._engine.begin() as connection:
        row = connection.execute(sa.select(rows).where(this)).one()
        if row.segment is None:
            data = bytes([row.data[0], row.data[1] ^ 1]) + row.data[2:]
            connection.execute(rows.update().where(this).values(data=data))
            return "the catalog"
    path = clients._world.root / "segments" / row.segment
    honest = path.read_bytes()
    at = row.start + _RECORD_HEADER
    path.write_bytes(honest[:at] + bytes([honest[at] ^ 1]) + honest[at + 1 :])
    return str(path)


def failure(clients: Clients, run: int, seq: int) -> Failure | None:
    outcome, _ = clients._poll(clients.all[run].ops[seq], 30.0)
    assert outcome is not None
    return outcome.failure


@pytest.mark.parametrize("server", [True, False])
def test_a_run_that_cannot_be_replayed_stops_and_no_other(clients: Clients, server: bool) -> None:
    clients.create(1, 1)
    first, second = clients.all
    for run in (first, second):
        clients._submit(run, FORWARD_BACKWARD, batch(1))
        clients._submit(run, OPTIM_STEP, steps())
    clients.all_end()
    path = damage(clients, 0, 1, "body")
    if server:
        clients.kill()
    else:
        clients.kill_the_worker()
    try:
        clients._submit(first, OPTIM_STEP, steps())
    except RunError as gone:  # it has noticed already
        message = gone.message
    else:
        found = failure(clients, 0, 3)
        assert found is not None and found.code == "journal_damaged"
        message = found.message
    assert path in message and "request 1 " in message
    clients._submit(second, FORWARD_BACKWARD, batch(2))
    first.ending = "journal_damaged"
    clients.all_end()
    clients._check_logs()


def test_an_operation_that_cannot_be_read_fails_and_marks_the_gradients(clients: Clients) -> None:
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients.all_end()
    clients._world.lives[-1].hang()
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._submit(run, OPTIM_STEP, steps())
    clients._submit(run, FORWARD_BACKWARD, batch(3))
    clients._submit(run, OPTIM_STEP, steps())
    clients.kill()  # what was not executed is in the journal only
    path = damage(clients, 0, 2, "body")
    for again in range(2):  # and again as a replay has it
        found = failure(clients, 0, 2)
        assert found is not None and found.code == "journal_damaged" and path in found.message
        found = failure(clients, 0, 3)
        assert found is not None and found.code == "incomplete_gradients"
        assert "forward_backward 2 failed" in found.message
        assert failure(clients, 0, 4) is None and failure(clients, 0, 5) is None
        if not again:
            clients.kill_the_worker()
            clients._submit(run, FORWARD_BACKWARD, batch(4))
            assert failure(clients, 0, 6) is None
    clients._check_logs()


def test_a_result_that_cannot_be_read_is_told_and_the_run_goes_on(clients: Clients) -> None:
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients.all_end()
    path = damage(clients, 0, 1, "result")
    clients.kill()  # it is in memory before
    found = failure(clients, 0, 1)
    assert found is not None and found.code == "journal_damaged"
    assert path in found.message and "was done" in found.message
    clients._submit(run, OPTIM_STEP, steps())
    clients.all_end()
    clients._check_logs()


def test_a_save_that_cannot_be_read_ends_no_run_that_waits(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at when the others fail for want of a recovery, whether it was made before."""
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients.all_end()
    clients._world.lives[-1].hang()
    clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    with monkeypatch.context() as planted:

        async def restore(*_: Any, **__: Any) -> None:
            raise EngineError("out_of_memory", "it ran out of memory", "server")

        planted.setattr(ToyEngine, "restore", restore)
        clients.kill()
        damage(clients, 0, 2, "body")
        for _ in range(25):
            clients._poll(run.ops[3], 30.0)
        for seq in (2, 3):
            found = failure(clients, 0, seq)
            assert found is not None and found.code == "out_of_memory"
    run.ops.pop(2), run.ops.pop(3)
    clients._submit(run, OPTIM_STEP, steps(), seq=4)
    found = failure(clients, 0, 4)
    assert found is not None and found.code == "incomplete_gradients"
    clients._check_logs()


def test_damage_that_is_not_looked_for_is_computed_with(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes are what finds it: without, the same damage goes unnoticed to the engine."""

    def read(self: Segments, path: str, start: int, size: int) -> bytes:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(start + _RECORD_HEADER)
            return file.read(size)

    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients.all_end()
    damage(clients, 0, 1, "result")
    clients.kill()
    assert failure(clients, 0, 1) is not None
    monkeypatch.setattr(Segments, "_read", read)

    def content(*where: Any) -> bytes | None:
        connection, segments, key, seq, part = where
        return contents.get(connection, segments, Address(key.id, key.generation, seq), part)

    monkeypatch.setattr(journal, "_content", content)
    assert failure(clients, 0, 1) is None
