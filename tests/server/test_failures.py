"""What a failure tells a client about trying again."""

from __future__ import annotations

import httpx2
import pytest
from fastapi import FastAPI

from holdfast.runs.errors import RunError
from holdfast.server import failures
from holdfast.store import CorruptBlob, DiskFull


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "status", "should_retry", "retry_after"),
    [
        (CorruptBlob("blob x is damaged", "x"), 500, "false", None),
        (
            RunError("corrupt_blob", "blob x", reason="damaged", category="server"),
            500,
            "false",
            None,
        ),
        (DiskFull("no space left"), 503, None, "2"),
        (ZeroDivisionError(), 500, None, None),  # met by chance, perhaps: may be sent again
    ],
)
async def test_only_damage_is_not_worth_another_try(
    error: Exception, status: int, should_retry: str | None, retry_after: str | None
) -> None:
    app = FastAPI()
    failures.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.get("/")
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == should_retry
    assert answer.headers.get("retry-after") == retry_after
