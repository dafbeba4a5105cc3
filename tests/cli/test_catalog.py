"""Commands whose catalog is on PostgreSQL: found, noted, refused, and used beside a server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, database, tables
from holdfast.catalog.database import TAKEN_OVER
from holdfast.server.data_dir import existing
from holdfast.store import Store, open_store
from tests.cli.samples import add_checkpoint, fails, holdfast
from tests.support.postgres import PASSWORD, SECRET, Postgres


@pytest.fixture
def address(postgres: Postgres, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a new, empty catalog, which commands are told."""
    found = postgres.catalog()
    monkeypatch.setenv("HOLDFAST_CATALOG", found)
    monkeypatch.setattr(database, "LEASE_WAITS", 0.1)
    yield found
    for file in data_dir.iterdir():
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


@pytest.fixture
def server(address: str) -> Iterator[Catalog]:
    """The catalog of a server that runs."""
    catalog = Catalog.open(address)
    asyncio.run(catalog.claim("process 12 on here"))
    yield catalog
    catalog.close()


def test_keys_are_made_beside_a_server(server: Catalog, data_dir: Path) -> None:
    made = holdfast("key", "create", "alice")
    assert made.stdout.startswith("tml-")
    assert "alice" in holdfast("key", "list").stdout
    assert not (data_dir / "catalog.db").exists()
    server.verify_epoch()


def test_a_checkpoint_is_imported_beside_a_server(
    server: Catalog, data_dir: Path, store: Store, tmp_path: Path
) -> None:
    manifest = add_checkpoint(store)
    holdfast("checkpoint", "export", f"tinker://{manifest.key}", tmp_path / "it.tar")
    answer = json.loads(
        holdfast("checkpoint", "import", tmp_path / "it.tar", "--name", "again", "--json").stdout
    )
    assert answer["path"].endswith("/weights/again")
    server.verify_epoch()


def test_doctor_looks_beside_a_server_and_repairs_without_one(
    server: Catalog, store: Store
) -> None:
    manifest = add_checkpoint(store)
    found = json.loads(holdfast("doctor", "--json").stdout)
    assert {problem["code"] for problem in found["problems"]} == {
        "not_in_catalog",
        "run_not_in_catalog",
    }
    message = fails("doctor", "--repair")
    assert "in use" in message and "process 12 on here" in message
    server.close()
    repaired = json.loads(holdfast("doctor", "--repair", "--json").stdout)
    assert repaired["ok"] and repaired["repaired"]["listed"] == 1, (repaired, manifest)


CUT_OFF = """
import asyncio, sys
from functools import partial
from holdfast.catalog import Catalog
from tests.catalog.replaced import add_key

catalog = Catalog.open(sys.argv[1])
asyncio.run(catalog.claim("the server"))
print("claimed", flush=True)
sys.stdin.readline()
asyncio.run(catalog.write(partial(add_key, key="late")))
print("stored", flush=True)
"""


@pytest.mark.parametrize(
    ("options", "status", "kept"), [(["--repair"], TAKEN_OVER, []), ([], 0, ["late"])]
)
def test_a_server_that_was_cut_off_does_not_go_on_after_a_repair(
    address: str,
    postgres: Postgres,
    store: Store,
    options: list[str],
    status: int,
    kept: list[str],
) -> None:
    """What it knows may not be so any more. It may after somebody has only looked."""
    with subprocess.Popen(
        [sys.executable, "-c", CUT_OFF, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == "claimed\n"
        assert postgres.cut_off(address) > 0
        assert holdfast("doctor", *options).exit_code == 0
        output, log = server.communicate("go on\n", timeout=60)
    assert server.returncode == status, log
    assert output == ("stored\n" if kept else "")
    assert ("taken over by holdfast doctor --repair, process" in log) == bool(options)
    catalog = Catalog.open(address)
    assert catalog.read_now(lambda c: list(c.scalars(sa.select(tables.api_keys.c.id)))) == kept
    catalog.close()


def test_where_the_catalog_is_need_not_be_said_again(
    address: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdfast("key", "create", "alice")
    monkeypatch.delenv("HOLDFAST_CATALOG")
    assert "without a password" in fails("key", "list")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert "alice" in holdfast("key", "list").stdout
    assert not (data_dir / "catalog.db").exists()


def test_a_data_directory_stays_with_its_catalog(
    address: str, postgres: Postgres, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdfast("key", "create", "alice")
    other = postgres.catalog()
    message = fails("key", "list", "--catalog", other)
    assert address.rpartition("/")[2] in message and other.rpartition("/")[2] in message
    assert "catalog-url" in message and SECRET not in message
    (data_dir / "catalog-url").unlink()
    assert "alice" not in holdfast("key", "list", "--catalog", other).stdout


def test_a_catalog_in_the_directory_is_not_left_for_another_one(
    address: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOLDFAST_CATALOG")
    holdfast("key", "create", "alice")
    assert "catalog.db" in fails("key", "list", "--catalog", address)
    assert "alice" in holdfast("key", "list").stdout


def test_looking_makes_no_tables(postgres: Postgres, store: Store) -> None:
    empty = postgres.database()
    assert "there is no catalog in postgresql://" in fails("doctor", "--catalog", empty)


def test_a_server_refuses_a_store_that_is_not_its_catalogs(
    address: str, data_dir: Path, tmp_path: Path
) -> None:
    """All runs would be lost in it."""
    with existing(data_dir, None, address) as opened:
        add_checkpoint(opened.store)
    holdfast("doctor", "--repair")
    other = tmp_path / "other"
    open_store(other / "store").close()
    message = fails("serve", "--data-dir", other, "--port", 0)
    assert str(other / "store") in message and "none of the checkpoints" in message
    # Nor is anything noted, so that the right store, or catalog, can be named next.
    new = tmp_path / "new"
    assert "none of the checkpoints" in fails("serve", "--data-dir", new, "--port", 0)
    assert {file.name for file in (*other.iterdir(), *new.iterdir())} <= {"lock", "store"}
    assert not (new / "store").exists()


@pytest.mark.parametrize(
    ("wrong", "right", "reason"),
    [
        (SECRET, "forgotten", "password authentication failed"),
        ("127.0.0.1", "nowhere.invalid", "nowhere.invalid"),
        ("/test", "/missing", "does not exist"),
        ("postgresql:", "mysql:", "postgresql://USER@HOST/DATABASE"),
    ],
)
def test_a_server_says_in_one_line_why_it_cannot_use_a_catalog(
    address: str, tmp_path: Path, wrong: str, right: str, reason: str
) -> None:
    assert wrong in address
    refused = holdfast(
        *("serve", "--data-dir", tmp_path / "new", "--port", 0),
        *("--catalog", address.replace(wrong, right)),
    )
    assert refused.exit_code == 1
    (message,) = refused.output.splitlines()
    assert message.startswith("Error: ") and reason in message
    assert SECRET not in message and "forgotten" not in message
