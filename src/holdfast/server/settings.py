"""What a server is started with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from holdfast.runs.engines import DEFAULT_ADAPTER_MEMORY
from holdfast.runs.service import Lifetimes

SHIPPED_MODEL = "holdfast-tiny"
"""The base model that comes with the package, served when no other is named."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a base model is loaded from."""

    path: str
    """A local directory, or an id on the model hub."""
    tokenizer: str | None = None
    """An id that a client's machine can load the tokenizer by."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A server's settings. Sizes are bytes, times seconds."""

    data_dir: Path
    store: str | None = None
    """The address of an object storage for the checkpoints; None: they are in the data directory,
    or where they were when it was last used."""
    catalog: str | None = field(default=None, repr=False)
    """The address of a PostgreSQL database for the catalog, perhaps with a password; None: it is a
    file in the data directory, or where it was when that was last used."""
    host: str = "127.0.0.1"
    port: int = 8000
    models: Mapping[str, ModelSource] = field(default_factory=dict)
    """By the name that clients use. The shipped model is there besides these."""
    threads: int = 0
    """Compute threads of a worker; 0: as many as suit the model."""
    token_budget: int = 4096
    """Tokens that a worker puts through a model at once."""
    device: str = "auto"
    adapter_memory: int = DEFAULT_ADAPTER_MEMORY
    """Bytes that a worker keeps of runs which are idle; others come back when they are used."""
    worker_memory: int = 0
    """Bytes of resident memory above which a worker is replaced in good order; 0: never."""
    max_body: int = 128 << 20
    poll_hold: float = 30.0
    """How long a poll waits before it answers "try again"; below the clients' own 45 s."""
    stop_within: float = 20.0
    """How long a stop takes at most; what is not done by then is recovered by the next start."""
    lifetimes: Lifetimes = field(default_factory=Lifetimes)

    @property
    def loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1") or self.host.startswith("127.")


def shipped_model() -> tuple[str, ModelSource]:
    """The base model that comes with the package: its name and where it is."""
    models = resources.files("holdfast.engine") / "models" / SHIPPED_MODEL
    return SHIPPED_MODEL, ModelSource(str(models))


def parse_model(text: str) -> tuple[str, ModelSource]:
    """Read `NAME=PATH_OR_HUB_ID`, with `,tokenizer=HUB_ID` behind it where wanted.

    Raises ValueError that says what is wrong.
    """
    name, equals, source = text.partition("=")
    path, _, option = source.partition(",")
    if not equals or not path:
        raise ValueError(f"{text!r} is not NAME=PATH_OR_HUB_ID, for example tiny=./models/tiny")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a model name: letters, digits, '.', '_', '-' and '/', at most 200"
        )
    tokenizer = None
    if option:
        key, _, tokenizer = option.partition("=")
        if key != "tokenizer" or not tokenizer:
            raise ValueError(f"{option!r} is not tokenizer=HUB_ID")
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        path = str(expanded.resolve())
        if not (expanded / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: it is not the directory of a model")
    elif path.startswith((".", "/", "~")):
        raise ValueError(f"there is no directory {path}")
    return name, ModelSource(path, tokenizer)
