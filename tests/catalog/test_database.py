"""The catalog's schema and its writer."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from holdfast.catalog import Catalog, CatalogUnavailable, NewerCatalog, migrations, tables


def add_key(key: str) -> sa.Insert:
    return tables.api_keys.insert().values(id=key, hash=f"hash-{key}", owner="o", created=1.0)


def execute(statement: sa.Insert, connection: sa.Connection) -> None:
    connection.execute(statement)


def count(connection: sa.Connection) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(tables.api_keys)) or 0


def test_migrations_give_the_tables_of_the_code(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")

    def difference(connection: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), tables.metadata)

    assert catalog.read_now(difference) == []
    catalog.close()


def test_head_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_current_head() == migrations.HEAD


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    Catalog.open_file(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(NewerCatalog, match="9999"):
        Catalog.open_file(path)


def test_something_else_than_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(CatalogUnavailable, match="not a database"):
        Catalog.open_file(path)


@pytest.mark.anyio
async def test_writes_that_wait_together_share_a_commit_and_fail_alone(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    statements = [add_key(str(i % 40)) for i in range(50)]
    results = await asyncio.gather(
        *(catalog.write(partial(execute, s)) for s in statements), return_exceptions=True
    )
    assert sum(isinstance(r, sa.exc.IntegrityError) for r in results) == 10
    assert await catalog.read(count) == 40
    catalog.close()


@pytest.mark.anyio
async def test_a_returned_write_is_seen_by_another_process(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    await catalog.write(lambda c: c.execute(add_key("a")))
    with sqlite3.connect(tmp_path / "catalog.db") as other:
        assert other.execute("SELECT id FROM api_keys").fetchall() == [("a",)]
    other.close()
    catalog.close()


@pytest.mark.anyio
async def test_a_locked_database_is_told_and_nothing_is_stored(tmp_path: Path) -> None:
    catalog = Catalog.open(f"sqlite+pysqlite:///{tmp_path / 'catalog.db'}?timeout=0.05")
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


def test_durability_settings(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")

    def pragmas(connection: sa.Connection) -> tuple[object, object]:
        return (
            connection.exec_driver_sql("PRAGMA journal_mode").scalar(),
            connection.exec_driver_sql("PRAGMA synchronous").scalar(),
        )

    assert catalog.read_now(pragmas) == ("wal", 2)
    catalog.close()


def test_an_index_of_the_first_schema_is_made_anew(tmp_path: Path) -> None:
    """Its rows say nothing of files; the server fills it from the store when it starts."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'catalog.db'}")
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO api_keys VALUES ('k', 'h', 'o', 1.0, NULL)"))
        connection.execute(
            sa.text(
                "INSERT INTO checkpoints VALUES"
                " ('R', 'weights', 'x', 'id', 'o', 1.0, NULL, 0, 7, 1, NULL)"
            )
        )
    engine.dispose()
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    assert catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoints)).all()) == []
    assert catalog.read_now(lambda c: c.execute(sa.select(tables.checkpoint_files)).all()) == []
    assert catalog.read_now(count) == 1
    catalog.close()
