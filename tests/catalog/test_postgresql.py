"""The catalog on PostgreSQL: addresses, the lease, lost connections, commits without an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog import (
    CannotOpen,
    Catalog,
    CatalogInUse,
    CatalogUnavailable,
    database,
    postgresql,
    tables,
)
from holdfast.catalog.database import SYNC_FAILED
from holdfast.catalog.statements import Statement
from tests.catalog.older import make_tables
from tests.catalog.replaced import add_key, add_one_over, keys
from tests.support.postgres import SECRET, Line, Postgres, line_to
from tests.support.processes import wait_until

# --- Addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        f"holdfast:{SECRET}@db/holdfast",
        f"mysql://holdfast:{SECRET}@db/holdfast",
        f"postgresql+psycopg2://holdfast:{SECRET}@db/holdfast",
        f"postgresql://holdfast:{SECRET}@db:port/holdfast",
        f"sqlite:///{SECRET}.db",
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(CannotOpen, match="postgresql://USER@HOST/DATABASE") as refused:
        Catalog.open(wrong)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_an_address_may_name_the_driver(address: str, scheme: str) -> None:
    catalog = Catalog.open(address.replace("postgresql", scheme, 1))
    assert catalog.read_now(keys) == []
    assert not catalog.is_local
    catalog.close()


def test_no_message_has_the_password(postgres: Postgres, address: str) -> None:
    messages = []

    def refused(wrong: str, *words: str) -> None:
        with pytest.raises((CatalogUnavailable, CannotOpen)) as error:
            Catalog.open(wrong)
        assert all(word in str(error.value) for word in words), error.value
        messages.append(f"{error.value} {error.value.__cause__} {error.value.__context__}")

    _, _, database_ = address.rpartition("/")
    refused(postgres.address("nowhere"), "nowhere", "does not exist")
    refused(postgres.address(database_, port=1), "127.0.0.1", "refused")
    refused(address.replace("holdfast:", "stranger:"), "password authentication failed")
    refused(f"{address}?sslmode=require", "SSL")
    refused(f"{address}?password={SECRET}&nonsense=1", "nonsense")
    catalog = Catalog.open(address)
    messages += [catalog.address, repr(catalog._engine), repr(catalog._engine.url)]
    catalog.close()
    for message in messages:
        assert SECRET not in message


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(CannotOpen, match=r"pip install 'holdfast\[postgres\]'"):
        Catalog.open("postgresql://holdfast@127.0.0.1/holdfast")


def test_a_database_is_made_a_catalog_only_by_who_writes(postgres: Postgres) -> None:
    address = postgres.database()
    with pytest.raises(CannotOpen, match="there is no catalog in postgresql://"):
        Catalog.open(address, create=False)
    Catalog.open(address).close()
    Catalog.open(address, create=False).close()


def test_an_older_version_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "OLDEST", (99,))
    with pytest.raises(CannotOpen, match="99 or newer is needed"):
        Catalog.open(address)


def test_several_make_the_tables_at_once(postgres: Postgres) -> None:
    address = postgres.database()
    code = f"from holdfast.catalog import Catalog; Catalog.open({address!r}).close()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("version", ["0006", "0009"])
def test_what_is_in_older_tables_is_kept(postgres: Postgres, version: str) -> None:
    """And numbers above 32 bits fit then."""
    address = postgres.database()
    backend = postgresql.PostgreSQL.at(address)
    make_tables(backend.engine, version)
    with backend.engine.begin() as connection:
        for table, row in OLDER_ROWS.items():
            texts = sa.text(f"INSERT INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)})")
            connection.execute(texts, row)
    backend.engine.dispose()
    catalog = Catalog.open(address)
    for table, row in OLDER_ROWS.items():
        columns = tables.metadata.tables[table].c
        wanted = sa.select(*(columns[name] for name in row))
        ((*found,),) = catalog.read_now(partial(rows_of, wanted))
        assert dict(zip(row, found, strict=True)) == row
    for new in (tables.checkpoints.c.seq, tables.samplers.c.released):
        assert catalog.read_now(partial(rows_of, sa.select(new))) == [(None,)]
    large = tables.operations.update().values(seq=1 << 40)
    asyncio.run(catalog.write(lambda c: c.execute(large)))
    catalog.close()


def rows_of(wanted: sa.Select[Any], connection: sa.Connection) -> Sequence[sa.Row[Any]]:
    return connection.execute(wanted).all()


OLDER_ROWS: dict[str, dict[str, object]] = {
    "runs": {
        "id": "R",
        "generation": 0,
        "session_id": "S",
        "owner": "o",
        "created": 1.0,
        "last_request": 2.0,
        "state": "live",
        "body_hash": "h",
        "corrupted": False,
    },
    "operations": {
        "run_id": "R",
        "generation": 0,
        "seq": 1,
        "kind": "forward",
        "state": "accepted",
        "body_hash": "b",
        "attempts": 1,
        "accepted": 1.5,
    },
    "contents": {
        "run_id": "R",
        "generation": 0,
        "seq": 1,
        "part": "body",
        "size": 3,
        "data": b"\0\1\2",
    },
    "samplers": {"id": "P", "session_id": "S", "owner": "o", "base_model": "m", "created": 1.0},
    "checkpoints": {
        "run_id": "R",
        "kind": "weights",
        "name": "n",
        "manifest": "M",
        "owner": "o",
        "created": 1.0,
        "public": False,
        "size": 7,
        "step": 2,
    },
}
"""A row of each of these tables, in columns that every version has."""


@pytest.mark.anyio
async def test_the_tables_of_a_running_server_are_not_changed(
    address: str, opened: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.claim("a server of another version")
    with opened._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0006'")
    monkeypatch.setattr(postgresql, "_SCHEMA_WAITS", 0.1)
    with pytest.raises(CatalogInUse, match="another version of Holdfast"):
        await asyncio.to_thread(Catalog.open, address)


# --- What is kept ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_commit_waits_for_the_disk_whatever_the_server_does_by_default(
    postgres: Postgres, address: str
) -> None:
    name = address.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    catalog = Catalog.open(address)
    show = sa.text("SHOW synchronous_commit")
    assert await catalog.write(lambda c: c.scalar(show)) == "on"
    catalog.close()


@pytest.mark.anyio
async def test_texts_with_a_nul_are_kept(opened: Catalog) -> None:
    row = {"hash": "h", "owner": "a\0b", "created": 1.0}
    await opened.write(lambda c: c.execute(tables.api_keys.insert().values(id="k", **row)))
    owner = tables.api_keys.c.owner
    found = await opened.read(lambda c: c.scalar(sa.select(owner).where(owner == "a\0b")))
    assert found == "a\ufffdb"


@pytest.mark.anyio
async def test_a_sum_of_sizes_is_an_integer(opened: Catalog) -> None:
    """PostgreSQL's is a NUMERIC, since it may be larger than each of them."""
    sizes = sa.values(sa.column("size", sa.BigInteger), name="sizes").data([(1 << 62,)] * 3)
    found = await opened.read(lambda c: c.scalar(sa.select(sa.func.sum(sizes.c.size))))
    assert (type(found), found) == (int, 3 << 62)


