"""Statements that are compiled once do what SQLAlchemy would do with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.base import PGDialect

from holdfast.catalog.statements import Statement, execute_text

METADATA = sa.MetaData()
TABLE = sa.Table(
    "things",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("size", sa.Float),
    sa.Column("tags", sa.JSON),
    sa.Column("data", sa.LargeBinary),
    sa.Column("count", sa.Integer, nullable=False, default=7),
)
ROW = {"id": "a", "size": 1.5, "tags": {"x": [1]}, "data": b"\0\xff", "count": 1}


@pytest.fixture
def connection() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    METADATA.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def rows(connection: sa.Connection) -> list[dict[str, object]]:
    return [dict(row._mapping) for row in connection.execute(sa.select(TABLE))]


def test_values_are_kept_as_sqlalchemy_keeps_them(connection: sa.Connection) -> None:
    Statement(TABLE.insert(), *ROW).execute(connection, ROW)
    assert rows(connection) == [ROW]


def test_an_update_changes_the_row_that_it_names(connection: sa.Connection) -> None:
    add = Statement(TABLE.insert(), *ROW)
    for key in "ab":
        add.execute(connection, {**ROW, "id": key})
    change = Statement(
        TABLE.update().where(TABLE.c.id == sa.bindparam("which")), "which", "tags", "size"
    )
    change.execute(connection, {"which": "b", "tags": [], "size": 2})
    assert rows(connection) == [ROW, {**ROW, "id": "b", "tags": [], "size": 2.0}]


def test_a_scalar_is_the_first_value_or_none(connection: sa.Connection) -> None:
    find = Statement(sa.select(TABLE.c.size).where(TABLE.c.id == sa.bindparam("which")), "which")
    assert find.scalar(connection, {"which": "a"}) is None
    connection.execute(TABLE.insert().values(ROW))
    assert find.scalar(connection, {"which": "a"}) == 1.5


def test_errors_are_those_of_sqlalchemy(connection: sa.Connection) -> None:
    add = Statement(TABLE.insert(), *ROW)
    add.execute(connection, ROW)
    with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
        add.execute(connection, ROW)
    with pytest.raises(sa.exc.OperationalError, match="no such table"):
        execute_text(connection, "SELECT * FROM elsewhere")
    assert rows(connection) == [ROW], "and the transaction goes on"


def test_a_column_with_a_default_must_be_given(connection: sa.Connection) -> None:
    forgets = {name: value for name, value in ROW.items() if name != "count"}
    with pytest.raises(AssertionError, match="default"):
        Statement(TABLE.insert(), *forgets).execute(connection, forgets)


def test_other_dialects_get_their_own_text() -> None:
    insert = TABLE.insert()
    names = ["id", "size", "count"]
    compiled = Statement(insert, *names)._for(PGDialect())  # type: ignore[no-untyped-call]
    assert "%(id)s" in compiled.text
    assert compiled.arguments(ROW) == {name: ROW[name] for name in names}
