"""One error tree, and one error for one failure however it arrives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from holdfast.protocol import errors
from holdfast.protocol.errors import (
    AuthenticationError,
    AwaitTimeoutError,
    ClosedError,
    ConflictError,
    HoldfastError,
    InvalidAnswerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    RequestError,
    ResultLostError,
    ServerFaultError,
    UnavailableError,
    error_from_body,
    failed_future_body,
    python_failed_future_body,
    refusal_body,
    try_again_body,
)

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, HoldfastError)
]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: dict[str, str | None] = {}
    trail: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if not name.endswith("Error"):
            continue
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 4
        del trail[depth:]
        drawn[name] = trail[-1] if trail else None
        trail.append(name)
    real = {
        cls.__name__: None if cls is HoldfastError else cls.__bases__[0].__name__ for cls in CLASSES
    }
    assert drawn == real


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_carries_its_fields(cls: type[HoldfastError]) -> None:
    error = cls("what happened", status=418, request_id="R")
    assert str(error) == error.message == "what happened"
    assert error.status == 418
    assert error.request_id == "R"
    assert error.code == cls.default_code
    assert error.category in ("user", "server", "unknown")
    assert isinstance(error.retryable, bool)


def test_codes_are_not_shared() -> None:
    codes = [cls.default_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


def test_a_timeout_is_a_timeout_error() -> None:
    assert issubclass(AwaitTimeoutError, TimeoutError)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("checkpoint_not_found", NotFoundError),
        ("checkpoint_exists", ConflictError),
        ("result_expired", ResultLostError),
        ("session_ended", ClosedError),
        ("model_unloaded", ClosedError),
        ("wrong_rank", RequestError),
    ],
)
def test_the_same_failure_is_the_same_error_on_submit_and_on_poll(
    code: str, cls: type[HoldfastError]
) -> None:
    found = [
        error_from_body(refusal_body("m", category="user", code=code), status=400),
        error_from_body(failed_future_body("m", category="user", code=code)),
        error_from_body(python_failed_future_body("m", category="user", code=code)),
    ]
    for error in found:
        assert type(error) is cls
        assert (error.message, error.code, error.category) == ("m", code, "user")
    assert found[0].status == 400


@pytest.mark.parametrize(
    ("status", "cls", "retryable"),
    [
        (400, RequestError, False),
        (401, AuthenticationError, False),
        (403, PermissionDeniedError, False),
        (404, NotFoundError, False),
        (409, ConflictError, False),
        (410, ResultLostError, False),
        (413, RequestError, False),
        (422, RequestError, False),
        (429, RateLimitedError, True),
        (500, ServerFaultError, False),
        (503, UnavailableError, True),
    ],
)
def test_a_status_alone_gives_the_class(
    status: int, cls: type[HoldfastError], retryable: bool
) -> None:
    error = error_from_body({"detail": "text of another server"}, status=status)
    assert type(error) is cls
    assert error.message == "text of another server"
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "text", "category": "User"}, "text"),
        ({"message": "m", "detail": "d"}, "m"),
        ({"detail": [{"loc": ["body", "x"], "msg": "wrong"}]}, '"loc"'),
        ({"error": {"message": "inner", "category": "server"}}, "inner"),
        ({"error": None}, "failed"),
        ("not an object", "failed"),
        (None, "failed"),
        ([1], "failed"),
        ({"error": 3, "category": 4, "code": []}, "failed"),
    ],
)
def test_bodies_of_any_server_give_an_error(body: Any, message: str) -> None:
    error = error_from_body(body)
    assert isinstance(error, HoldfastError)
    assert message in error.message


def test_a_failure_of_category_server_is_to_be_reported() -> None:
    error = error_from_body({"error": "disk", "category": "server"})
    assert type(error) is ServerFaultError
    assert not isinstance(error, InvalidAnswerError)


def test_the_failed_body_suits_both_client_families() -> None:
    body = failed_future_body("m", category="user", code="c")
    # The official Python client: `error` is there, `category` at the top, and no `type`.
    assert "error" in body
    assert body["category"] == "user"
    assert "type" not in body
    # Clients that match on status: a map with message and category.
    assert body["status"] == "failed"
    assert {"message", "category"} <= set(body["error"])


def test_pending_answers_have_every_key_that_clients_match_on() -> None:
    body = try_again_body("R", retry_after_ms=0)
    assert body == {
        "type": "try_again",
        "request_id": "R",
        "queue_state": "active",
        "retry_after_ms": 0,
    }
