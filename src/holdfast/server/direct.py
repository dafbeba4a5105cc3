"""The short way to the endpoints that every step asks for.

FastAPI takes a request through a dozen layers to its endpoint, and that costs more than most of
these endpoints do. Here the same functions are called with the same arguments, and errors go to the
same handlers. Only requests as clients send them come this way: whatever is unusual about one,
FastAPI gets it and says what is wrong.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.params import Depends
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.protocol.bodies import Body

# As JSONResponse does, which makes an encoder for each.
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

Endpoint = Callable[..., Awaitable[Response | dict[str, Any]]]
Handler = Callable[[Request, Any], Any]


class Direct:
    """An ASGI app that answers POSTs to these endpoints itself, and leaves the rest to `app`.

    `endpoints` are by path; `handlers` make the answer to an error, by its type or a base of that.
    Bodies of more than `limit` bytes, or of unknown size, are left to `app` too.
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoints: Mapping[str, Endpoint],
        handlers: Mapping[Any, Handler],
        *,
        limit: int,
    ) -> None:
        self._app = app
        self._calls = {path: _Call(endpoint) for path, endpoint in endpoints.items()}
        self._handlers = handlers
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._calls.get(scope["path"]) if scope["type"] == "http" else None
        if call is None or not self._is_usual(scope, call):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = None
            if call.body is not None:
                data = await request.body()
                try:
                    body = call.body.model_validate(json.loads(data))
                except (ValueError, RecursionError):
                    await self._app(scope, _again(data), send)
                    return
            answer = await call(request, body)
            if isinstance(answer, dict):
                answer = Response(_JSON(answer), media_type="application/json")
        except ClientDisconnect:
            return
        except Exception as error:
            answer = await self._handler(error)(request, error)
        await answer(scope, receive, send)

    def _is_usual(self, scope: Scope, call: _Call) -> bool:
        headers = dict(scope["headers"])
        size = headers.get(b"content-length", b"")
        return (
            scope["method"] == "POST"
            and size.isdigit()
            and int(size) <= self._limit
            and (call.body is None or headers.get(b"content-type") == b"application/json")
        )

    def _handler(self, error: Exception) -> Handler:
        return next(self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers)


class _Call:
    """An endpoint, and where its arguments come from."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._request: str | None = None
        self._dependencies: list[tuple[str, Callable[[Request], Awaitable[Any]]]] = []
        self._body = ""
        self.body: type[Body] | None = None
        """The model of its body, if FastAPI would read it for the endpoint."""
        hints = get_type_hints(endpoint, include_extras=True)
        for name in inspect.signature(endpoint).parameters:
            hint = hints[name]
            given = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Depends)]
            if given and given[0].dependency is not None:
                self._dependencies.append((name, given[0].dependency))
            elif hint is Request:
                self._request = name
            else:
                assert issubclass(hint, Body), f"{endpoint} takes {name} from somewhere else"
                self._body, self.body = name, hint

    async def __call__(self, request: Request, body: Body | None) -> Response | dict[str, Any]:
        arguments = {name: await find(request) for name, find in self._dependencies}
        if self._request is not None:
            arguments[self._request] = request
        if body is not None:
            arguments[self._body] = body
        return await self._endpoint(**arguments)


def _again(data: bytes) -> Receive:
    """What was received, to be received once more."""

    async def receive() -> Message:
        return {"type": "http.request", "body": data, "more_body": False}

    return receive
