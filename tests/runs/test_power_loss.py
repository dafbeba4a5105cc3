"""A whole server on a disk that loses power at any call: journal, segments, store and catalog.

The catalog's commits have their places among the calls; each one that was made is kept, as SQLite
promises with synchronous=FULL. Of the files any part of what was not synced is lost. Then another
server starts over what is left, and the client goes on with its script: no answered submission, no
outcome and no checkpoint is lost, and everything that a row refers to verifies.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import contents as content_rows
from holdfast.catalog.tables import snapshots
from holdfast.runs import bodies, segments
from holdfast.runs.bodies import Load, Save
from holdfast.runs.errors import Unavailable
from holdfast.runs.segments import JournalDamaged, Place, Segments
from tests.store.crash import Disk

from .sim import Survives, World
from .test_service import OWNER, Clients, steps
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

EVERY_WAY = "HOLDFAST_EXAMPLES" in os.environ
"""Whether each call is tried with each that a disk may keep, or with one of them in turn."""
CHANGES = ("create", "write", "sync", "sync_dir", "rename", "unlink", "mkdir", "begin", "committed")


def nothing(disk: Disk, _random: random.Random) -> Disk:
    return disk.after_power_loss(lambda n: False)


def everything(disk: Disk, _random: random.Random) -> Disk:
    return disk.after_power_loss(lambda n: True)


def any_part(disk: Disk, random_: random.Random) -> Disk:
    return disk.after_power_loss(lambda n: random_.random() < 0.5, random_)


def train(clients: Clients, x: int) -> None:
    (run,) = clients.all
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(x))
    clients._submit(run, bodies.OPTIM_STEP, steps())


def save(clients: Clients, name: str, *, overwrite: bool = False) -> None:
    (run,) = clients.all
    clients._submit(run, bodies.SAVE_WEIGHTS, Save(name, None, overwrite))


def read_everything(clients: Clients) -> None:
    """Poll each outcome once more, now taking it."""
    clients.all_end()
    for op in clients.all[0].ops.values():
        outcome, _ = clients._poll(op, 1.0)
        assert outcome is not None
        clients._check(clients.all[0], op, outcome)
        clients._world.runs.delivered(op.request_id)
        op.read_at = op.read_at or clients._now


def submit_and_save(clients: Clients) -> None:
    """Submissions, results, saves, a load, and snapshots when nothing happens for a while."""
    train(clients, 1)
    save(clients, "a")
    train(clients, 2)
    clients.pass_time(12.0)  # long enough for a snapshot
    save(clients, "a", overwrite=True)
    clients._submit(
        clients.all[0], bodies.LOAD_WEIGHTS, Load(clients.all[0].id, "weights", "a", True, [OWNER])
    )
    train(clients, 3)
    clients.all_end()


def replay_and_expire(clients: Clients) -> None:
    """Snapshots that leave bodies behind, a replay, results that expire, segments that go."""
    train(clients, 1)
    clients.all_end()
    clients.pass_time(12.0)
    train(clients, 2)
    read_everything(clients)
    clients.pass_time(31.0)
    train(clients, 3)
    clients.kill_the_worker()
    train(clients, 4)
    read_everything(clients)
    clients.pass_time(640.0)
    train(clients, 5)
    clients.all_end()


Script = Callable[[Clients], None]


@contextmanager
def world(survives: Survives) -> Iterator[Clients]:
    """Clients of a server with a run, every body and result of which is in small segments."""
    clients = Clients()
    with mock.patch.object(segments, "FULL", 400):
        try:
            clients.world = World(1, survives, large=True)
            clients.open_session("python")
            clients.create(0, 1)
            yield clients
        finally:
            clients.close()


def everything_verifies(world: World) -> None:
    """Whatever a row refers to is there, and is what was written."""
    with world.catalog._engine.connect() as connection:
        rows = connection.execute(
            sa.select(content_rows).where(content_rows.c.segment.is_not(None))
        ).all()
        manifests = connection.scalars(sa.select(snapshots.c.manifest)).all()
    for row in rows:
        assert len(world.segments.read(Place(row.segment, row.start), row.size)) == row.size
    for manifest_id in manifests:
        report = world.store.verify(manifest_id)
        assert report.ok, report.problems
    assert world.store.verify().ok


def calls_of(script: Script) -> list[int]:
    """The numbers of the calls that change something, in an undisturbed run."""
    with world(nothing) as clients:
        power = clients._world.power
        assert power is not None
        first = power.calls
        script(clients)
        assert clients._world.power is power
        return [n for n in range(first, power.calls) if power.log[n].split()[0] in CHANGES]


def perform(script: Script, survives: Survives, die_at: int) -> None:
    """Run the script with a loss of power at a call, and see that nothing is missing."""
    with world(survives) as clients:
        assert clients._world.power is not None
        clients._world.power.die_at = die_at
        clients._world.checked_at_boot = everything_verifies
        script(clients)
        # Files have drawn names, so that the order and number of calls may differ a little.
        assert clients._world.kills == 1 or clients._world.power.calls <= die_at
        clients.all_end()
        save(clients, "at.the.end")
        clients.all_end()
        everything_verifies(clients._world)
        clients._check_checkpoints()
        clients._check_logs()


WAYS: list[Survives] = [nothing, any_part, everything]


@pytest.mark.parametrize("survives", WAYS)
@pytest.mark.parametrize("script", [submit_and_save, replay_and_expire])
def test_nothing_is_lost_whenever_the_power_is(script: Script, survives: Survives) -> None:
    calls = calls_of(script)
    assert len(calls) > 100
    for die_at in calls if EVERY_WAY else calls[WAYS.index(survives) :: len(WAYS)]:
        perform(script, survives, die_at)


def test_a_full_disk_refuses_submissions_and_settles_nothing() -> None:
    with world(nothing) as clients:
        (run,) = clients.all
        train(clients, 1)
        clients.all_end()
        power = clients._world.power
        assert power is not None
        power.full = True
        body = batch(2)

        async def submit() -> str:
            live = await clients._world.runs.live(run.id, OWNER)
            return await live.submit(3, bodies.FORWARD_BACKWARD, body)

        for _ in range(2):
            with pytest.raises(Unavailable, match="No space left"):
                clients._world.loop.run_until_complete(submit())
        power.full = False
        clients._submit(run, bodies.FORWARD_BACKWARD, body)
        power.full = True  # its result waits until there is room
        clients.pass_time(30.0)
        assert clients._poll(run.ops[3], 0.0)[0] is None
        power.full = False
        clients.all_end()
        train(clients, 3)
        clients.all_end()
        everything_verifies(clients._world)
        clients._check_logs()


def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segments, "sync", lambda self: self._unsynced.clear())


def no_directory_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Segments._writable

    def writable(self: Segments) -> object:
        segment = honest(self)
        segment.is_entered = True
        return segment

    monkeypatch.setattr(Segments, "_writable", writable)


def commit_first(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Catalog._transact

    def transact(self: Catalog, *args: object) -> None:
        calls, self._before_commit = self._before_commit, []
        try:
            honest(self, *args)  # type: ignore[arg-type]
        finally:
            self._before_commit = calls
        for call in calls:
            call()

    monkeypatch.setattr(Catalog, "_transact", transact)


@pytest.mark.parametrize("plant", [no_sync, no_directory_entry, commit_first])
def test_a_planted_defect_loses_something(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, JournalDamaged, FileNotFoundError)):
        for die_at in calls_of(submit_and_save):
            perform(submit_and_save, nothing, die_at)
