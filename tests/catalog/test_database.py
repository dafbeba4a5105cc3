"""The catalog's schema and its writer."""

from __future__ import annotations

import asyncio
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from holdfast.catalog import (
    Catalog,
    CatalogUnavailable,
    NewerCatalog,
    database,
    deadline,
    epoch,
    migrations,
    tables,
)
from holdfast.catalog.database import SYNC_FAILED
from holdfast.catalog.sqlite import SQLite
from tests.catalog.older import make_tables


def add_key(key: str) -> sa.Insert:
    return tables.api_keys.insert().values(id=key, hash=f"hash-{key}", owner="o", created=1.0)


def execute(statement: sa.Insert, connection: sa.Connection) -> None:
    connection.execute(statement)


def count(connection: sa.Connection) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(tables.api_keys)) or 0


def test_migrations_give_the_tables_of_the_code(catalog: Catalog) -> None:
    def difference(connection: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), tables.metadata)

    assert catalog.read_now(difference) == []


def test_head_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_current_head() == migrations.HEAD


def test_a_newer_schema_is_refused(catalog: Catalog, open_catalog: Callable[[], Catalog]) -> None:
    with catalog._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(NewerCatalog, match="9999"):
        open_catalog()


def test_something_else_than_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(CatalogUnavailable, match="not a database"):
        Catalog.open_file(path)


@pytest.mark.anyio
async def test_writes_that_wait_together_share_a_commit_and_fail_alone(catalog: Catalog) -> None:
    statements = [add_key(str(i % 40)) for i in range(50)]
    results = await asyncio.gather(
        *(catalog.write(partial(execute, s)) for s in statements), return_exceptions=True
    )
    assert sum(isinstance(r, sa.exc.IntegrityError) for r in results) == 10
    assert await catalog.read(count) == 40


@pytest.mark.anyio
async def test_the_end_of_a_write_is_told_also_when_nobody_waits_any_more(catalog: Catalog) -> None:
    told: list[Exception | None] = []
    taken = catalog.begin_write(partial(execute, add_key("a")), told.append)
    twice = catalog.begin_write(partial(execute, add_key("a")), told.append)
    taken.cancel()
    with pytest.raises(sa.exc.IntegrityError):
        await twice
    assert [type(error) for error in told] == [type(None), sa.exc.IntegrityError]
    assert await catalog.read(count) == 1


@pytest.mark.anyio
async def test_what_is_told_of_a_write_is_told_before_whoever_waits_goes_on(
    catalog: Catalog,
) -> None:
    told: list[str] = []
    await catalog.begin_write(count, lambda _: told.append("the end"))
    told.append("who waited")
    assert told == ["the end", "who waited"]


