"""What commands that work on a data directory have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast.cli.output import one_line_errors
from holdfast.protocol.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.store import Store


@contextmanager
def open_data_store(data_dir: Path, url: str | None) -> Iterator[Store]:
    """The store at an address, or of a server's data directory; the server may be running."""
    from holdfast.server.data_dir import existing_store

    store = existing_store(data_dir.expanduser().absolute(), url)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def offline_errors() -> Iterator[None]:
    """Errors of the store and the runs as well, in one line, and nothing else of their log."""
    import structlog

    from holdfast.catalog import CannotOpen, CatalogUnavailable
    from holdfast.runs.errors import RunError
    from holdfast.server.data_dir import CannotUse
    from holdfast.store import StoreError

    before = structlog.get_config()
    # What is printed is the command's own; the standard output may be a program's.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with one_line_errors():
        try:
            yield
        except (StoreError, CannotUse, CannotOpen, CatalogUnavailable) as error:
            raise click.ClickException(str(error)) from error
        except RunError as error:
            raise HoldfastError(error.message, code=error.code) from error
        finally:
            structlog.configure(**before)
