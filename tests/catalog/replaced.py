"""A server that another one replaces: `python -m tests.catalog.replaced DIRECTORY`.

Does each of STEPS in a process of its own, forked so that all of them load the code once, and once
more in one that was not replaced. What became of STEP is in DIRECTORY/WHETHER_REPLACED/STEP: the
data, the file `output` (a line for each answer that somebody got) and the file `log`; its exit
status is printed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from holdfast.catalog import Catalog, tables
from holdfast.runs.checkpoints import Checkpoints
from holdfast.store import LocalStore, Manifest, NameKey
from tests.store.samples import WEIGHTS, key_of, manifest_of


@dataclass(frozen=True)
class Server:
    """What a step works with."""

    catalog: Catalog
    checkpoints: Checkpoints
    key: NameKey
    unnamed: str


def sample(store: LocalStore, **changes: object) -> Manifest:
    return manifest_of({WEIGHTS: store.put_blob([b"weights"])}, **changes)


def add_key(connection: sa.Connection, key: str) -> None:
    connection.execute(
        tables.api_keys.insert().values(id=key, hash=f"hash-{key}", owner="o", created=1.0)
    )


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


async def run(step: str, data: Path, *, replaced: bool) -> None:
    old = Catalog.open_file(data / "catalog.db")
    store = LocalStore(data / "store")
    store.before_change(old.verify_epoch)
    await old.claim("the old server")
    await old.write(partial(add_key, key="before"))
    checkpoints = Checkpoints(store, old)
    await checkpoints.publish(sample(store))
    unnamed = await checkpoints.publish(sample(store, name=None))
    print("begun", flush=True)
    if replaced:
        new = Catalog.open_file(data / "catalog.db")
        await new.claim("the new server")
        await new.write(partial(add_key, key="new"))
        new.close()
    await STEPS[step](Server(old, checkpoints, key_of(sample(store)), unnamed))
    print("done", flush=True)


def main(directory: Path) -> None:
    Catalog.open_file(directory / "catalog.db").close()
    for replaced in (True, False):
        for step in STEPS:
            data = directory / str(replaced) / step
            data.mkdir(parents=True)
            shutil.copy(directory / "catalog.db", data)
            child = os.fork()
            if child == 0:
                for number, name in ((1, "output"), (2, "log")):
                    os.dup2(os.open(data / name, os.O_WRONLY | os.O_CREAT), number)
                asyncio.run(run(step, data, replaced=replaced))
                os._exit(0)
            print(replaced, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), step, sep="\t")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
