"""Catalogs as earlier versions made them."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from holdfast.catalog import migrations


def make_tables(engine: sa.Engine, version: str) -> None:
    """The tables of a schema version, in an empty database."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
