"""Schema versions, by alembic. `HEAD` lets an up-to-date database open without loading alembic."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from holdfast.catalog import deadline, epoch
from holdfast.catalog.backend import Backend
from holdfast.catalog.errors import CannotOpen, NewerCatalog

HEAD = "0011"

_ANSWERS_WITHIN = 30.0
"""Seconds within which a database says of which version it is. Changing that may take longer."""


def upgrade(backend: Backend, *, create: bool = True) -> None:
    """Bring the schema to HEAD; where there is none, only if told to `create` it.

    Raises CannotOpen: NewerCatalog for a version this code does not know.
    """
    with deadline.within(_ANSWERS_WITHIN), backend.engine.connect() as connection:
        current = _current(connection)
    if current == HEAD:
        return
    if current is None and not create:
        raise CannotOpen(f"there is no catalog in {backend.address}")
    with backend.writer() as connection, connection.begin():
        backend.lock_schema(connection)
        current = _current(connection)  # somebody else may have done it by now
        if current != HEAD:
            _upgrade(connection, current)
            if current is not None:  # a server that does not know these tables changes nothing more
                epoch.begin(connection, "an upgrade of its tables")


def _upgrade(connection: sa.Connection, current: str | None) -> None:
    # Loading alembic takes a moment that only a first start or an upgrade has to spend.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.script.revision import ResolutionError
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    if current is not None:
        try:
            ScriptDirectory.from_config(config).get_revision(current)
        except (CommandError, ResolutionError) as error:
            raise NewerCatalog(
                f"the catalog has schema version {current}, this Holdfast knows versions up to "
                f"{HEAD}: start it with the Holdfast that last used it, or a newer one"
            ) from error
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _current(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version