@pytest.mark.anyio
async def test_a_database_that_takes_no_writes_is_unavailable(
    postgres: Postgres, address: str
) -> None:
    """Such as a standby that has not become the primary yet."""
    name = address.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    catalog = Catalog.open(address)
    with pytest.raises(CatalogUnavailable, match="read-only"):
        await catalog.write(partial(add_key, key="a"))
    catalog.close()


# --- Whose fault it is ------------------------------------------------------------------------


async def beside_others(catalog: Catalog, work: Callable[[sa.Connection], object]) -> object:
    """What a write comes to that shares its commit with two more."""
    writes: list[Callable[[sa.Connection], object]] = [
        partial(add_key, key="a"),
        work,
        partial(add_key, key="b"),
    ]
    found = await asyncio.gather(*(catalog.write(w) for w in writes), return_exceptions=True)
    assert type(found[0]) is type(found[2])
    if found[0] is not None:
        assert isinstance(found[0], CatalogUnavailable)
    assert await catalog.read(keys) == (["a", "b"] if found[0] is None else [])
    return found[1]


def fail(connection: sa.Connection, *, state: str) -> None:
    connection.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$")


@pytest.mark.anyio
async def test_what_no_index_takes_fails_alone_and_for_good(opened: Catalog) -> None:
    key = os.urandom(4000).hex()
    error = await beside_others(opened, partial(add_key, key=key))
    assert isinstance(error, sa.exc.OperationalError), error
    assert "index row size" in str(error)