@pytest.mark.anyio
async def test_the_end_of_a_write_that_is_given_up_is_told_too(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is given up that is being made."""
    monkeypatch.setattr(database, "WRITE_WAITS", 0.5)
    held, told = threading.Event(), list[Exception | None]()
    first = catalog.begin_write(lambda _: held.wait(30))
    await asyncio.sleep(0.1)
    late = [catalog.begin_write(partial(execute, add_key(key)), told.append) for key in "ab"]
    late[0].cancel()  # by its caller, who is gone
    with pytest.raises(CatalogUnavailable, match="has not come to this write"):
        await late[1]
    assert [type(error) for error in told] == [CatalogUnavailable] * 2
    assert not first.done()
    held.set()
    assert await first
    assert await catalog.read(count) == 0
    await catalog.write(partial(execute, add_key("c")))


@pytest.mark.anyio
async def test_who_is_told_of_a_write_has_not_its_limit(catalog: Catalog) -> None:
    limits: list[float] = []
    await catalog.begin_write(count, lambda _: limits.append(deadline._until.get()))
    assert limits == [math.inf]


@pytest.mark.anyio
async def test_a_defect_at_the_end_of_a_write_is_nobody_else_s(catalog: Catalog) -> None:
    def defect(_: object) -> None:
        raise ZeroDivisionError

    first = catalog.begin_write(partial(execute, add_key("a")), defect)
    second = catalog.begin_write(partial(execute, add_key("b")))
    with pytest.raises(ZeroDivisionError):
        await first
    await second
    assert await catalog.read(count) == 2


@pytest.mark.anyio
async def test_a_returned_write_is_seen_by_another_process(
    catalog: Catalog, open_catalog: Callable[[], Catalog]
) -> None:
    other = open_catalog()
    assert await other.read(count) == 0
    await catalog.write(lambda c: c.execute(add_key("a")))
    assert await other.read(count) == 1
    other.close()


@pytest.mark.anyio
async def test_what_is_read_at_once_is_of_one_moment(
    catalog: Catalog, open_catalog: Callable[[], Catalog]
) -> None:
    other = open_catalog()

    def count_twice(connection: sa.Connection) -> tuple[int, int]:
        before = count(connection)
        asyncio.run(other.write(lambda c: c.execute(add_key("a"))))
        return before, count(connection)

    assert await catalog.read(count_twice) == (0, 0)
    assert await catalog.read(count) == 1
    other.close()


@pytest.mark.anyio
async def test_a_locked_database_is_told_and_nothing_is_stored(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    await catalog.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout=50"))
    lock = sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(CatalogUnavailable, match="locked"):
        await catalog.write(lambda c: c.execute(add_key("a")))
    lock.execute("ROLLBACK")
    lock.close()
    await catalog.write(lambda c: c.execute(add_key("b")))
    assert await catalog.read(count) == 1
    catalog.close()


ENDS = """
import asyncio, sqlite3, sys
import sqlalchemy as sa
from pathlib import Path
from holdfast.catalog import Catalog, SyncFailed

class Failing(sqlite3.Connection):
    fail = False

    def commit(self):
        if Failing.fail:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = sys.argv[2]
            raise error
        super().commit()

    def execute(self, statement, *args):
        if Failing.fail and "wal_checkpoint" in statement:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error
        return super().execute(statement, *args)

async def main():
    catalog = Catalog.open_file(Path(sys.argv[1]))
    await catalog.write(lambda c: c.exec_driver_sql("INSERT INTO api_keys VALUES (1,2,3,4,5)"))
    Failing.fail = True
    if sys.argv[2] == "checkpoint":
        Failing.commit = sqlite3.Connection.commit
        nothing = [catalog.write(lambda c: None) for _ in range(300)]
        await asyncio.gather(*nothing)
        await asyncio.sleep(5)
    if sys.argv[2] == "SyncFailed":
        Failing.fail = False
        def fail():
            raise SyncFailed("the file")
        catalog.before_commit(fail)
    try:
        await catalog.write(lambda c: c.exec_driver_sql("DELETE FROM api_keys"))
    except BaseException as error:
        print("told", type(error).__name__)

connect = sqlite3.connect
sqlite3.dbapi2.connect = lambda *args, **kwargs: connect(*args, factory=Failing, **kwargs)
asyncio.run(main())
print("lived on")
"""


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("SQLITE_IOERR_FSYNC", True),
        ("SyncFailed", True),
        ("checkpoint", True),
        ("SQLITE_IOERR_WRITE", False),
    ],
)
def test_a_failed_sync_ends_the_process_before_anybody_is_told(
    tmp_path: Path, how: str, ends: bool
) -> None:
    path = tmp_path / "catalog.db"
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(path), how], capture_output=True, text=True, timeout=60
    )
    if ends:
        assert (done.returncode, done.stdout) == (SYNC_FAILED, "")
        assert "not synced" in done.stderr
    else:
        assert done.stdout.split() == ["told", "CatalogUnavailable", "lived", "on"], done.stderr
    catalog = Catalog.open_file(path)
    assert catalog.read_now(count) == 1
    catalog.close()


@pytest.mark.anyio
async def test_a_defect_before_a_commit_is_told_and_the_writer_lives_on(catalog: Catalog) -> None:
    defects = [ValueError("a defect"), ValueError("a defect")]

    def fail() -> None:
        if defects:
            raise defects.pop()

    catalog.before_commit(fail)
    with pytest.raises(ValueError, match="a defect"):
        await asyncio.wait_for(catalog.write(partial(execute, add_key("a"))), 10)
    await asyncio.wait_for(catalog.write(partial(execute, add_key("b"))), 10)
    assert await catalog.read(count) == 1


@pytest.mark.anyio
async def test_the_write_ahead_log_does_not_grow_with_the_number_of_writes(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    log = tmp_path / "catalog.db-wal"
    sizes = []
    for round_ in range(4):
        for i in range(0, 1200, 50):
            keys = [add_key(f"{round_}-{i + j}") for j in range(50)]
            await asyncio.gather(*(catalog.write(partial(execute, key)) for key in keys))
        await catalog.write(lambda c: c.execute(tables.api_keys.delete()))
        sizes.append(log.stat().st_size)
    assert max(sizes[1:]) <= 1.5 * sizes[0]
    catalog.close()


@pytest.mark.anyio
async def test_nobody_waits_for_the_write_ahead_log_to_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on = threading.Event(), threading.Event()
    tidy = SQLite.tidy

    def tidy_slowly(self: SQLite, connection: sa.Connection) -> None:
        if not began.is_set():
            began.set()
            assert goes_on.wait(10)
        tidy(self, connection)

    monkeypatch.setattr(SQLite, "tidy", tidy_slowly)
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    await asyncio.gather(*(catalog.write(partial(execute, add_key(str(i)))) for i in range(300)))
    assert await asyncio.to_thread(began.wait, 10)
    for i in range(300, 310):
        await catalog.write(partial(execute, add_key(str(i))))

    def in_database_alone() -> int:
        copy = tmp_path / "copy.db"
        shutil.copy(tmp_path / "catalog.db", copy)
        with closing(sqlite3.connect(copy)) as connection:
            tables = "SELECT count(*) FROM sqlite_master WHERE name = 'api_keys'"
            if connection.execute(tables).fetchone() == (0,):
                return 0
            found: int = connection.execute("SELECT count(*) FROM api_keys").fetchone()[0]
            return found

    assert in_database_alone() == 0
    goes_on.set()
    deadline = time.monotonic() + 10
    while in_database_alone() < 310:
        assert time.monotonic() < deadline, "the log was not moved"
        await asyncio.sleep(0.05)
    catalog.close()


async def write_for_a_while(catalog: Catalog, enough: Callable[[], bool]) -> None:
    """Until the log was to be moved often enough; each write is answered."""
    written, deadline = 0, time.monotonic() + 20
    while not enough():
        assert time.monotonic() < deadline, "the log is moved no more"
        keys = [add_key(str(written + i)) for i in range(50)]
        writes = asyncio.gather(*(catalog.write(partial(execute, key)) for key in keys))
        await asyncio.wait_for(writes, 10)
        written += len(keys)
    assert await catalog.read(count) == written


@pytest.mark.anyio
async def test_a_damaged_page_that_is_met_beside_the_writes_ends_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: set[str] = set()

    class Malformed(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
            if "wal_checkpoint" in statement:
                met.add(threading.current_thread().name)
                raise sqlite3.DatabaseError("database disk image is malformed")
            return super().execute(statement, *args)

    connect = partial(sqlite3.connect, factory=Malformed)
    monkeypatch.setattr("sqlite3.dbapi2.connect", connect)
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    await write_for_a_while(catalog, lambda: met == {"catalog-writer", "catalog-tidier"})
    catalog.close()


@pytest.mark.anyio
async def test_a_defect_in_moving_the_log_ends_neither_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[str] = []

    def tidy(*_: Any) -> None:
        met.append(threading.current_thread().name)
        raise ValueError("a defect")

    monkeypatch.setattr(SQLite, "tidy", tidy)
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    await write_for_a_while(
        catalog, lambda: min(map(met.count, ("catalog-writer", "catalog-tidier"))) >= 2
    )
    catalog.close()


WITHOUT_A_WRITER = """
import asyncio, sys
from pathlib import Path
from holdfast.catalog import Catalog

def fail(*_):
    raise ValueError("a defect")

Catalog._next_batch = fail
asyncio.run(Catalog.open_file(Path(sys.argv[1])).write(lambda c: None))
"""


def test_a_server_does_not_go_on_without_its_writer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_WRITER, str(tmp_path / "catalog.db")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == SYNC_FAILED
    assert "the catalog's writer has ended" in done.stderr and "a defect" in done.stderr


def test_durability_settings(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")

    def pragmas(connection: sa.Connection) -> tuple[object, object]:
        return (
            connection.exec_driver_sql("PRAGMA journal_mode").scalar(),
            connection.exec_driver_sql("PRAGMA synchronous").scalar(),
        )

    assert catalog.read_now(pragmas) == ("wal", 2)
    catalog.close()


def test_bodies_and_results_of_an_older_schema_are_kept(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'catalog.db'}")
    make_tables(engine, "0003")
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO runs (id, generation, session_id, owner, created, last_request, state,"
                " body_hash, corrupted) VALUES ('R', 0, 'S', 'o', 1.0, 1.0, 'live', '', 0)"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO operations (run_id, generation, seq, kind, state, body, result,"
                " attempts, accepted) VALUES ('R', 0, 1, 'forward', 'done', x'0102', x'030405', 0,"
                " 1.0), ('R', 0, 2, 'forward', 'accepted', x'06', NULL, 0, 1.0)"
            )
        )
    engine.dispose()
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    columns = (tables.contents.c.seq, tables.contents.c.part, tables.contents.c.data)
    found = catalog.read_now(lambda c: c.execute(sa.select(*columns)).all())
    assert sorted(map(tuple, found)) == [
        (1, "body", b"\1\2"),
        (1, "result", b"\3\4\5"),
        (2, "body", b"\6"),
    ]
    sizes = catalog.read_now(lambda c: c.scalars(sa.select(tables.operations.c.result_size)).all())
    assert sorted(sizes, key=str) == [3, None]
    catalog.close()


def test_an_index_of_the_first_schema_is_made_anew(tmp_path: Path) -> None:
    """Its rows say nothing of files; the server fills it from the store when it starts."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'catalog.db'}")
    make_tables(engine, "0001")
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO api_keys VALUES ('k', 'h', 'o', 1.0, NULL)"))
        connection.execute(
            sa.text(
                "INSERT INTO checkpoints VALUES"
                " ('R', 'weights', 'x', 'id', 'o', 1.0, NULL, 0, 7, 1, NULL)"
            )
        )
    engine.dispose()
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    assert catalog.read_now(epoch.current).who.startswith("an upgrade of its tables, since 2")
    assert catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoints)).all()) == []
    assert catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoint_files)).all()) == []
    assert catalog.read_now(count) == 1
    catalog.close()


