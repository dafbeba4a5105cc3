"""A session: made at first use, kept alive while its client lives, finished on close.

Finishing is a courtesy, which a client that ends does not wait for long: a session that is not
finished ends at the server by itself, some time after the last sign of life, and so do its models.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import quote

import httpx2

from holdfast.client.http import JSON_TYPE, VERSION, RetryConfig, Server
from holdfast.client.outbox import Outbox, closed, ended
from holdfast.protocol.errors import ConnectionFailedError, HoldfastError
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
_END_SECONDS = 10.0
_END_SECONDS_AFTER_ERROR = 3.0


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
        self._outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
        self._closing: asyncio.Task[None] | None = None
        self._ended = False
        self._models = itertools.count()
        self._samplers = itertools.count()

    async def id(self) -> str:
        """The session's id; the first call makes the session, calls beside it wait for it."""
        if self._id is None and not self.closed:
            if self._creating is None or self._creating.done():
                self._creating = asyncio.create_task(self._create())
            await asyncio.shield(self._creating)
        if self.closed or self._id is None:
            raise closed("ServiceClient")
        return self._id

    async def _create(self) -> None:
        try:
            self.config = await read_config(self.server)
        except ConnectionFailedError as error:
            error.message += (
                "; is a server running there? Another one is named with base_url, or"
                " HOLDFAST_BASE_URL"
            )
            error.args = (error.message,)
            raise
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

    def outbox(self) -> Outbox:
        """The operations of one more model of this session; on the loop's thread."""
        made = Outbox(self.server)
        self._outboxes.add(made)
        return made

    def next_model(self) -> int:
        """The next number for a model of this session; from any thread."""
        return next(self._models)

    def next_sampler(self) -> int:
        """The next number for a sampling session; from any thread."""
        return next(self._samplers)

    async def close(self, status: SessionEnd, detail: str | None) -> None:
        """End the session. Idempotent, and never fails.

        After success what was called before is waited for; else it is given up, also by a call
        that comes while another one waits.
        """
        self.closed = True
        if status != "success":
            await self._end(status, detail)
        elif self._closing is None:
            self._closing = asyncio.create_task(self._close(detail))
        if self._closing is not None:
            await asyncio.wait({self._closing})

    async def _close(self, detail: str | None) -> None:
        await self._finish_operations()
        await self._end("success", detail)

    async def _finish_operations(self) -> None:
        operations = [op for outbox in self._outboxes for op in outbox.outstanding()]
        await ended(operations)
        failed = [op for op in operations if op.error() is not None]
        if failed and not self._ended:
            log.error(
                "%d operations that were under way when the client was closed have failed; the"
                " first of them, %s: %s",
                len(failed),
                failed[0].path,
                failed[0].error(),
            )

    async def _end(self, status: SessionEnd, detail: str | None) -> None:
        if self._ended:
            return
        self._ended = True
        for outbox in self._outboxes:
            outbox.end(closed("ServiceClient"))

        async def finish(server: Server) -> None:
            if self._creating is not None:
                # One that is being made right now has to be ended as well.
                await asyncio.wait({self._creating})
            if self._id is not None:
                await server.call(
                    "POST",
                    f"sessions/{quote(self._id, safe=':')}/finish",
                    FinishSessionRequest(reason=FinishReason(type=status), detail=detail),
                    accept=frozenset({404, 405, 410}),
                )

        try:
            what = "the session" if self._id is None else f"session {self._id}"
            await tell_end(self.server, what, finish, after_error=status != "success")
        finally:
            self._forget_exit()
            for task in (self._creating, self._heartbeat):
                if task is not None:
                    task.cancel()

    async def _finish_at_exit(self) -> None:
        failed = getattr(sys, "last_value", None)
        if failed is None:
            status: SessionEnd = "success"
        else:
            status = "interrupted" if isinstance(failed, KeyboardInterrupt) else "errored"
        try:
            await self.close(status, "the process ended without closing its client")
        except asyncio.CancelledError:  # the time is over
            lost = [operation for outbox in self._outboxes for operation in outbox.unsent()]
            if lost:
                log.warning(
                    "the process ends before the server has confirmed %d operations, which may be"
                    " lost; the first of them: %s. Wait for the futures, or make the client in a"
                    " `with` block, which does",
                    len(lost),
                    lost[0].path,
                )
            raise


async def tell_end(
    server: Server,
    what: str,
    tell: Callable[[Server], Awaitable[object]],
    *,
    after_error: bool,
) -> None:
    """Tell the server that something is over: for some seconds, and once after an error.

    Never fails. A server that is gone is named in the log; after an error, which tells of it
    already, for whoever asks for the details alone.
    """
    seconds = _END_SECONDS_AFTER_ERROR if after_error else _END_SECONDS
    try:
        async with asyncio.timeout(seconds):
            await tell(server.with_retry(RetryConfig(give_up_after=0.0)) if after_error else server)
    except (HoldfastError, TimeoutError) as error:
        log.log(
            logging.INFO if after_error else logging.WARNING,
            "%s was not ended at the server (%s): it ends there by itself after some time without a"
            " sign of life",
            what,
            str(error) or f"no answer within {seconds:.0f} s",
        )


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
