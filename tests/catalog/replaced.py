"""A server that another one replaces: `python -m tests.catalog.replaced DIRECTORY CASE...`.

A case is a step, whether the server was replaced before it, and the address of its catalog ("" for
a file of its own), as JSON. Each is done in a process of its own, forked so that all of them load
the code once. What became of case N is in DIRECTORY/N: the data, the file `output` (a line for each
answer that somebody got) and the file `log`; the exit statuses are printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg
import sqlalchemy as sa

from holdfast.catalog import Catalog, tables
from holdfast.runs.checkpoints import Checkpoints
from holdfast.store import LocalStore, Manifest, NameKey
from tests.store.samples import WEIGHTS, key_of, manifest_of

CATALOG = "catalog.db"


@dataclass(frozen=True)
class Case:
    """One server, and what it does at the end."""

    step: str
    replaced: bool
    catalog: str = ""


@dataclass(frozen=True)
class Server:
    """What a step works with."""

    catalog: Catalog
    checkpoints: Checkpoints
    key: NameKey
    unnamed: str


def sample(store: LocalStore, **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([b"weights"])}, **changes)


def keys(connection: sa.Connection) -> list[str]:
    """What `add_key` has added."""
    return sorted(connection.scalars(sa.select(tables.api_keys.c.id)))


def add_key(connection: sa.Connection, key: str) -> None:
    connection.execute(
        tables.api_keys.insert().values(id=key, hash=f"hash-{key}", owner="o", created=1.0)
    )


async def add_one_over(catalog: Catalog) -> None:
    """What is to be done once."""

    def work(connection: sa.Connection) -> None:
        number = connection.scalar(sa.select(sa.func.count()).select_from(tables.api_keys))
        add_key(connection, str(number))

    await catalog.write(work)


async def write(server: Server) -> None:
    await server.catalog.write(partial(add_key, key="late"))


async def many_writes(server: Server) -> None:
    """Some of which fail, so that the writer tries each alone."""
    writes = (server.catalog.write(partial(add_key, key=f"late-{i % 3}")) for i in range(9))
    assert not all(await asyncio.gather(*writes, return_exceptions=True))


def publish(replace: bool = False, **changes: object) -> Callable[[Server], Awaitable[object]]:
    async def step(server: Server) -> None:
        store = server.checkpoints.store
        assert isinstance(store, LocalStore)
        await server.checkpoints.publish(sample(store, **changes), replace=replace)

    return step


STEPS: dict[str, Callable[[Server], Awaitable[object]]] = {
    "write": write,
    "many writes": many_writes,
    "manifest": publish(name=None, seq=8),
    "name": publish(name="other"),
    "replaced name": publish(replace=True, seq=8),
    "expiry": lambda s: s.checkpoints.set_ttl(s.key, "local", 3600),
    "deletion": lambda s: s.checkpoints.delete(s.key, "local"),
    "discarding": lambda s: s.checkpoints.discard([s.unnamed]),
    "sweep": lambda s: s.checkpoints.sweep(),
    "nothing": lambda s: asyncio.sleep(0),
}


async def run(case: Case, data: Path) -> None:
    def opened() -> Catalog:
        return Catalog.open(case.catalog) if case.catalog else Catalog.open_file(data / CATALOG)

    old = opened()
    store = LocalStore(data / "store")
    store.before_change(old.verify_epoch)
    await old.claim("the old server")
    await old.write(partial(add_key, key="before"))
    checkpoints = Checkpoints(store, old)
    await checkpoints.publish(sample(store))
    unnamed = await checkpoints.publish(sample(store, name=None))
    print("begun", flush=True)
    if case.replaced:
        new = opened()
        if case.catalog:
            with psycopg.connect(case.catalog, autocommit=True) as administrator:
                administrator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        await new.claim("the new server")
        await new.write(partial(add_key, key="new"))
        new.close()
    await STEPS[case.step](Server(old, checkpoints, key_of(sample(store)), unnamed))
    print("done", flush=True)


def main(directory: Path, cases: Sequence[Case]) -> None:
    Catalog.open_file(directory / CATALOG).close()
    for number, case in enumerate(cases):
        data = directory / str(number)
        data.mkdir(parents=True)
        shutil.copy(directory / CATALOG, data)
        child = os.fork()
        if child == 0:
            for stream, name in ((1, "output"), (2, "log")):
                os.dup2(os.open(data / name, os.O_WRONLY | os.O_CREAT), stream)
            asyncio.run(run(case, data))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(*json.loads(text)) for text in sys.argv[2:]])
