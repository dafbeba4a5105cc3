"""The `holdfast` command. Subcommands load what they need when they are called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from holdfast.cli.suggest import Suggesting

_COMMANDS = {
    "serve": ("holdfast.cli.serve", "Serve training over HTTP."),
    "run": ("holdfast.cli.run", "Look at training runs."),
    "checkpoint": ("holdfast.cli.checkpoint", "List, check, move and remove checkpoints."),
    "doctor": ("holdfast.cli.doctor", "Examine a data directory, and repair its catalog."),
    "key": ("holdfast.cli.key", "Create, list and revoke API keys."),
    "quickstart": ("holdfast.cli.quickstart", "Train, save, kill the server, resume exactly."),
}

SERVER_PACKAGES = frozenset(
    {
        "alembic",
        "blake3",
        "fastapi",
        "huggingface_hub",
        "numpy",
        "peft",
        "safetensors",
        "sqlalchemy",
        "starlette",
        "structlog",
        "tokenizers",
        "torch",
        "transformers",
        "uvicorn",
    }
)
"""What the extra `server` installs and commands import; a plain installation lacks it."""


class _Lazy(Suggesting):
    """A group whose commands are imported when they are used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
                raise
            raise click.ClickException(
                "this command needs the server: pip install 'holdfast[server]'"
                f" (there is no module {error.name})"
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="holdfast")
def main() -> None:
    """A training service whose runs cannot be lost."""