@pytest.mark.anyio
@pytest.mark.parametrize("state", ["22003", "23514", "54000"])
async def test_a_fault_of_a_write_is_its_own(opened: Catalog, state: str) -> None:
    error = await beside_others(opened, partial(fail, state=state))
    assert isinstance(error, sa.exc.DBAPIError), error
    assert opened.read_now(keys) == ["a", "b"]
    with pytest.raises(sa.exc.DBAPIError):
        await opened.read(partial(fail, state=state))


@pytest.mark.anyio
@pytest.mark.parametrize("state", ["53200", "XX000"])
async def test_a_shortage_may_be_of_one_write_alone(opened: Catalog, state: str) -> None:
    error = await beside_others(opened, partial(fail, state=state))
    assert isinstance(error, CatalogUnavailable), error
    assert opened.read_now(keys) == ["a", "b"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "state",
    ["08006", "25006", "40001", "40P01", "42501", "53100", "55P03", "57014", "57P05", "58030"],
)
async def test_a_fault_of_the_database_is_nobodys(opened: Catalog, state: str) -> None:
    """The same may work later: nothing was stored of any of them."""
    error = await beside_others(opened, partial(fail, state=state))
    assert isinstance(error, CatalogUnavailable), error
    assert opened.read_now(keys) == []
    with pytest.raises(CatalogUnavailable):
        await opened.read(partial(fail, state=state))
    await opened.write(partial(add_key, key="c"))
    assert opened.read_now(keys) == ["c"]


def no_sessions(postgres: Postgres, address: str) -> None:
    """Wait until there is none."""
    wait_until(lambda: postgres.sessions(address) == 0, within=30)


@pytest.mark.anyio
async def test_sessions_that_end_because_they_were_idle_are_made_anew(
    postgres: Postgres, address: str
) -> None:
    name = address.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET idle_session_timeout = '100ms'")
    catalog = Catalog.open(address)
    await catalog.claim("the server")
    for key in "ab":
        await asyncio.to_thread(no_sessions, postgres, address)
        await catalog.write(partial(add_key, key=key))
    assert await catalog.read(keys) == ["a", "b"]
    catalog.close()


# --- The lease -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_second_server_is_refused_and_told_who_has_the_catalog(
    address: str, opened: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LEASE_WAITS", 0.1)
    await opened.claim("process 12 on here")
    second = Catalog.open(address)
    with pytest.raises(CatalogInUse, match="process 12 on here, since 2") as refused:
        await second.claim("process 34 on there")
    assert second.address in str(refused.value)
    await second.write(partial(add_key, key="beside"))  # which needs no lease
    opened.close()
    assert await second.claim("process 34 on there") == 2
    second.close()


