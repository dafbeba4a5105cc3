"""Schema versions, by alembic. `HEAD` lets an up-to-date database open without loading alembic."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "0008"


class NewerCatalog(Exception):
    """The database was written by a newer Holdfast."""


def upgrade(engine: sa.Engine) -> None:
    """Bring the schema to HEAD. Raises NewerCatalog for a version this code does not know."""
    current = _current(engine)
    if current == HEAD:
        return
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
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _current(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return version
