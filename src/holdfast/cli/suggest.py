"""Command groups that say what a mistyped command may have been."""

from __future__ import annotations

import difflib

import click


class Suggesting(click.Group):
    """A group that names similar commands when one does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            commands = self.list_commands(ctx)
            close = difflib.get_close_matches(name, commands, n=2, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?"
                if close
                else f"there are {', '.join(commands)}"
            )
            ctx.fail(f"There is no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)
