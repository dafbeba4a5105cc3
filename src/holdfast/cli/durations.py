"""Times as people write them: 600, 90m, 12h, 7d."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def parse(value: object) -> int:
    """Seconds, from a text or a number of them. Raises ValueError for what is no time.

    >>> parse("90m"), parse("600"), parse(600)
    (5400, 600, 600)
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    found = re.fullmatch(r"(\d{1,12})([smhdwy]?)", text, re.ASCII)
    if not found:
        raise ValueError(f"{value!r} is not a time such as 3600, 90m, 12h, 7d, 4w or 1y")
    return int(found[1]) * _UNITS[found[2] or "s"]


class Duration(click.ParamType[int]):
    """Seconds, or a number with a unit: 90m, 12h, 7d, 4w, 1y.

    `least` and `most` are written in the same way; `because` says why it may not be less.
    """

    name = "duration"

    def __init__(self, least: str = "0", most: str | None = None, because: str = "") -> None:
        self._least = least
        self._most = most
        self._because = because

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            seconds = parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds < parse(self._least):
            reason = f": {self._because}" if self._because else ""
            self.fail(f"{value!r} is less than {self._least}{reason}", param, ctx)
        if self._most is not None and seconds > parse(self._most):
            self.fail(f"{value!r} is more than {self._most}", param, ctx)
        return seconds


class DurationOrNever(click.ParamType[int | str]):
    """A Duration, or `never`."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "never" if value == "never" else Duration().convert(value, param, ctx)
