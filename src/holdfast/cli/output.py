"""What commands print: tables for people, JSON for programs, progress, and errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from holdfast.protocol.errors import ConnectionFailedError, HoldfastError

_WIDEST = 10_000
"""Columns of an output that is no terminal."""
_NARROWEST = 9
"""Columns that a table's column needs to be readable when its cells are folded."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def print_json(value: object) -> None:
    """One JSON document on standard output; times are ISO 8601."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: str = "",
    whole: str = "",
    widths: Sequence[int] = (),
) -> None:
    """A table; the columns named in `right`, separated by spaces, are numbers.

    Those named in `whole` are put on one line where the terminal is wide enough for them.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    console = _console()
    needed = sum(
        max(len(column), *(len(shown(row[number])) for row in rows)) + 2
        if column in whole.split()
        else _NARROWEST
        for number, column in enumerate(columns)
    )
    for number, column in enumerate(columns):
        is_number = column in right.split()
        is_whole = column in whole.split() and needed <= console.width
        table.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=is_number or is_whole,
            overflow="fold",
            min_width=widths[number] if widths else None,
        )
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row))
    console.print(table)


def print_groups(
    columns: Sequence[str], groups: Mapping[str, Sequence[Sequence[object]]], *, right: str = ""
) -> None:
    """A table for each group, below its name; their columns are below each other."""
    rows = [row for group in groups.values() for row in group]
    widths = [
        max(len(column), *(len(shown(row[number])) for row in rows))
        for number, column in enumerate(columns)
    ]
    for name, group in groups.items():
        _console().print(escape(name), style="cyan", soft_wrap=True)
        print_table(columns, group, right=right, widths=widths)


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Names and values, those without a value left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts:
        if value is not None:
            zone = " UTC" if isinstance(value, datetime) else ""
            grid.add_row(name, escape(f"{shown(value)}{zone}"))
    _console().print(grid)


def say(text: str) -> None:
    """A line for people, on standard error, so that it is in no program's way."""
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(escape(text))


def shown(value: object) -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    return str(value)


def size(count: int | None) -> str:
    """Bytes as people read them.

    >>> size(1_500_000)
    '1.5 MB'
    """
    if count is None:
        return ""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "blob"), count(2, "blob")
    ('1 blob', '2 blobs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def bytes_progress(title: str, total: int | None) -> Iterator[Any]:
    """A bar on standard error; gives a function of the bytes done, and in all if that changes."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True, emoji=False),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = progress.add_task(escape(title), total=total)
        yield lambda done, total=total: progress.update(bar, completed=done, total=total)


@contextmanager
def working(title: str) -> Iterator[None]:
    """A sign of life on standard error for work of unknown length."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True, emoji=False),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        progress.add_task(escape(title), total=None)
        yield


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of the client, and of the disk, as one line and exit status 1."""
    try:
        yield
    except ConnectionFailedError as error:
        raise click.ClickException(
            f"{error.message}; is a server running there? Another one is named with --url"
        ) from error
    except HoldfastError as error:
        raise click.ClickException(f"{error.message} ({error.code})") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from error


def _console() -> Console:
    # A line stays a line for a program that reads it, and for who copies an id from a file.
    width = None if sys.stdout.isatty() else _WIDEST
    return Console(highlight=False, emoji=False, width=width)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} in JSON")
