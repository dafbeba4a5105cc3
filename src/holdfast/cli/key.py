"""`holdfast key`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast.cli.options import data_dir
from holdfast.cli.output import print_table

if TYPE_CHECKING:
    from holdfast.server.auth import Keys


@click.group(name="key")
def command() -> None:
    """Create, list and revoke API keys."""


@command.command()
@click.argument("owner")
@data_dir
def create(owner: str, data_dir: Path) -> None:
    """Create a key for OWNER and print it, this once.

    A server that is running takes it up when it is started again.
    """
    with _keys(data_dir) as keys:
        click.echo(asyncio.run(keys.create(owner)))


@command.command(name="list")
@data_dir
def list_keys(data_dir: Path) -> None:
    """List the keys in force."""
    with _keys(data_dir) as keys:
        print_table(
            ("id", "owner", "created (UTC)"),
            [(key.id, key.owner, datetime.fromtimestamp(key.created, UTC)) for key in keys.all()],
        )


@command.command()
@click.argument("key_id")
@data_dir
def revoke(key_id: str, data_dir: Path) -> None:
    """Take the key with this id back."""
    with _keys(data_dir) as keys:
        if not asyncio.run(keys.revoke(key_id)):
            raise click.ClickException(f"there is no key {key_id!r}; see `holdfast key list`")


@contextmanager
def _keys(data_dir: Path) -> Iterator[Keys]:
    from holdfast.catalog import Catalog, CatalogUnavailable
    from holdfast.server.auth import Keys

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        catalog = Catalog.open_file(data_dir / "catalog.db")
    except (OSError, CatalogUnavailable) as error:
        raise click.ClickException(f"cannot use {data_dir}: {error}") from error
    try:
        yield Keys(catalog)
    finally:
        catalog.close()