@pytest.mark.anyio
async def test_two_schemas_of_a_database_are_two_catalogs(
    postgres: Postgres, address: str, opened: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LEASE_WAITS", 0.1)
    await opened.claim("one")
    postgres.execute("CREATE SCHEMA other", address.rpartition("/")[2])
    other = await asyncio.to_thread(Catalog.open, f"{address}?options=-csearch_path%3Dother")
    assert await other.claim("other") == 1
    other.close()


HOLDER = """
import asyncio, sys, time
from holdfast.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
asyncio.run(catalog.claim("the holder"))
print("claimed", flush=True)
if sys.argv[2] == "busy":
    asyncio.run(catalog.write(lambda c: time.sleep(60)))
time.sleep(60)
"""


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["idle", "busy"])
async def test_the_lease_of_a_server_that_was_killed_is_free_at_once(
    address: str, opened: Catalog, what: str
) -> None:
    holder = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", HOLDER, address, what], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert await opened.claim("the next one") == 2


# --- Lost connections ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_server_goes_on_when_its_connections_were_ended(
    postgres: Postgres, address: str, opened: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of it, nothing is stored twice, and the lease is taken again."""
    await opened.claim("the server")
    await opened.write(partial(add_key, key="a"))
    assert await opened.read(keys) == ["a"]
    assert postgres.cut_off(address) == 2
    await asyncio.gather(*(opened.write(partial(add_key, key=key)) for key in "bcd"))
    assert await opened.read(keys) == list("abcd")
    opened.verify_epoch()
    monkeypatch.setattr(database, "LEASE_WAITS", 0.1)
    second = Catalog.open(address)
    with pytest.raises(CatalogInUse):
        await second.claim("another one")
    second.close()


@pytest.mark.anyio
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_a_database_that_is_restarted_is_unavailable_meanwhile(
    postgres: Postgres, address: str, opened: Catalog, how: signal.Signals
) -> None:
    await opened.claim("the server")
    await opened.write(partial(add_key, key="a"))
    with postgres.stopped(how):
        with pytest.raises(CatalogUnavailable, match="refused"):
            await opened.write(partial(add_key, key="b"))
        with pytest.raises(CatalogUnavailable, match="refused"):
            await opened.read(keys)
        with pytest.raises(CatalogUnavailable, match="refused"):
            opened.verify_epoch()
    await opened.write(partial(add_key, key="c"))
    assert await opened.read(keys) == ["a", "c"]


@pytest.mark.anyio
async def test_a_lease_that_somebody_else_has_for_a_while_is_waited_for(
    postgres: Postgres, address: str, opened: Catalog
) -> None:
    """Somebody who raised no epoch: what was asked for can be asked for again."""
    await opened.claim("the server")
    postgres.cut_off(address)
    with sa.create_engine(opened._engine.url).connect() as other:
        assert other.scalar(postgresql._TAKE)
        with pytest.raises(CatalogUnavailable, match="lease"):
            await opened.write(partial(add_key, key="a"))
        other.invalidate()
    await opened.write(partial(add_key, key="b"))
    assert await opened.read(keys) == ["b"]


_FIRST = Statement(sa.select(tables.api_keys.c.id))


@pytest.mark.anyio
async def test_all_connections_that_wait_to_read_may_be_lost_together(
    postgres: Postgres, address: str, opened: Catalog
) -> None:
    together = threading.Barrier(3)

    def read(connection: sa.Connection) -> None:
        together.wait(30)
        _FIRST.scalar(connection)

    await asyncio.gather(*(opened.read(read) for _ in range(3)))
    assert postgres.cut_off(address) == 3
    await opened.read(_FIRST.scalar)


@pytest.mark.anyio
async def test_a_lock_of_somebody_else_is_waited_for_and_then_told(
    postgres: Postgres, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "_LOCK_WAITS", 0.2)
    catalog = Catalog.open(address)
    beside = sa.create_engine(address.replace("postgresql", "postgresql+psycopg", 1))
    with beside.connect() as other:
        with other.begin():
            other.exec_driver_sql("LOCK TABLE api_keys")
            with pytest.raises(CatalogUnavailable, match="lock timeout"):
                await catalog.write(partial(add_key, key="a"))
            with pytest.raises(CatalogUnavailable, match="lock timeout"):
                await catalog.read(keys)
        await catalog.write(partial(add_key, key="b"))
    assert await catalog.read(keys) == ["b"]
    beside.dispose()
    catalog.close()


# --- Commits without an answer ---------------------------------------------------------------


@pytest.fixture
def line(postgres: Postgres) -> Iterator[Line]:
    with line_to(postgres) as line:
        yield line


def through(line: Line, postgres: Postgres, address: str) -> str:
    return postgres.address(address.rpartition("/")[2], port=line.port)


@pytest.mark.anyio
@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("cut", ["before", "after"])
async def test_what_a_commit_without_an_answer_has_done_is_found_out(
    postgres: Postgres, address: str, line: Line, cut: str, claimed: bool
) -> None:
    catalog = Catalog.open(through(line, postgres, address))
    if claimed:
        await catalog.claim("the server")
    await add_one_over(catalog)
    for number in range(3):
        line.cut = "before" if cut == "before" else "after"
        await add_one_over(catalog)
        assert line.cuts == number + 1
    assert await catalog.read(keys) == ["0", "1", "2", "3"]
    catalog.close()


@pytest.mark.anyio
async def test_not_asking_would_do_it_twice(
    postgres: Postgres, address: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: Callable[..., bool] = lambda *_: False  # noqa: E731
    monkeypatch.setattr(Catalog, "_was_committed", never)
    catalog = Catalog.open(through(line, postgres, address))
    line.cut = "after"
    await add_one_over(catalog)
    assert await catalog.read(keys) == ["0", "1"]
    catalog.close()


@pytest.mark.anyio
async def test_a_lease_is_not_lost_with_the_answer_to_taking_it(
    postgres: Postgres, address: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LEASE_WAITS", 0.1)
    server = Catalog.open(through(line, postgres, address))
    await server.read(keys)
    line.cut = "after"
    assert await server.claim("the server") == 1
    assert line.cuts == 1
    second = Catalog.open(address)
    with pytest.raises(CatalogInUse, match="the server"):
        await second.claim("another one")
    second.close()
    server.close()


@pytest.mark.anyio
async def test_what_failed_at_first_and_then_did_not_is_told_as_it_ended(
    postgres: Postgres, address: str, line: Line
) -> None:
    catalog = Catalog.open(through(line, postgres, address))
    attempts = 0

    def work(connection: sa.Connection) -> None:
        nonlocal attempts
        attempts += 1
        if line.cuts == 0:
            raise ValueError("at first")
        add_key(connection, "a")

    line.cut = "before"
    await catalog.write(work)
    assert (attempts, line.cuts) == (3, 1)
    assert await catalog.read(keys) == ["a"]
    catalog.close()


IN_DOUBT = """
import asyncio, sys
from functools import partial
from pathlib import Path
from holdfast.catalog import Catalog, database
from tests.catalog.replaced import add_key, keys
from tests.support.postgres import Line

database.IN_DOUBT = 0.5

async def main():
    line = Line(int(sys.argv[1]))
    catalog = Catalog.open(sys.argv[2].replace(sys.argv[1], str(line.port)))
    await catalog.claim("the server")
    line.cut, line.stays_down = "after", True
    try:
        await catalog.write(partial(add_key, key="a"))
    except BaseException as error:
        print("told", type(error).__name__)
    print("lived on")

asyncio.run(main())
"""


def test_a_process_ends_that_cannot_find_out(postgres: Postgres, address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_DOUBT, str(postgres.port), address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (SYNC_FAILED, ""), done.stderr
    assert "lost during a commit" in done.stderr and "the next one recovers" in done.stderr
    assert SECRET not in done.stderr
    deadline = time.monotonic() + 10
    catalog = Catalog.open(address)
    while catalog.read_now(keys) != ["a"]:  # it was stored, as it happens
        assert time.monotonic() < deadline
        time.sleep(0.05)
    catalog.close()