@pytest.mark.anyio
async def test_a_database_that_hangs_is_not_waited_for_without_end(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "READ_TAKES", 0.1)
    answers = threading.Event()
    with pytest.raises(CatalogUnavailable, match="has not answered for 0 s"):
        await catalog.read(lambda _: answers.wait(30.0))
    answers.set()
    monkeypatch.undo()
    assert await catalog.read(count) == 0


SOON = 10.0
"""Seconds within which what is not kept waiting is done, also on a busy machine."""


@pytest.mark.anyio
async def test_threads_that_hang_elsewhere_keep_nobody_from_reading(catalog: Catalog) -> None:
    go_on = threading.Event()
    try:  # more than there are
        hanging = [asyncio.create_task(asyncio.to_thread(go_on.wait)) for _ in range(50)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(SOON):
            assert await catalog.read(count) == 0
    finally:
        go_on.set()
    await asyncio.gather(*hanging)


@pytest.mark.anyio
async def test_a_read_that_hangs_holds_up_no_close(open_catalog: Callable[[], Catalog]) -> None:
    catalog, begun, go_on = open_catalog(), threading.Event(), threading.Event()

    def hang(connection: sa.Connection) -> None:
        begun.set()
        go_on.wait()
        connection.invalidate()  # as the pool would, which is closed by then

    try:
        reading = asyncio.create_task(catalog.read(hang))
        async with asyncio.timeout(SOON):
            await asyncio.to_thread(begun.wait)
            await asyncio.to_thread(catalog.close)
        assert not reading.done()
    finally:
        go_on.set()
    await reading
