"""What a request's handler works with, as FastAPI dependencies.

They are coroutines because FastAPI calls plain functions in a thread, and that costs more than what
they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from holdfast.protocol.errors import PermissionDeniedError, RequestError
from holdfast.runs.service import ELIXIR, Runs
from holdfast.server.archive import Reading
from holdfast.server.auth import Keys
from holdfast.server.settings import Settings

LONGEST_IDEMPOTENCY_KEY = 1000
"""Characters; a database's index takes no key of any length."""


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of one server."""

    settings: Settings
    runs: Runs
    keys: Keys
    reading: Reading = field(default_factory=Reading)


async def context(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


async def runs(request: Request) -> Runs:
    return (await context(request)).runs


async def owner(request: Request) -> str:
    """The owner that the request's key stands for."""
    return (await context(request)).keys.owner(api_key(request))


def api_key(request: Request) -> str | None:
    key = request.headers.get("x-api-key")
    if key is None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else None
    return key


def idempotency_key(request: Request) -> str | None:
    """By which a repeated request is known. Raises RequestError for one that is too long."""
    key = request.headers.get("x-idempotency-key")
    if key is not None and len(key) > LONGEST_IDEMPOTENCY_KEY:
        raise RequestError(
            f"an x-idempotency-key of {len(key)} characters; at most {LONGEST_IDEMPOTENCY_KEY} "
            "are taken"
        )
    return key


async def client_family(request: Request) -> str:
    """Which client is asking: the families differ in what they understand of a failure."""
    agent = request.headers.get("user-agent", "").lower()
    if "tinkex" in agent:
        return ELIXIR
    return "python" if agent.startswith(("asynctinker/", "tinker/")) else "other"


def no_path_escape(value: str) -> str:
    """A path parameter that is one plain segment. Raises PermissionDeniedError otherwise."""
    if value in (".", "..") or "/" in value or "\\" in value:
        raise PermissionDeniedError(f"{value!r} is not a file name")
    return value


RunsDep = Annotated[Runs, Depends(runs)]
OwnerDep = Annotated[str, Depends(owner)]
FamilyDep = Annotated[str, Depends(client_family)]
ContextDep = Annotated[Context, Depends(context)]
