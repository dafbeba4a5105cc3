"""How errors are answered: one place, one shape, never a traceback."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from holdfast.catalog import CatalogUnavailable
from holdfast.protocol.bodies import describe
from holdfast.protocol.errors import (
    AuthenticationError,
    Category,
    HoldfastError,
    NotFoundError,
    PermissionDeniedError,
    refusal_body,
)
from holdfast.runs.errors import Reason, RunError
from holdfast.store import StoreError
from holdfast.store import Unavailable as StoreUnavailable

_log = structlog.get_logger("holdfast.server")

# Never 409 for a definite answer: clients repeat it for minutes.
_STATUS: dict[Reason, int] = {
    "invalid": 400,
    "not_found": 404,
    "forbidden": 403,
    "conflict": 400,
    "gone": 410,
    "unavailable": 503,
}


def refusal(status: int, message: str, code: str, category: Category = "user") -> JSONResponse:
    """An error answer with the keys that each client family looks for.

    A 503 has no Retry-After. The official client gives a creation eleven tries: with its own
    pauses, which grow, they last for a minute, longer than a stop and the next start together. It
    would obey a shorter pause each time, and a longer one also when the next server is there.
    """
    return JSONResponse(refusal_body(message, category=category, code=code), status_code=status)


def run_refusal(error: RunError) -> JSONResponse:
    """The answer to what a run refuses."""
    if error.reason == "damaged":
        return _damaged(error.message, error.code)
    return refusal(_STATUS[error.reason], error.message, error.code, error.category)


def install(app: FastAPI) -> None:
    """Answer every kind of error by `refusal`."""

    @app.exception_handler(RunError)
    async def run_error(_request: Request, error: RunError) -> JSONResponse:
        return run_refusal(error)

    @app.exception_handler(HoldfastError)
    async def protocol_error(_request: Request, error: HoldfastError) -> JSONResponse:
        return refusal(_status_of(error), error.message, error.code, error.category)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(422, validation_message(error), "invalid_message")

    @app.exception_handler(CatalogUnavailable)
    async def unavailable(_request: Request, error: CatalogUnavailable) -> JSONResponse:
        return refusal(503, str(error), "catalog_unavailable", "server")

    @app.exception_handler(StoreError)
    async def storage(_request: Request, error: StoreError) -> JSONResponse:
        _log.error("the store failed", error=str(error), code=error.code)
        if isinstance(error, StoreUnavailable):
            return refusal(503, str(error), error.code, "server")
        return _damaged(str(error), error.code)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return refusal(404, f"there is no {request.url.path} here", "no_such_endpoint")
        if error.status_code == 405:
            return refusal(
                405, f"{request.url.path} does not take {request.method}", "method_not_allowed"
            )
        return refusal(error.status_code, str(error.detail), "refused")

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        _log.error("a defect", path=request.url.path, exc_info=error)
        return refusal(
            500,
            "the server met a defect; its log has the details",
            "internal_error",
            "server",
        )


def _damaged(message: str, code: str) -> JSONResponse:
    """Damage does not heal: unlike a defect, which may have been met by chance, it stays."""
    answer = refusal(500, message, code, "server")
    answer.headers["x-should-retry"] = "false"
    return answer


def _status_of(error: HoldfastError) -> int:
    match error:
        case AuthenticationError():
            return 401
        case PermissionDeniedError():
            return 403
        case NotFoundError():
            return 404
    return error.status or 400


def validation_message(error: RequestValidationError) -> str:
    """What FastAPI found wrong with a request, in one line that names each value."""
    found = [{**item, "loc": tuple(item["loc"][1:])} for item in error.errors()]
    return describe(found)  # type: ignore[arg-type]
