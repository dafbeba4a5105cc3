"""Checkpoint names and `tinker://RUN/KIND/NAME` paths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import unquote

from holdfast.protocol.errors import InvalidNameError, InvalidPathError

Kind = Literal["weights", "sampler_weights", "external_weights"]
CheckpointType = Literal["training", "sampler", "external"]

KINDS: tuple[Kind, ...] = get_args(Kind)
TYPE_OF_KIND: dict[Kind, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
KIND_OF_TYPE: dict[CheckpointType, Kind] = {type_: kind for kind, type_ in TYPE_OF_KIND.items()}
RESERVED_PREFIX = "auto."

_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")
_PATH_FORM = "a path is tinker://RUN/weights/NAME (or sampler_weights, external_weights)"


def check_name(name: str) -> str:
    """Return a checkpoint's name unchanged, or raise InvalidNameError.

    >>> check_name("epoch-3-loss-1.23")
    'epoch-3-loss-1.23'
    """
    if not _NAME.fullmatch(name):
        raise InvalidNameError(
            f"checkpoint name {_shown(name)} is not allowed: a name has 1 to 128 characters out of"
            " letters, digits, '.', '_' and '-', and begins with a letter or digit"
        )
    return name


def check_user_name(name: str) -> str:
    """As check_name, and refuses the names that the server keeps for its own snapshots."""
    check_name(name)
    if name.startswith(RESERVED_PREFIX):
        raise InvalidNameError(
            f"checkpoint name {_shown(name)} is reserved: names that begin with"
            f" {RESERVED_PREFIX!r} are the server's own; choose another beginning"
        )
    return name


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """Where a checkpoint is: its run, its kind and its name. `str()` gives the wire's text."""

    run_id: str
    kind: Kind
    name: str

    @classmethod
    def parse(cls, text: str) -> CheckpointPath:
        """Read a path; percent-encoded characters of the run id (`%3A`) are decoded.

        Raises InvalidPathError, which names the text and what would be right.

        >>> CheckpointPath.parse("tinker://S:train:0/weights/final").name
        'final'
        """
        if not text.startswith(_SCHEME):
            raise InvalidPathError(f"{_shown(text)} does not begin with {_SCHEME!r}: {_PATH_FORM}")
        parts = text[len(_SCHEME) :].split("/")
        if len(parts) != 3:
            raise InvalidPathError(
                f"{_shown(text)} has {len(parts)} parts after {_SCHEME!r} instead of three:"
                f" {_PATH_FORM}"
            )
        run_id, kind, name = parts
        return cls.of(unquote(run_id), kind, name)

    @classmethod
    def of(cls, run_id: str, kind: str, name: str) -> CheckpointPath:
        """Build a path from parts that came from outside, checking each."""
        check_run_id(run_id)
        for known in KINDS:
            if kind == known:
                try:
                    return cls(run_id, known, check_name(name))
                except InvalidNameError as error:
                    raise InvalidPathError(error.message) from None
        raise InvalidPathError(
            f"{_shown(kind)} is not a kind of checkpoint: one of {', '.join(KINDS)}"
        )

    @property
    def checkpoint_type(self) -> CheckpointType:
        return TYPE_OF_KIND[self.kind]

    @property
    def checkpoint_id(self) -> str:
        """`KIND/NAME`, the id that lists show and REST addresses end in."""
        return f"{self.kind}/{self.name}"

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.kind}/{self.name}"


def check_run_id(text: str) -> str:
    """The text, when it may be a run's id. Raises InvalidPathError."""
    if not _RUN_ID.fullmatch(text):
        raise InvalidPathError(
            f"run id {_shown(text)} is not allowed: letters, digits, ':', '.', '_' and '-',"
            " beginning with a letter or digit"
        )
    return text


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}... ({len(text)} characters)"
