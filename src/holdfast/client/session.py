"""A session: made at first use, kept alive while its client lives, finished on close."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from urllib.parse import quote

import httpx2

from holdfast.client.http import JSON_TYPE, VERSION, Server
from holdfast.protocol.errors import ClosedError
from holdfast.protocol.sessions import (
    ClientConfigResponse,
    CreateSessionRequest,
    CreateSessionResponse,
    FinishReason,
    FinishSessionRequest,
    SessionEnd,
    SessionHeartbeatRequest,
)

log = logging.getLogger("holdfast.client")

_HEARTBEAT_SECONDS = 10.0
_HEARTBEAT_TIMEOUT = 10.0
_WARN_AFTER = 120.0


class Session:
    """One session at one server. Its coroutines run on the runtime's loop."""

    def __init__(
        self,
        server: Server,
        *,
        tags: Sequence[str],
        user_metadata: dict[str, str] | None,
        project_id: str | None,
        display_name: str | None,
    ) -> None:
        self.server = server
        self.config = ClientConfigResponse()
        self.closed = False
        self._request = CreateSessionRequest(
            tags=list(tags),
            user_metadata=user_metadata,
            project_id=project_id,
            display_name=display_name,
            sdk_version=f"holdfast-{VERSION}",
        )
        self._id: str | None = None
        self._creating: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._forget_exit: Callable[[], None] = lambda: None
        self._models = itertools.count()
        self._samplers = itertools.count()

    async def id(self) -> str:
        """The session's id; the first call makes the session, calls beside it wait for it."""
        if self._id is None and not self.closed:
            if self._creating is None or self._creating.done():
                self._creating = asyncio.create_task(self._create())
            await asyncio.shield(self._creating)
        if self.closed or self._id is None:
            raise ClosedError("this ServiceClient is closed: make a new one")
        return self._id

    async def _create(self) -> None:
        self.config = await read_config(self.server)
        answer = await self.server.call("POST", "create_session", self._request)
        created = answer.read(CreateSessionResponse)
        for level, text in (
            (logging.INFO, created.info_message),
            (logging.WARNING, created.warning_message),
            (logging.ERROR, created.error_message),
        ):
            if text:
                log.log(level, "%s", text)
        self._id = created.session_id
        self._heartbeat = asyncio.create_task(_beat(weakref.ref(self), self.server, self._id))
        alive = weakref.ref(self)

        async def finish() -> None:
            session = alive()
            if session is not None:
                await session._finish_at_exit()

        self._forget_exit = self.server.runtime.at_exit(finish)

    def next_model(self) -> int:
        """The next number for a model of this session; from any thread."""
        return next(self._models)

    def next_sampler(self) -> int:
        """The next number for a sampling session; from any thread."""
        return next(self._samplers)

    async def close(self, status: SessionEnd, detail: str | None) -> None:
        """Stop the heartbeat and tell the server. Idempotent; a server without the call is fine."""
        if self.closed:
            return
        self.closed = True
        if self._creating is not None:
            # One that is being made right now has to be ended as well.
            await asyncio.wait({self._creating})
        self._forget_exit()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._id is None:
            return
        request = FinishSessionRequest(reason=FinishReason(type=status), detail=detail)
        await self.server.call(
            "POST",
            f"sessions/{quote(self._id, safe=':')}/finish",
            request,
            accept=frozenset({404, 405, 410}),
        )

    async def _finish_at_exit(self) -> None:
        failed = getattr(sys, "last_value", None)
        if failed is None:
            status: SessionEnd = "success"
        else:
            status = "interrupted" if isinstance(failed, KeyboardInterrupt) else "errored"
        await self.close(status, "the process ended without closing its client")


async def read_config(server: Server) -> ClientConfigResponse:
    """The server's switches; a server that has none gives the defaults."""
    answer = await server.call(
        "POST",
        "client/config",
        {"sdk_version": f"holdfast-{VERSION}"},
        accept=frozenset({404, 405}),
    )
    return answer.read(ClientConfigResponse) if answer.status < 300 else ClientConfigResponse()


async def _beat(session: weakref.ref[Session], server: Server, session_id: str) -> None:
    """Beat while the session object lives; hold no reference to it in between."""
    content = json.dumps(SessionHeartbeatRequest(session_id=session_id).to_json()).encode()
    last_success = time.monotonic()
    warned = False
    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        if session() is None:
            return
        try:
            answer = await server.once(
                "POST",
                "session_heartbeat",
                content=content,
                headers={"content-type": JSON_TYPE},
                timeout=_HEARTBEAT_TIMEOUT,
            )
        except httpx2.TransportError as error:
            problem = str(error) or type(error).__name__
        else:
            if answer.status < 300:
                last_success = time.monotonic()
                warned = False
                continue
            if answer.status == 410:
                log.error("session %s has ended at the server; its models are gone", session_id)
                return
            problem = answer.error().message
        silent = time.monotonic() - last_success
        if silent > _WARN_AFTER and not warned:
            log.warning("no heartbeat got through for %.0f s: %s", silent, problem)
            warned = True
