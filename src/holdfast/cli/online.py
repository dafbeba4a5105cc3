"""What commands that ask a server have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import click

from holdfast.protocol.errors import InvalidPathError
from holdfast.protocol.paths import CheckpointPath

if TYPE_CHECKING:
    from holdfast.client.rest import RestClient

F = Callable[..., Any]

PATIENCE = 5.0
"""Seconds for which a server that does not answer is asked again: somebody is waiting."""


def server_options(command: F) -> F:
    """`--url` and `--api-key`."""
    command = click.option(
        "--api-key",
        envvar=["HOLDFAST_API_KEY", "TINKER_API_KEY"],
        default="tml-local",
        show_default="HOLDFAST_API_KEY, TINKER_API_KEY, or tml-local",
        help="The key that the server knows you by.",
    )(command)
    return click.option(
        "--url",
        envvar=["HOLDFAST_BASE_URL", "TINKER_BASE_URL"],
        default="http://127.0.0.1:8000",
        show_default="HOLDFAST_BASE_URL, TINKER_BASE_URL, or http://127.0.0.1:8000",
        help="The server's address.",
    )(command)


def connect(url: str, api_key: str, patience: float | None = None) -> RestClient:
    """A client of the server. Raises HoldfastError for an address that is none."""
    from holdfast.client.http import RetryConfig
    from holdfast.client.rest import RestClient

    retry = RetryConfig(give_up_after=PATIENCE if patience is None else patience)
    return RestClient(base_url=url, api_key=api_key, retry_config=retry)


class PathType(click.ParamType[CheckpointPath]):
    """A tinker:// path."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> CheckpointPath:
        if isinstance(value, CheckpointPath):
            return value
        try:
            return CheckpointPath.parse(value)
        except InvalidPathError as error:
            self.fail(error.message, param, ctx)


class Duration(click.ParamType[int]):
    """Seconds, or a number with a unit: 90m, 12h, 7d, 4w, 1y."""

    name = "duration"
    units: ClassVar = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,12})([smhdwy]?)", value.strip())
        if not found:
            self.fail(f"{value!r} is not a time such as 3600, 90m, 12h, 7d, 4w or 1y", param, ctx)
        return int(found[1]) * self.units[found[2] or "s"]


class DurationOrNever(click.ParamType[int | str]):
    """A Duration, or `never`."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "never" if value == "never" else Duration().convert(value, param, ctx)
