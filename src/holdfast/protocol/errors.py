"""Errors, grouped by what a caller does about them, and their bodies on the wire.

HoldfastError
├── RequestError (ValueError)      fix the request; repeating it as it is fails again
│   ├── AuthenticationError        the API key is missing or not known
│   ├── PermissionDeniedError      the key may not do this
│   ├── NotFoundError              no such run, checkpoint, session or model
│   ├── ConflictError              the name is taken, or the state does not allow it
│   ├── InvalidPathError           not a tinker:// path, or of the wrong kind
│   ├── InvalidNameError           not a checkpoint name
│   ├── InvalidTensorError         sizes, indices or dtype of a tensor do not fit together
│   └── InvalidMessageError        bytes that are not the message, or a JSON body of another form
├── RetryLaterError                the same call may succeed later; nothing was done
│   ├── RateLimitedError           too many requests
│   └── UnavailableError           the server cannot serve now
├── ResumeError                    reconnect, or resume from a checkpoint
│   ├── ConnectionFailedError      no answer; what was sent may or may not have been accepted
│   ├── AwaitTimeoutError (TimeoutError)   the wait ended; the operation may still finish
│   ├── OperationCancelledError    the wait was cancelled; the operation may still finish
│   ├── ResultLostError            it was accepted, and its result is no longer kept
│   └── ClosedError                the client, the model or the session has ended
└── ServerFaultError               report it: a defect, or a disk or device that broke
    └── InvalidAnswerError         an answer outside of the protocol
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class HoldfastError(Exception):
    """The base of every error that this project raises for its callers.

    `code` is stable and for programs, `message` is for people. `status` is the HTTP status when one
    was answered, `request_id` names the future it belongs to. `retryable` says whether repeating
    the same call, unchanged, can succeed.
    """

    default_code: ClassVar[str] = "error"
    default_category: ClassVar[Category] = "unknown"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        category: Category | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.category: Category = self.default_category if category is None else category
        self.status = status
        self.request_id = request_id
        self.retryable = self.default_retryable if retryable is None else retryable


class RequestError(HoldfastError, ValueError):
    default_code = "invalid_request"
    default_category = "user"


class AuthenticationError(RequestError):
    default_code = "unauthenticated"


class PermissionDeniedError(RequestError):
    default_code = "permission_denied"


class NotFoundError(RequestError):
    default_code = "not_found"


class ConflictError(RequestError):
    default_code = "conflict"


class InvalidPathError(RequestError):
    default_code = "invalid_path"


class InvalidNameError(RequestError):
    default_code = "invalid_name"


class InvalidTensorError(RequestError):
    default_code = "invalid_tensor"


class InvalidMessageError(RequestError):
    default_code = "invalid_message"


class RetryLaterError(HoldfastError):
    default_code = "retry_later"
    default_category = "server"
    default_retryable = True


class RateLimitedError(RetryLaterError):
    default_code = "rate_limited"


class UnavailableError(RetryLaterError):
    default_code = "unavailable"


class ResumeError(HoldfastError):
    default_code = "interrupted"
    default_category: ClassVar[Category] = "server"


class ConnectionFailedError(ResumeError):
    default_code = "connection_failed"
    default_retryable = True


class AwaitTimeoutError(ResumeError, TimeoutError):
    default_code = "await_timeout"
    default_category = "user"


class OperationCancelledError(ResumeError):
    default_code = "cancelled"
    default_category = "user"


class ResultLostError(ResumeError):
    default_code = "result_expired"


class ClosedError(ResumeError):
    default_code = "closed"
    default_category = "user"


class ServerFaultError(HoldfastError):
    default_code = "server_fault"
    default_category = "server"


class InvalidAnswerError(ServerFaultError):
    default_code = "invalid_answer"


_BY_STATUS: Mapping[int, type[HoldfastError]] = {
    401: AuthenticationError,
    402: RetryLaterError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: UnavailableError,
    409: ConflictError,
    410: ResultLostError,
    425: UnavailableError,
    429: RateLimitedError,
    500: ServerFaultError,
    501: ServerFaultError,
}

_BY_CODE: Mapping[str, type[HoldfastError]] = {
    kind.default_code: kind
    for kind in (
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        InvalidPathError,
        InvalidNameError,
        InvalidTensorError,
        InvalidMessageError,
        RateLimitedError,
        UnavailableError,
        ResultLostError,
        ClosedError,
    )
}
_BY_CODE_ENDING: Mapping[str, type[HoldfastError]] = {
    "not_found": NotFoundError,
    "unknown": NotFoundError,
    "_exists": ConflictError,
    "_expired": ResultLostError,
    "session_ended": ClosedError,
    "unloaded": ClosedError,
}


def error_for(
    message: str,
    *,
    status: int | None = None,
    code: str | None = None,
    category: str | None = None,
    request_id: str | None = None,
) -> HoldfastError:
    """The error for an answer: the same failure gives the same class, however it arrived.

    The code decides first, then the HTTP status, then the category (of a failed future).
    """
    kind: type[HoldfastError] | None = None
    if code is not None:
        kind = _BY_CODE.get(code) or next(
            (found for end, found in _BY_CODE_ENDING.items() if code.endswith(end)), None
        )
    if kind is None and status is not None and status >= 400:
        kind = _BY_STATUS.get(status, RequestError if status < 500 else UnavailableError)
    if kind is None:
        kind = RequestError if category == "user" else ServerFaultError
    known: Category | None = category if category in ("user", "server") else None  # type: ignore[assignment]
    return kind(message, code=code, category=known, status=status, request_id=request_id)


def error_from_body(
    body: object, *, status: int | None = None, request_id: str | None = None
) -> HoldfastError:
    """The error in a refusal's body or in a failed future's, whatever server wrote it.

    Understood: `message`, `error` (text, or a map with `message`, `category`, `code`), `detail`
    (text or a list of validation errors), `category`, `code`.
    """
    outer = body if isinstance(body, Mapping) else {}
    inner = outer.get("error")
    inner = inner if isinstance(inner, Mapping) else {}

    def text(key: str) -> str | None:
        for source in (inner, outer):
            value = source.get(key)
            if isinstance(value, str) and value:
                return value
        return None

    message = text("message") or text("error")
    if message is None:
        detail = outer.get("detail")
        if isinstance(detail, str) and detail:
            message = detail
        elif detail:
            message = json.dumps(detail, default=str)[:2000]
    if message is None:
        message = f"HTTP {status}" if status is not None else "the operation failed"
    category = text("category")
    return error_for(
        message,
        status=status,
        code=text("code"),
        category=category.lower() if category else None,
        request_id=text("request_id") or request_id,
    )


def refusal_body(message: str, *, category: Category, code: str) -> dict[str, Any]:
    """The JSON body of a 4xx or 5xx answer, with the keys that each client family looks for."""
    return {
        "detail": message,
        "message": message,
        "error": message,
        "category": category,
        "code": code,
    }


def failed_future_body(message: str, *, category: Category, code: str) -> dict[str, Any]:
    """The answer for a failed future that every client family understands.

    The official Python client shows the whole inner map as the error's text; where the user agent
    tells, `python_failed_future_body` reads better. Clients that take a map keep polling unless
    the category is `user`.
    """
    return {
        "status": "failed",
        "error": {"message": message, "category": category, "code": code},
        "category": category,
        "code": code,
    }


def python_failed_future_body(message: str, *, category: Category, code: str) -> dict[str, Any]:
    """The answer for a failed future to the official Python client: `error` is the text."""
    return {"error": message, "category": category, "code": code}


def try_again_body(
    request_id: str,
    *,
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active",
    reason: str | None = None,
    retry_after_ms: int | None = None,
) -> dict[str, Any]:
    """The answer for a future that is still pending after a held poll.

    The official client polls again at once; `retry_after_ms` is obeyed by clients that know it.
    """
    body: dict[str, Any] = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": queue_state,
    }
    if reason is not None:
        body["queue_state_reason"] = reason
    if retry_after_ms is not None:
        body["retry_after_ms"] = retry_after_ms
    return body
