"""The ASGI app: its parts put together, started and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.types import Receive, Scope, Send

from holdfast.catalog import Catalog
from holdfast.engine.interface import EngineError
from holdfast.protocol.errors import AuthenticationError, InvalidMessageError
from holdfast.runs import bodies
from holdfast.runs.engines import Engines, StartEngine
from holdfast.runs.errors import RunError, Unavailable, stopping
from holdfast.runs.service import Runs
from holdfast.server import failures
from holdfast.server.answer_limit import AnswerLimit
from holdfast.server.auth import Keys
from holdfast.server.body_limit import BodyLimit
from holdfast.server.context import Context
from holdfast.server.data_dir import segments_of
from holdfast.server.direct import Direct, Endpoint
from holdfast.server.routes import (
    archives,
    checkpoints,
    futures,
    models,
    sampling,
    service,
    sessions,
    tokenizers,
    training,
    training_runs,
)
from holdfast.server.settings import Settings
from holdfast.server.submit import address_in_json, refuse_unread
from holdfast.store import Store

PREFIX = "/api/v1"

_KINDS = {
    "forward_backward": bodies.FORWARD_BACKWARD,
    "forward": bodies.FORWARD,
    "optim_step": bodies.OPTIM_STEP,
    "save_weights": bodies.SAVE_WEIGHTS,
    "save_weights_for_sampler": bodies.SAVE_SAMPLER,
    "save_weights_external": bodies.SAVE_EXTERNAL,
    "load_weights": bodies.LOAD_WEIGHTS,
}
"""Operations that have a number, by the last part of their path."""

_EVERY_STEP: dict[str, Endpoint] = {
    f"{PREFIX}/forward_backward": training.forward_backward,
    f"{PREFIX}/forward": training.forward,
    f"{PREFIX}/optim_step": training.optim_step,
    f"{PREFIX}/retrieve_future": futures.retrieve_future,
    f"{PREFIX}/asample": sampling.asample,
}
"""What a training loop asks for without end."""

_log = structlog.get_logger("holdfast.server")


class _App(FastAPI):
    """FastAPI, with a short way to what every step asks for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        try:
            await self._answering(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            # The server ends, and has waited for this answer as long as it can.
            _log.warning("a request is not finished before the server ends", path=scope["path"])
            with suppress(RuntimeError):  # part of its answer was sent
                await failures.run_refusal(stopping())(scope, receive, send)

    @cached_property
    def _answering(self) -> AnswerLimit:
        limit = self.state.context.settings.max_body
        return AnswerLimit(
            Direct(super().__call__, _EVERY_STEP, self.exception_handlers, limit=limit)
        )


def create_app(
    settings: Settings, catalog: Catalog, store: Store, start_engine: StartEngine
) -> FastAPI:
    """The app over an open catalog and store. It closes neither.

    It starts the runs. Whoever serves it stops them, while the app still answers.
    """
    engines = Engines(
        list(settings.models),
        start_engine,
        adapter_memory=settings.adapter_memory,
        worker_memory=settings.worker_memory,
    )
    segments = segments_of(settings.data_dir, catalog)
    runs = Runs(catalog, segments, store, engines, settings.lifetimes)
    context = Context(settings, runs, Keys(catalog))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await runs.start()
        warm = asyncio.create_task(_load_first(engines))
        yield
        warm.cancel()
        await asyncio.gather(warm, return_exceptions=True)
        await asyncio.to_thread(context.reading.close)
        runs.checkpoints.close()

    app = _App(
        title="Holdfast",
        lifespan=lifespan,
        # A redirect would be taken for an answer by some clients.
        redirect_slashes=False,
        strict_content_type=False,
    )
    app.state.context = context
    failures.install(app)
    _settle_refused(app, context)
    for module in (
        training,  # first what every step asks for: routes are tried one after the other
        futures,
        sampling,
        service,
        sessions,
        models,
        checkpoints,
        archives,
        training_runs,
        tokenizers,
    ):
        app.include_router(module.router, prefix=PREFIX)
    app.include_router(service.router, include_in_schema=False)  # /healthz, for probes
    app.add_middleware(BodyLimit, limit=settings.max_body)
    return app


def _settle_refused(app: FastAPI, context: Context) -> None:
    """Settle the numbers of operations whose bodies are refused before a route sees them."""
    runs = context.runs

    def kind_of(path: str) -> str | None:
        return _KINDS.get(path.rpartition("/")[2])

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Any:
        message = failures.validation_message(error)
        kind = kind_of(request.url.path)
        if kind is not None:
            refusal = InvalidMessageError(message)
            address = address_in_json(error.body)
            try:
                owner = context.keys.owner(_key(request.scope))
                await refuse_unread(runs, owner, kind, address, refusal)
            except AuthenticationError as unknown:
                return failures.refusal(401, unknown.message, unknown.code)
            except RunError as later:  # it comes again, and is refused then
                return failures.run_refusal(later)
        return failures.refusal(422, message, InvalidMessageError.default_code)

    async def body_refused(scope: Scope) -> None:
        if kind_of(scope["path"]) is not None:
            try:
                owner = context.keys.owner(_key(scope))
            except AuthenticationError:
                return
            await runs.refused_without_number(owner)

    app.state.body_refused = body_refused


def _key(scope: Scope) -> str | None:
    headers = dict(scope["headers"])
    key = headers.get(b"x-api-key")
    return None if key is None else key.decode("latin-1")


async def _load_first(engines: Engines) -> None:
    """Load the first base model beside the first requests."""
    for name in engines.models[:1]:
        try:
            await engines[name].engine()
        except (Unavailable, EngineError):
            return  # the server stops, or the log has it
        except Exception:
            _log.exception("base model not loaded", model=name)
