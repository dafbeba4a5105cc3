"""Options that several commands share, and where their values come from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from holdfast.cli.durations import Duration, parse
from holdfast.cli.suggest import hint

F = Callable[..., Any]


def default_data_dir() -> Path:
    """Where a server keeps its data when nothing else is said."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "holdfast"


def data_dir(command: F) -> F:
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=default_data_dir,
        envvar="HOLDFAST_DATA_DIR",
        show_default="~/.local/share/holdfast",
        help="Where runs and checkpoints are kept.",
    )(command)


def store(command: F) -> F:
    return click.option(
        "--store",
        "store",
        metavar="URL",
        envvar="HOLDFAST_STORE",
        help="Keep checkpoints in an object storage: s3://BUCKET/PREFIX, gs://… or az://…",
    )(command)


def catalog(command: F) -> F:
    return click.option(
        "--catalog",
        "catalog",
        metavar="URL",
        envvar="HOLDFAST_CATALOG",
        help="Keep runs and their journal in PostgreSQL: postgresql://USER@HOST/DATABASE. A "
        "password belongs in the environment or in a file.",
    )(command)


def read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Take defaults from a TOML file; flags and environment variables go before it."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    known = {p.name: p for p in ctx.command.params if isinstance(p, click.Option)}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            names = sorted(n.replace("_", "-") for n in known if n not in ("config", "help"))
            raise click.BadParameter(f"{path} sets {key!r}; {hint(key, names, 'known are')}")
        try:
            defaults[name] = _checked(known[name], value)
        except click.BadParameter as error:
            raise click.BadParameter(f"{path}, {key}: {error.message}") from error
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _checked(option: click.Option, value: object) -> object:
    """A value of a TOML file, of the type that the option takes.

    Its range is checked where it is used: a flag or the environment may go before it.

    A number may be given as text, as in an environment variable, and a time as a number. An option
    that may be repeated takes one text, a list of them, or a table (NAME = "VALUE").
    """
    if option.multiple:
        if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            value = [f"{name}={item}" for name, item in value.items()]
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise click.BadParameter(f"{value!r} is not a text, a list of texts or a table of them")
    elif isinstance(option.type, click.IntRange):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise click.BadParameter(f"{value!r} is not an integer")
        try:
            int(value)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not an integer") from error
    elif isinstance(option.type, Duration):
        try:
            parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    elif not isinstance(value, str):
        raise click.BadParameter(f"{value!r} is not a text")
    return value
