"""What a mistyped name may have been, and command groups that say so."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click


def hint(name: str, known: Sequence[str], otherwise: str) -> str:
    """Which of the known names it may have been; where none is close, all of them.

    >>> hint("prot", ["host", "port"], "known are"), hint("x", ["host", "port"], "known are")
    ('did you mean port?', 'known are host, port')
    """
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"{otherwise} {', '.join(known)}"


class Suggesting(click.Group):
    """A group that names similar commands when one does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            commands = self.list_commands(ctx)
            ctx.fail(f"There is no command {name!r}; {hint(name, commands, 'there are')}")
        return super().resolve_command(ctx, args)
