"""The operations of one model: numbered and sent in the order of their calls, then awaited.

Any thread appends. One task sends, one operation after the other, and gives each its seq_id when
it is sent: what is called first has the lower number, and nothing that is dropped before sending
leaves a gap. Another task polls for results, the oldest first, since a model's operations finish
in order. So a model takes at most two connections, however much is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from holdfast.client.http import (
    JSON_TYPE,
    Answer,
    Patience,
    Server,
    connection_error,
    is_transient,
)
from holdfast.client.polling import is_failure, poll
from holdfast.protocol.errors import (
    ClosedError,
    ConnectionFailedError,
    HoldfastError,
    InvalidAnswerError,
    ResumeError,
    RetryLaterError,
    error_from_body,
)
from holdfast.protocol.futures import FutureHandle

log = logging.getLogger("holdfast.client")

SETTLING = frozenset({400, 403, 404, 413, 422})
"""Refusals after which the server counts the operation's number as used."""


@dataclass(eq=False)
class Operation:
    """One operation on its way."""

    path: str
    request_type: str
    build: Callable[[int], bytes]
    """The body for a seq_id. Runs in a worker thread."""
    read: Callable[[Answer], Any]
    """The result in an answer. Raises InvalidAnswerError."""
    result: asyncio.Future[Any]
    content_type: str = JSON_TYPE
    protobuf_result: bool = False
    ready: asyncio.Event | None = None
    """Unset while `build` is not known yet: this operation and all after it wait."""
    request_id: str | None = field(default=None, init=False)

    def error(self) -> BaseException | None:
        """Its error, if it has ended with one."""
        if not self.result.done() or self.result.cancelled():
            return None
        return self.result.exception()


