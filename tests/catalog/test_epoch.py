"""Whose catalog it is: a server that another one has replaced changes nothing more, and ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, epoch, tables
from holdfast.catalog.database import TAKEN_OVER
from tests.catalog.replaced import CATALOG, STEPS, Case, add_key, keys
from tests.support.postgres import BINARIES, Postgres


@dataclass(frozen=True)
class Ended:
    """A server that did one step."""

    status: int
    output: list[str]
    log: str
    data: Path
    address: str

    def catalog(self) -> Catalog:
        if self.address:
            return Catalog.open(self.address)
        return Catalog.open_file(self.data / CATALOG)

    def in_store(self) -> dict[str, bytes]:
        """All that others see of its store."""
        parts = [self.data / "store" / part for part in ("names", "manifests", "unnamed")]
        files = [file for part in parts for file in part.iterdir()]
        return {str(file.relative_to(self.data)): file.read_bytes() for file in files}


IN_DATABASE = ("write", "many writes", "name", "nothing")
"""Steps that are done on PostgreSQL as well: the store is the same."""
CASES = [Case(step, replaced) for step in STEPS for replaced in (True, False)]
if BINARIES is not None:
    CASES += [
        Case(step, replaced, "PostgreSQL") for step in IN_DATABASE for replaced in (True, False)
    ]


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Case, Ended]:
    """By the case."""
    directory = tmp_path_factory.mktemp("replaced")

    def new_catalog() -> str:
        server = request.getfixturevalue("postgres")
        assert isinstance(server, Postgres)
        return server.catalog()

    addresses = [new_catalog() if case.catalog else "" for case in CASES]
    given = [
        json.dumps([case.step, case.replaced, address])
        for case, address in zip(CASES, addresses, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.catalog.replaced", str(directory), *given],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = {}
    for number, status in enumerate(done.stdout.split()):
        data = directory / str(number)
        output = (data / "output").read_text().splitlines()
        log = (data / "log").read_text()
        found[CASES[number]] = Ended(int(status), output, log, data, addresses[number])
    return found


@pytest.mark.parametrize("case", [c for c in CASES if c.replaced and c.step != "nothing"])
def test_a_server_that_was_replaced_ends_and_changes_nothing(
    ended: dict[Case, Ended], case: Case
) -> None:
    found = ended[case]
    assert (found.status, found.output) == (TAKEN_OVER, ["begun"]), found.log
    assert "this catalog has been taken over by the new server, since" in found.log
    assert "the epoch is 2, and 1 was this server's" in found.log
    assert "Traceback" not in found.log
    assert found.in_store() == ended[Case("nothing", True)].in_store()
    catalog = found.catalog()
    assert catalog.read_now(keys) == ["before", "new"]
    assert catalog.read_now(epoch.current).number == 2
    rows = catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoints.c.expires)).all())
    assert [row.expires for row in rows] == [None]
    catalog.close()


@pytest.mark.parametrize("case", [c for c in CASES if not c.replaced])
def test_a_server_that_was_not_does_all_of_it(ended: dict[Case, Ended], case: Case) -> None:
    found = ended[case]
    assert (found.status, found.output) == (0, ["begun", "done"]), found.log
    changed = found.in_store() != ended[Case("nothing", True)].in_store()
    assert changed == (case.step not in ("write", "many writes", "sweep", "nothing"))


@pytest.mark.anyio
async def test_each_claim_raises_the_epoch_and_says_whose_it_is(
    open_catalog: Callable[[], Catalog],
) -> None:
    numbers = []
    for start in range(3):
        catalog = open_catalog()
        numbers.append(await catalog.claim(f"server {start}"))
        found = await catalog.read(epoch.current)
        assert (found.number, found.holder) == (numbers[-1], f"server {start}")
        catalog.close()
    assert numbers == [1, 2, 3]


@pytest.mark.anyio
async def test_who_writes_beside_a_server_neither_raises_the_epoch_nor_is_refused(
    open_catalog: Callable[[], Catalog],
) -> None:
    server, beside = open_catalog(), open_catalog()
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
async def test_nobody_takes_over_in_the_middle_of_a_transaction(
    open_catalog: Callable[[], Catalog],
) -> None:
    """Between a transaction's look at the epoch and its commit, the epoch stays.

    Also where a lease did not keep others away.
    """
    old, new = open_catalog(), open_catalog()
    await old.claim("the old server")
    inside, go_on = Event(), Event()

    def slowly(connection: sa.Connection) -> None:
        inside.set()
        go_on.wait(30)
        add_key(connection, "in time")

    writing = asyncio.create_task(old.write(slowly))
    await asyncio.to_thread(inside.wait, 30)
    claiming = asyncio.create_task(new.write(partial(epoch.begin, holder="the new server")))
    done, _ = await asyncio.wait([claiming], timeout=0.3)
    assert not done, "the epoch was raised under a transaction that had seen the one before"
    go_on.set()
    await writing
    assert await claiming == 2
    assert await new.read(keys) == ["in time"]
    new.close()
    old.close()
