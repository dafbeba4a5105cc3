"""Whose catalog it is: a server that another one has replaced changes nothing more, and ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, epoch, tables
from holdfast.catalog.database import TAKEN_OVER
from tests.catalog.replaced import STEPS, add_key


def keys(connection: sa.Connection) -> list[str]:
    return sorted(connection.scalars(sa.select(tables.api_keys.c.id)))


@dataclass(frozen=True)
class Ended:
    """A server that did one step."""

    status: int
    output: list[str]
    log: str
    data: Path

    def in_store(self) -> dict[str, bytes]:
        """All that others see of its store."""
        parts = [self.data / "store" / part for part in ("names", "manifests", "unnamed")]
        files = [file for part in parts for file in part.iterdir()]
        return {str(file.relative_to(self.data)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Ended]:
    """By whether the server was replaced before the step, and the step."""
    directory = tmp_path_factory.mktemp("replaced")
    done = subprocess.run(
        [sys.executable, "-m", "tests.catalog.replaced", str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = {}
    for line in done.stdout.splitlines():
        replaced, status, step = line.split("\t")
        data = directory / replaced / step
        output = (data / "output").read_text().splitlines()
        log = (data / "log").read_text()
        found[replaced == "True", step] = Ended(int(status), output, log, data)
    return found


@pytest.mark.parametrize("step", [step for step in STEPS if step != "nothing"])
def test_a_server_that_was_replaced_ends_and_changes_nothing(
    ended: dict[tuple[bool, str], Ended], step: str
) -> None:
    found = ended[True, step]
    assert (found.status, found.output) == (TAKEN_OVER, ["begun"]), found.log
    assert "the new server has taken this catalog over" in found.log
    assert "the epoch is 2, and 1 was this server's" in found.log
    assert "Traceback" not in found.log
    assert found.in_store() == ended[True, "nothing"].in_store()
    catalog = Catalog.open_file(found.data / "catalog.db")
    assert catalog.read_now(keys) == ["before", "new"]
    assert catalog.read_now(epoch.current).number == 2
    rows = catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoints.c.expires)).all())
    assert [row.expires for row in rows] == [None]
    catalog.close()


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_was_not_does_all_of_it(
    ended: dict[tuple[bool, str], Ended], step: str
) -> None:
    found = ended[False, step]
    assert (found.status, found.output) == (0, ["begun", "done"]), found.log
    changed = found.in_store() != ended[True, "nothing"].in_store()
    assert changed == (step not in ("write", "many writes", "sweep", "nothing"))


@pytest.mark.anyio
async def test_each_claim_raises_the_epoch_and_says_whose_it_is(tmp_path: Path) -> None:
    numbers = []
    for start in range(3):
        catalog = Catalog.open_file(tmp_path / "catalog.db")
        numbers.append(await catalog.claim(f"server {start}"))
        found = await catalog.read(epoch.current)
        assert (found.number, found.holder) == (numbers[-1], f"server {start}")
        catalog.close()
    assert numbers == [1, 2, 3]


@pytest.mark.anyio
async def test_who_writes_beside_a_server_neither_raises_the_epoch_nor_is_refused(
    tmp_path: Path,
) -> None:
    server = Catalog.open_file(tmp_path / "catalog.db")
    beside = Catalog.open_file(tmp_path / "catalog.db")
    await server.claim("the server")
    for number in range(3):
        await beside.write(partial(add_key, key=f"beside-{number}"))
        await server.write(partial(add_key, key=f"server-{number}"))
    beside.verify_epoch()
    server.verify_epoch()
    assert (await server.read(epoch.current)).number == 1
    assert len(await server.read(keys)) == 6
    server.close()
    beside.close()


@pytest.mark.anyio
async def test_nobody_takes_over_in_the_middle_of_a_transaction(tmp_path: Path) -> None:
    """Between a transaction's look at the epoch and its commit, the epoch stays."""
    old = Catalog.open_file(tmp_path / "catalog.db")
    new = Catalog.open_file(tmp_path / "catalog.db")
    await old.claim("the old server")
    inside, go_on = Event(), Event()

    def slowly(connection: sa.Connection) -> None:
        inside.set()
        go_on.wait(30)
        add_key(connection, "in time")

    writing = asyncio.create_task(old.write(slowly))
    await asyncio.to_thread(inside.wait, 30)
    claiming = asyncio.create_task(new.claim("the new server"))
    done, _ = await asyncio.wait([claiming], timeout=0.3)
    assert not done, "the epoch was raised under a transaction that had seen the one before"
    go_on.set()
    await writing
    assert await claiming == 2
    assert await new.read(keys) == ["in time"]
    new.close()
    old.close()