class Outbox:
    """The operations of one model. Only `append` may be called from any thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock = threading.RLock()
        self._queue: deque[Operation] = deque()
        self._accepted: deque[Operation] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._poller: asyncio.Task[None] | None = None
        self._next_seq = 1
        self._ended: HoldfastError | None = None

    def append(self, *operations: Operation) -> None:
        """Take operations in; those of one call stay together."""
        self._server.runtime.check_process()
        with self._lock:
            self._queue.extend(operations)
        self._server.runtime.soon(self._wake)

    def outstanding(self) -> list[Operation]:
        """What was taken in and has not ended; on the loop's thread."""
        with self._lock:
            return [op for op in (*self._accepted, *self._queue) if not op.result.done()]

    def unsent(self) -> list[Operation]:
        """What the server has not confirmed to have taken in; on the loop's thread."""
        with self._lock:
            return list(self._queue)

    async def idle(self) -> None:
        """Wait until everything taken in so far has ended."""
        await ended(self.outstanding())

    def end(self, error: HoldfastError) -> None:
        """Fail what waits and what comes later; on the loop's thread."""
        if self._ended is not None:
            return
        self._ended = error
        for task in (self._sender, self._poller):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        for operation in self._accepted:
            _fail(operation, error)
        self._accepted.clear()
        self._fail_queue(error)

    def _fail_queue(self, error: HoldfastError) -> None:
        with self._lock:
            waiting = list(self._queue)
            self._queue.clear()
        for operation in waiting:
            _fail(operation, error)

    def _wake(self) -> None:
        if self._ended is not None:
            self._fail_queue(self._ended)
        elif self._queue and (self._sender is None or self._sender.done()):
            self._sender = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        while self._queue and self._ended is None:
            operation = self._queue[0]
            try:
                if operation.ready is not None:
                    await operation.ready.wait()
                answer = await self._send(operation)
            except HoldfastError as error:
                self._take(operation)
                _fail(operation, error)
                if error.status not in SETTLING:
                    self._break_off(operation, error)
                continue
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # A body that cannot be built: nothing was sent, no number used.
                self._take(operation)
                _fail(operation, error)
                if operation.request_type == "ForwardBackward":
                    self._break_off(operation, error)
                continue
            self._take(operation)
            self._place(operation, answer)

    def _take(self, operation: Operation) -> None:
        with self._lock:
            if self._queue and self._queue[0] is operation:
                self._queue.popleft()

    def _break_off(self, operation: Operation, cause: Exception) -> None:
        """What follows an operation of unknown fate must not run as if it had been applied."""
        reason = cause.message if isinstance(cause, HoldfastError) else repr(cause)
        self.end(
            ResumeError(
                f"an earlier {operation.path} was not taken in by the server ({reason}), so this"
                " model's later operations are not sent: make a training client from the last"
                " checkpoint and go on from there",
                code="sequence_broken",
            )
        )

    async def _send(self, operation: Operation) -> Answer:
        seq = self._next_seq
        content = await asyncio.to_thread(operation.build, seq)
        patience = Patience(self._server.retry)
        headers = {
            "content-type": operation.content_type,
            "x-idempotency-key": uuid.uuid4().hex,
        }
        while True:
            answer: Answer | None = None
            try:
                answer = await self._server.once(
                    "POST", operation.path, content=content, headers=headers
                )
                if answer.status < 300:
                    answer.json()
                    self._next_seq = seq + 1
                    return answer
                failure = answer.error()
                if not is_transient(answer):
                    if answer.status in SETTLING:
                        self._next_seq = seq + 1
                    raise failure
            except InvalidAnswerError as error:
                # Cut short on its way: sent again under the same number, it is answered again.
                failure = error
            except httpx2.TransportError as error:
                failure = connection_error(error, f"{operation.path} (seq_id {seq})")
            delay = patience.delay(answer)
            if delay is None:
                failure.message += (
                    f"; it may or may not have been accepted, after trying for"
                    f" {self._server.retry.give_up_after:.0f} s"
                )
                failure.args = (failure.message,)
                raise failure
            log.debug("%s %d: %s; again in %.2f s", operation.path, seq, failure.message, delay)
            await asyncio.sleep(delay)

    def _place(self, operation: Operation, answer: Answer) -> None:
        try:
            self._place_answer(operation, answer)
        except InvalidAnswerError as error:
            # Accepted perhaps, and there is nothing by which to ask what became of it.
            _fail(operation, error)
            self._break_off(operation, error)

    def _place_answer(self, operation: Operation, answer: Answer) -> None:
        """Raises InvalidAnswerError for an answer that is no handle, no failure and no result."""
        body = answer.json()
        if isinstance(body, dict) and "request_id" in body and "type" not in body:
            operation.request_id = answer.read(FutureHandle).request_id
            self._accepted.append(operation)
            if self._poller is None or self._poller.done():
                self._poller = asyncio.create_task(self._poll_all())
        elif isinstance(body, dict) and is_failure(body):
            _fail(operation, error_from_body(body))
        else:
            # The result itself, as some servers answer short operations.
            _settle(operation, operation.read(answer))

    async def _poll_all(self) -> None:
        while self._accepted:
            operation = self._accepted[0]
            assert operation.request_id is not None
            polling = asyncio.create_task(
                poll(
                    self._server,
                    operation.request_id,
                    operation.request_type,
                    operation.read,
                    protobuf=operation.protobuf_result,
                    lane="poll",
                )
            )
            try:
                # Whoever gives up waiting ends the polling too: it holds up the next one's.
                await asyncio.wait({polling, operation.result}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not polling.done():
                    polling.cancel()
            if self._accepted and self._accepted[0] is operation:
                self._accepted.popleft()
            if operation.result.done():
                await asyncio.gather(polling, return_exceptions=True)
                continue
            failure = polling.exception()
            if failure is None:
                _settle(operation, polling.result())
            else:
                _fail(operation, failure)
                if isinstance(failure, ConnectionFailedError | RetryLaterError):
                    # The others would each wait as long for the same server.
                    while self._accepted:
                        _fail(self._accepted.popleft(), failure)


async def ended(operations: Sequence[Operation]) -> None:
    """Wait until operations have a result or an error."""
    if operations:
        await asyncio.wait([operation.result for operation in operations])


def closed(what: str) -> ClosedError:
    return ClosedError(f"this {what} is closed: make a new one")


def _settle(operation: Operation, result: object) -> None:
    if not operation.result.done():
        operation.result.set_result(result)


def _fail(operation: Operation, error: BaseException) -> None:
    if not operation.result.done():
        operation.result.set_exception(error)
        # Read here: a caller who dropped the future is not warned about it.
        operation.result.exception()


def new_result(loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    return asyncio.Future(loop=loop)
