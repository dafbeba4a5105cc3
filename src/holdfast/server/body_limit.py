"""The limit on request bodies, as ASGI middleware."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.protocol.errors import RequestError
from holdfast.server.failures import refusal

_DRAINED = 4 << 30
"""Bytes that are read and thrown away, so that the client hears the answer."""


class BodyTooLargeError(RequestError):
    """A body above the limit."""

    default_code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the body has more than {limit} bytes; send the data in several smaller requests",
            status=413,
        )


class BodyLimit:
    """Answers 413 to bodies above `limit` bytes; nothing of them is kept."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await _drain(receive)
            await self._refuse(scope, receive, send)
            return
        read = 0
        exceeded = False

        async def counted() -> Message:
            nonlocal read, exceeded
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                exceeded = True
                if message.get("more_body", False):
                    await _drain(receive)
                raise BodyTooLargeError(self._limit)
            return message

        async def answered(message: Message) -> None:
            # Whatever the app makes of a body that ends in an error is not the answer.
            if not exceeded:
                await send(message)

        await self._app(scope, counted, answered)
        if exceeded:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["app"].state.body_refused(scope)
        error = BodyTooLargeError(self._limit)
        await refusal(413, error.message, error.code)(scope, receive, send)


async def _drain(receive: Receive) -> None:
    read = 0
    while read < _DRAINED:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
