"""Statements that every request or commit executes: compiled once, executed by the driver itself.

SQLAlchemy looks a statement up in its cache, works out its parameters and prepares for its result
each time that it executes it, which takes several times as long as SQLite then does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa


class Statement:
    """A statement with these parameters, none left out, compiled once for each dialect.

    To be executed in a transaction under way. Errors are SQLAlchemy's; values of a result are as
    the driver gives them.
    """

    def __init__(self, statement: sa.Insert | sa.Update | sa.Select[Any], *parameters: str) -> None:
        self._statement = statement
        self._parameters = parameters
        self._compiled: dict[str, _Compiled] = {}

    def execute(self, connection: sa.Connection, values: Mapping[str, Any]) -> None:
        """Execute it with the values of its parameters, by name."""
        compiled = self._for(connection.dialect)
        cursor = execute_text(connection, compiled.text, compiled.arguments(values))
        cursor.close()

    def scalar(self, connection: sa.Connection, values: Mapping[str, Any] | None = None) -> Any:
        """The first column of the first row; None when there is no row."""
        compiled = self._for(connection.dialect)
        cursor = execute_text(connection, compiled.text, compiled.arguments(values or {}))
        row = cursor.fetchone()
        cursor.close()
        return None if row is None else row[0]

    def _for(self, dialect: sa.Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = self._compile(dialect)
        return compiled

    def _compile(self, dialect: sa.Dialect) -> _Compiled:
        compiled = self._statement.compile(dialect=dialect, column_keys=list(self._parameters))
        assert isinstance(compiled, sa.sql.compiler.SQLCompiler)
        assert set(compiled.binds) == set(self._parameters), "columns with a default are given too"
        processors = {
            name: bind.type.dialect_impl(dialect).bind_processor(dialect)
            for name, bind in compiled.binds.items()
        }
        names = compiled.positiontup if compiled.positional else list(compiled.binds)
        assert names is not None
        return _Compiled(
            compiled.string, compiled.positional, [(name, processors[name]) for name in names]
        )


class _Compiled:
    """The text for one dialect, and how its driver takes the parameters."""

    def __init__(
        self,
        text: str,
        positional: bool,
        parameters: list[tuple[str, Callable[[Any], Any] | None]],
    ) -> None:
        self.text = text
        self._positional = positional
        self._parameters = parameters

    def arguments(self, values: Mapping[str, Any]) -> Any:
        given = [
            values[name] if process is None else process(values[name])
            for name, process in self._parameters
        ]
        if self._positional:
            return given
        return {name: value for (name, _), value in zip(self._parameters, given, strict=True)}


def execute_text(connection: sa.Connection, text: str, arguments: Any = ()) -> Any:
    """Have the driver execute a text; its cursor, to be closed. Errors are SQLAlchemy's."""
    raw = connection.connection
    cursor = raw.cursor()
    driver = connection.dialect.loaded_dbapi
    try:
        cursor.execute(text, arguments)
    except driver.Error as error:
        is_lost = connection.dialect.is_disconnect(error, raw.dbapi_connection, cursor)
        cursor.close()
        failed = sa.exc.DBAPIError.instance(
            text,
            arguments,
            error,
            driver.Error,
            hide_parameters=connection.engine.hide_parameters,
            connection_invalidated=is_lost,
            dialect=connection.dialect,
        )
        if is_lost:
            connection.invalidate(failed)
        raise failed from error
    return cursor
