"""What a failure tells a client about trying again."""

from __future__ import annotations

from pathlib import Path

import httpx
import httpx2
import pytest
from fastapi import FastAPI
from tinker._client import AsyncTinker
from tinker._models import FinalRequestOptions

from holdfast.runs.errors import RunError, stopping
from holdfast.server import failures
from holdfast.server.settings import Settings
from holdfast.store import CorruptBlob, DiskFull


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "status", "should_retry"),
    [
        (CorruptBlob("blob x is damaged", "x"), 500, "false"),
        (RunError("corrupt_blob", "blob x", reason="damaged", category="server"), 500, "false"),
        (DiskFull("no space left"), 503, None),
        (ZeroDivisionError(), 500, None),  # met by chance, perhaps: may be sent again
    ],
)
async def test_only_damage_is_not_worth_another_try(
    error: Exception, status: int, should_retry: str | None
) -> None:
    answer = await answered(error)
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == should_retry


@pytest.mark.anyio
@pytest.mark.parametrize("error", [stopping(), DiskFull("no space left")])
async def test_the_official_client_s_tries_outlast_a_stop_and_a_start(error: Exception) -> None:
    answer = await answered(error)
    assert answer.status_code == 503
    assert tries_last(httpx.Headers(dict(answer.headers))) > 2 * Settings(Path()).stop_within
    # It does what an answer asks for: a pause of a second would be over too soon.
    assert tries_last(httpx.Headers({"retry-after": "1"})) < Settings(Path()).stop_within


def tries_last(headers: httpx.Headers) -> float:
    """Seconds for which the official client tries a creation, when each try is answered so."""
    client = AsyncTinker(api_key="tml-test", base_url="http://server")
    options = FinalRequestOptions.construct(method="post", url="/api/v1/create_model")
    pauses = [
        client._calculate_retry_timeout(left, options, headers)
        for left in range(client.max_retries, 0, -1)
    ]
    return sum(pauses)


async def answered(error: Exception) -> httpx2.Response:
    """What a client gets when a route raises this."""
    app = FastAPI()
    failures.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.get("/")
