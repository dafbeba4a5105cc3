"""Every request is answered within a limit, whatever hangs behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp

from holdfast.catalog import Catalog
from holdfast.engine.interface import Worker
from holdfast.server import answer_limit
from holdfast.server.answer_limit import AnswerLimit
from holdfast.server.app import create_app
from holdfast.server.settings import Settings
from holdfast.store import LocalStore

pytestmark = pytest.mark.anyio

LIMIT = 0.3


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_limit, "ANSWER_TAKES", LIMIT)


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog.open_file(tmp_path / "catalog.db")
    yield opened
    opened.close()


async def never(name: str) -> Worker:
    raise AssertionError(f"a worker for {name}")


# As `serve` does: FastAPI silences it only where it builds a model.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.UnsupportedFieldAttributeWarning")
async def test_a_request_whose_write_hangs_is_to_be_sent_again_and_finds_it_done(
    catalog: Catalog, tmp_path: Path
) -> None:
    disk_answers = threading.Event()

    def hang() -> None:
        disk_answers.wait(5.0)

    catalog.before_commit(hang)
    app = create_app(Settings(tmp_path), catalog, LocalStore(tmp_path / "store"), never)
    body = {"type": "create_session", "tags": [], "sdk_version": "0"}
    async with client_of(app) as client, asyncio.timeout(4):
        once = {"x-idempotency-key": "once"}
        answer = await client.post("/api/v1/create_session", json=body, headers=once)
        assert (answer.status_code, answer.json()["code"]) == (503, "not_answered")
        assert answer.json()["category"] == "server"
        disk_answers.set()
        first, second = [
            (await client.post("/api/v1/create_session", json=body, headers=once)).json()
            for _ in range(2)
        ]
        assert first == second
        listed = await client.get("/api/v1/sessions")
        assert listed.json()["sessions"] == [first["session_id"]]


async def test_what_a_client_takes_for_its_part_does_not_count() -> None:
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> StreamingResponse:
        data = await request.body()

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(4):
                await asyncio.sleep(LIMIT / 2)
                yield data

        return StreamingResponse(pieces())

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(LIMIT)
            yield b"x"

    async with client_of(AnswerLimit(app)) as client:
        answer = await client.post("/", content=slowly())
        assert (answer.status_code, answer.content) == (200, b"x" * 12)


async def test_a_handler_that_is_given_up_is_told() -> None:
    app = FastAPI()
    ended: list[str] = []

    @app.get("/")
    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("told")

    async with client_of(AnswerLimit(app)) as client:
        assert (await client.get("/")).status_code == 503
    assert ended == ["told"]


async def test_a_timeout_of_a_handler_s_own_is_not_the_limit() -> None:
    app = FastAPI()

    @app.get("/")
    async def fail() -> None:
        raise TimeoutError("of its own")

    async with client_of(AnswerLimit(app)) as client:
        with pytest.raises(TimeoutError, match="of its own"):
            await client.get("/")
