"""The limit on the wait for an answer, as ASGI middleware."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.server.failures import refusal

ANSWER_TAKES = 180.0
"""Seconds. What a poll waits for takes less, by limits of its own: it is not answered so."""
_LOOKS = 20
"""Times that is looked in so many seconds: one timer serves all requests."""

_log = structlog.get_logger("holdfast.server")


@dataclass(slots=True, eq=False)
class _Request:
    """One of which nothing is answered yet."""

    task: asyncio.Task[None]
    received: float = field(default_factory=time.monotonic)
    """When the last of it came that was read."""
    is_incomplete: bool = True
    is_given_up: bool = False


class AnswerLimit:
    """Answers 503 when nothing of an answer is there `ANSWER_TAKES` after the last of its request.

    Its handler is cancelled, which takes nothing back: what is being written goes on, and the same
    request again finds it. An answer that has begun may last as long as its client reads.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: set[_Request] = set()
        self._is_watching = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        request = _Request(task)
        self._open.add(request)
        if not self._is_watching:
            self._is_watching = True
            self._look_later()

        async def received() -> Message:
            if request.is_incomplete:
                request.received = math.inf  # it is the client who is waited for
            message = await receive()
            request.received = time.monotonic()
            request.is_incomplete = message.get("more_body", False)
            return message

        async def answered(message: Message) -> None:
            self._open.discard(request)
            await send(message)

        try:
            await self._app(scope, received, answered)
        except asyncio.CancelledError:
            if not request.is_given_up or task.uncancel():
                raise
            _log.error("a request was not answered in time", path=scope["path"])
            late = f"the server has come to no answer within {ANSWER_TAKES:.0f} s: send this again"
            await refusal(503, late, "not_answered", "server")(scope, receive, send)
        finally:
            self._open.discard(request)

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(ANSWER_TAKES / _LOOKS, self._look)

    def _look(self) -> None:
        before = time.monotonic() - ANSWER_TAKES
        for request in [request for request in self._open if request.received < before]:
            self._open.discard(request)
            request.is_given_up = True
            request.task.cancel()
        if self._open:
            self._look_later()
        else:
            self._is_watching = False
