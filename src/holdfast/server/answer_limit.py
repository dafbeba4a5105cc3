"""The limit on the wait for an answer, as ASGI middleware."""

from __future__ import annotations

import asyncio

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.server.failures import refusal

ANSWER_TAKES = 180.0
"""Seconds. What a poll waits for takes less, by limits of its own: it is not answered so."""

_log = structlog.get_logger("holdfast.server")


class AnswerLimit:
    """Answers 503 when nothing of an answer is there `ANSWER_TAKES` after the last of its request.

    Its handler is cancelled, which takes nothing back: what is being written goes on, and the same
    request again finds it. An answer that has begun may last as long as its client reads.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(ANSWER_TAKES)
        is_answered = False

        async def received() -> Message:
            message = await receive()
            if not is_answered:
                limit.reschedule(loop.time() + ANSWER_TAKES)
            return message

        async def answered(message: Message) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                limit.reschedule(None)
            await send(message)

        try:
            async with limit:
                await self._app(scope, received, answered)
        except TimeoutError:
            if not limit.expired():
                raise
            _log.error("a request was not answered in time", path=scope["path"])
            late = f"the server has come to no answer within {ANSWER_TAKES:.0f} s: send this again"
            await refusal(503, late, "not_answered", "server")(scope, receive, send)
