"""The short way to an endpoint gives the answers of the long one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from holdfast.protocol.bodies import Body, Counter, Id
from holdfast.protocol.errors import AuthenticationError, InvalidMessageError
from holdfast.runs.errors import RunError
from holdfast.server import failures
from holdfast.server.app import _EVERY_STEP, PREFIX
from holdfast.server.direct import Direct, Endpoint
from holdfast.server.routes import futures, sampling, training

LIMIT = 1000

# FastAPI silences this warning of its own making only where models are built at once.
pytestmark = pytest.mark.filterwarnings("ignore:The 'alias' attribute with value 'body'")


class Question(Body):
    text: Id
    number: Counter = 0


async def who(request: Request) -> str:
    name = request.headers.get("x-api-key")
    if name is None:
        raise AuthenticationError("a key is needed")
    return name


Who = Annotated[str, Depends(who)]


async def ask(body: Question, name: Who) -> dict[str, Any]:
    match body.text:
        case "refused":
            raise RunError("no_such_thing", "there is none", reason="not_found")
        case "invalid":
            raise InvalidMessageError("not like this")
        case "defect":
            raise ZeroDivisionError
        case "no JSON":
            return {"number": float("nan")}
    return {"text": body.text, "number": body.number, "name": name}


async def raw(request: Request, name: Who) -> PlainTextResponse:
    return PlainTextResponse(name.encode() + await request.body(), status_code=201)


ENDPOINTS: dict[str, Endpoint] = {"/ask": ask, "/raw": raw}


def long_way() -> FastAPI:
    app = FastAPI(strict_content_type=False)
    failures.install(app)
    app.post("/ask")(ask)
    app.post("/raw")(raw)
    return app


async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"the": "long way"}, status_code=418)(scope, receive, send)


async def answer(app: Any, request: dict[str, Any]) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(**request)


def post(path: str, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    return {
        "method": "POST",
        "url": path,
        "headers": {"x-api-key": "me", **(headers or {})},
        **body,
    }


USUAL = {
    "all of it": post("/ask", json={"text": "a", "number": 3}),
    "defaults and more keys": post("/ask", json={"text": "é", "number": None, "else": 1}),
    "a refusal": post("/ask", json={"text": "refused"}),
    "an invalid request": post("/ask", json={"text": "invalid"}),
    "a defect": post("/ask", json={"text": "defect"}),
    "no key": {"method": "POST", "url": "/ask", "json": {"text": "a"}},
    "bytes": post("/raw", content=b"\0\1"),
    "no bytes": post("/raw", content=b""),
}
JSON = {"content-type": "application/json"}
UNUSUAL = {
    "no JSON": post("/ask", JSON, content=b"{"),
    "no object": post("/ask", json=[1]),
    "nothing": post("/ask", JSON, content=b""),
    "a wrong value": post("/ask", json={"text": "a", "number": -1}),
    "a missing value": post("/ask", json={}),
    "another type": post("/ask", {"content-type": "text/plain"}, content=b'{"text": "a"}'),
    "no type": post("/ask", content=b'{"text": "a"}'),
    "a character set": post(
        "/ask", {"content-type": "application/json; charset=utf-8"}, content=b'{"text": "a"}'
    ),
    "deep nesting": post("/ask", JSON, content=b"[" * 900),
    "another method": {"method": "GET", "url": "/ask"},
    "another path": post("/asks", json={"text": "a"}),
    "too much": post("/ask", json={"text": "a" * 400, "more": "a" * LIMIT}),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
async def test_both_ways_answer_alike(name: str) -> None:
    app = long_way()
    direct = Direct(app, ENDPOINTS, app.exception_handlers, limit=LIMIT)
    request = (USUAL | UNUSUAL)[name]
    short, long = await answer(direct, request), await answer(app, request)
    assert (short.status_code, short.content) == (long.status_code, long.content)
    assert short.headers == long.headers


@pytest.mark.anyio
@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
async def test_usual_requests_go_the_short_way_and_others_do_not(name: str) -> None:
    direct = Direct(nowhere, ENDPOINTS, long_way().exception_handlers, limit=LIMIT)
    went_long = (await answer(direct, (USUAL | UNUSUAL)[name])).status_code == 418
    assert went_long == (name in UNUSUAL)


@pytest.mark.anyio
async def test_a_body_of_unknown_size_goes_the_long_way() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"text": "a"}'

    direct = Direct(nowhere, ENDPOINTS, {}, limit=LIMIT)
    assert (await answer(direct, post("/ask", JSON, content=chunks()))).status_code == 418


@pytest.mark.anyio
async def test_nothing_is_received_of_a_body_that_is_refused_unseen() -> None:
    async def receive() -> Message:
        raise AssertionError("its key is not known")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    direct = Direct(nowhere, ENDPOINTS, long_way().exception_handlers, limit=LIMIT)
    headers = [(b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/raw", "headers": headers}
    await direct(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.anyio
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_nobody_is_answered_who_goes_away(path: str) -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    direct = Direct(nowhere, ENDPOINTS, long_way().exception_handlers, limit=LIMIT)
    headers = [
        (b"content-length", b"9"),
        (b"content-type", b"application/json"),
        (b"x-api-key", b"me"),
    ]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await direct(scope, receive, send)
    assert messages == []


@pytest.mark.anyio
async def test_a_body_in_pieces_is_put_together() -> None:
    pieces = [b'{"text": ', b'"a", ', b'"number": 3}']

    async def receive() -> Message:
        body = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(pieces)}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    direct = Direct(nowhere, ENDPOINTS, long_way().exception_handlers, limit=LIMIT)
    headers = [
        (b"content-length", b"26"),
        (b"content-type", b"application/json"),
        (b"x-api-key", b"me"),
    ]
    scope = {"type": "http", "method": "POST", "path": "/ask", "headers": headers}
    await direct(scope, receive, send)
    assert sent[1]["body"] == b'{"text":"a","number":3,"name":"me"}'


@pytest.mark.anyio
async def test_an_answer_that_json_does_not_have_is_a_defect() -> None:
    direct = Direct(nowhere, ENDPOINTS, long_way().exception_handlers, limit=LIMIT)
    found = await answer(direct, post("/ask", json={"text": "no JSON"}))
    assert (found.status_code, found.json()["code"]) == (500, "internal_error")


def test_an_endpoint_that_needs_more_than_there_is_here_is_not_taken() -> None:
    async def with_path(run_id: str) -> dict[str, Any]:
        return {"id": run_id}

    with pytest.raises(AssertionError, match="run_id"):
        Direct(nowhere, {"/x": with_path}, {}, limit=LIMIT)


def test_what_is_taken_are_endpoints_of_the_app() -> None:
    app = FastAPI()
    for module in (training, futures, sampling):
        app.include_router(module.router, prefix=PREFIX)
    for path, endpoint in _EVERY_STEP.items():
        assert app.url_path_for(endpoint.__name__) == path
