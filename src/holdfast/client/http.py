"""One server: requests with retries, and answers turned into errors."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel

from holdfast.client.runtime import Lane, Runtime
from holdfast.protocol.bodies import Body, check_body, read_json
from holdfast.protocol.errors import (
    ConnectionFailedError,
    HoldfastError,
    InvalidAnswerError,
    InvalidMessageError,
    error_from_body,
)

log = logging.getLogger("holdfast.client")

B = TypeVar("B", bound=BaseModel)

VERSION = "0.1.0"
JSON_TYPE = "application/json"
PROTOBUF_TYPE = "application/x-protobuf"
_LONGEST_RETRY_AFTER = 60.0
_FIRST_CONTACT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """How long a server that cannot be reached, or cannot serve, is asked again.

    Waits double from `first_delay` to `max_delay` seconds, shortened by up to a quarter at random;
    a Retry-After of the server goes before. After `give_up_after` seconds of nothing but failures
    the operation's future fails. The server may restart in that time without the caller noticing.
    """

    give_up_after: float = 900.0
    first_delay: float = 0.25
    max_delay: float = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def is_protobuf(self) -> bool:
        return PROTOBUF_TYPE in self.headers.get("content-type", "")

    def json(self) -> Any:
        """The body as JSON; an empty one is an empty object. Raises InvalidAnswerError."""
        if not self.content.strip():
            return {}
        try:
            return read_json(self.content)
        except InvalidMessageError as error:
            raise InvalidAnswerError(
                f"the server's answer cannot be read: {error.message}", status=self.status
            ) from None

    def read(self, model: type[B]) -> B:
        """The body in this form. Raises InvalidAnswerError."""
        return read_as(model, self.json(), self.status)

    def error(self, request_id: str | None = None) -> HoldfastError:
        try:
            body = self.json()
        except InvalidAnswerError:
            body = None
        return error_from_body(body, status=self.status, request_id=request_id)


def read_as(model: type[B], body: object, status: int | None = None) -> B:
    """Parsed JSON in this form. Raises InvalidAnswerError."""
    try:
        return check_body(model, body)
    except InvalidMessageError as error:
        raise InvalidAnswerError(
            f"the server's answer is not a {model.__name__}: {error.message}", status=status
        ) from None


class Patience:
    """Counts the failures in a row of one call and says how long to wait, or that it is enough."""

    def __init__(self, config: RetryConfig, give_up_after: float | None = None) -> None:
        self._config = config
        self._give_up_after = config.give_up_after if give_up_after is None else give_up_after
        self._since: float | None = None
        self._failures = 0

    def reset(self) -> None:
        self._since = None
        self._failures = 0

    def delay(self, answer: Answer | None = None) -> float | None:
        """Seconds to wait after one more failure; None: give up."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if now - self._since >= self._give_up_after:
            return None
        wanted = _retry_after(answer) if answer is not None else None
        if wanted is None:
            doubled = self._config.first_delay * 2 ** min(self._failures, 30)
            wanted = min(doubled, self._config.max_delay) * (1 - random.random() / 4)
        self._failures += 1
        return wanted


class Server:
    """A server's address and credentials. Its methods run on the runtime's loop."""

    def __init__(
        self,
        runtime: Runtime,
        base_url: str,
        headers: Mapping[str, str],
        retry: RetryConfig,
    ) -> None:
        self.runtime = runtime
        self.base_url = base_url.rstrip("/")
        self.retry = retry
        self._reached = False
        self.headers = {"user-agent": f"Holdfast/Python {VERSION}", **headers}

    def with_retry(self, retry: RetryConfig) -> Server:
        """The same server, asked with other patience."""
        return Server(self.runtime, self.base_url, self.headers, retry)

    def with_key(self, api_key: str) -> Server:
        """The same server, asked with another key."""
        headers = {**self.headers, "x-api-key": api_key}
        return Server(self.runtime, self.base_url, headers, self.retry)

    def url(self, path: str) -> str:
        return f"{self.base_url}/api/v1/{path}"

    async def call(
        self,
        method: str,
        path: str,
        body: Body | Mapping[str, Any] | None = None,
        *,
        content: bytes | None = None,
        content_type: str = JSON_TYPE,
        params: Mapping[str, Any] | None = None,
        extra_headers: Mapping[str, str] | None = None,
        accept: frozenset[int] = frozenset(),
    ) -> Answer:
        """One request of the submit lane, repeated with its idempotency key until it is answered.

        Returns a 2xx answer, or one of the statuses in `accept`. Raises the error of a definite
        refusal at once; ConnectionFailedError, or the last answer's error, when it is enough.
        """
        headers = {"x-idempotency-key": uuid.uuid4().hex} if method != "GET" else {}
        headers |= extra_headers or {}
        if content is None and body is not None:
            fields = body.to_json() if isinstance(body, Body) else body
            content = json.dumps(fields).encode()
        if content is not None:
            headers["content-type"] = content_type
        # A wrong address is not waited for as a server is that was there and may come back.
        first = None if self._reached else min(_FIRST_CONTACT_SECONDS, self.retry.give_up_after)
        patience = Patience(self.retry, first)
        while True:
            answer: Answer | None = None
            try:
                answer = await self.once(
                    method, path, content=content, headers=headers, params=params
                )
                if answer.status < 300 or answer.status in accept:
                    return answer
                if not is_transient(answer):
                    raise answer.error()
                failure: HoldfastError = answer.error()
            except httpx2.TransportError as error:
                failure = connection_error(error, path)
            delay = patience.delay(answer)
            if delay is None:
                raise failure
            log.debug("%s %s: %s; again in %.2f s", method, path, failure.message, delay)
            await asyncio.sleep(delay)

    async def once(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        lane: Lane = "submit",
        timeout: float = 60.0,
    ) -> Answer:
        """One request and its whole answer. Raises httpx2.TransportError."""
        response = await self.runtime.lane(lane).request(
            method,
            self.url(path),
            content=content,
            headers={"accept": JSON_TYPE, **self.headers, **(headers or {})},
            params=dict(params) if params else None,
            timeout=httpx2.Timeout(timeout, connect=10.0, pool=None),
        )
        self._reached = True
        return Answer(response.status_code, response.headers, response.content)


def is_transient(answer: Answer) -> bool:
    """Whether the same request may be answered otherwise later."""
    said = answer.headers.get("x-should-retry")
    if said in ("true", "false"):
        return said == "true"
    return answer.status in (408, 425, 429) or (answer.status >= 500 and answer.status != 501)


def connection_error(error: httpx2.TransportError, path: str) -> ConnectionFailedError:
    what = str(error) or type(error).__name__
    try:
        where = f" from {error.request.url.copy_with(path='/', query=None)}"
    except RuntimeError:
        where = ""
    return ConnectionFailedError(f"no answer to {path}{where}: {what}")


def _retry_after(answer: Answer) -> float | None:
    for header, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(answer.headers[header]) * scale
        except (KeyError, ValueError):
            continue
        if 0 <= seconds <= _LONGEST_RETRY_AFTER:
            return seconds
    return None
