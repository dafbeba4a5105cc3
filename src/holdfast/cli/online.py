"""What commands that ask a server have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
