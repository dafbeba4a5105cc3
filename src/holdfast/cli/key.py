"""`holdfast key`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast.cli.offline import offline_errors
from holdfast.cli.options import catalog, data_dir
from holdfast.cli.output import print_table

if TYPE_CHECKING:
    from holdfast.server.auth import Keys


@click.group(name="key")
def command() -> None:
    """Create, list and revoke API keys."""


@command.command()
@click.argument("owner")
@data_dir
@catalog
def create(owner: str, data_dir: Path, catalog: str | None) -> None:
    """Create a key for OWNER and print it, this once.

    A server that is running takes it up when it is started again.
    """
    with _keys(data_dir, catalog) as keys:
        click.echo(asyncio.run(keys.create(owner)))


@command.command(name="list")
@data_dir
@catalog
def list_keys(data_dir: Path, catalog: str | None) -> None:
    """List the keys in force."""
    with _keys(data_dir, catalog) as keys:
        print_table(
            ("id", "owner", "created (UTC)"),
            [(key.id, key.owner, datetime.fromtimestamp(key.created, UTC)) for key in keys.all()],
        )


@command.command()
@click.argument("key_id")
@data_dir
@catalog
def revoke(key_id: str, data_dir: Path, catalog: str | None) -> None:
    """Take the key with this id back."""
    with _keys(data_dir, catalog) as keys:
        if not asyncio.run(keys.revoke(key_id)):
            raise click.ClickException(f"there is no key {key_id!r}; see `holdfast key list`")


@contextmanager
def _keys(data_dir: Path, url: str | None) -> Iterator[Keys]:
    from holdfast.server.auth import Keys
    from holdfast.server.data_dir import open_catalog, remember

    directory = data_dir.expanduser().absolute()
    with offline_errors():
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"cannot use {directory}: {error.strerror}") from error
        with closing(open_catalog(directory, url)) as catalog:
            remember(directory, None, catalog)
            yield Keys(catalog)
