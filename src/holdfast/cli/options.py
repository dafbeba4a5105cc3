"""Options that several commands share, and where their values come from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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
        if name == "model" and isinstance(value, dict):
            value = [f"{model}={source}" for model, source in value.items()]
        if name not in known:
            names = ", ".join(sorted(n for n in known if n not in ("config", "help") and n))
            raise click.BadParameter(f"{path} sets {key!r}; known are {names}")
        defaults[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path
