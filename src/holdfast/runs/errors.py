"""What a run refuses or fails with, and which of it is the storage's or the catalog's.

RunError                 a definite answer: nothing was changed but what it says
└── Unavailable          not now: nothing was stored, the same request may be sent again
"""

from __future__ import annotations

from typing import Literal

from holdfast.engine.interface import EngineError
from holdfast.store import is_unavailable

Category = Literal["user", "server"]
Reason = Literal["invalid", "not_found", "forbidden", "conflict", "gone", "damaged", "unavailable"]


class RunError(Exception):
    """A refusal or a failure, in terms that a caller can act on.

    `code` is stable. `reason` tells the server how to answer when the failure is synchronous.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        reason: Reason = "invalid",
        category: Category = "user",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason: Reason = reason
        self.category: Category = category


class Unavailable(RunError):
    """The request was not taken and may be repeated unchanged."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message, reason="unavailable", category="server")


class Waiting(EngineError):
    """`found` keeps a recovery waiting, whatever it was that was asked."""

    def __init__(self, found: RunError | EngineError) -> None:
        super().__init__(found.code, found.message, found.category)
        self.found = found


def storage_failed(error: RunError | EngineError) -> bool:
    """Whether the storage or the catalog failed, so that the same may succeed later."""
    match error:
        case Waiting():
            return storage_failed(error.found)
        case RunError():
            return error.reason == "unavailable"
        case _:
            return is_unavailable(error.code)


def stopping() -> Unavailable:
    """The server is about to stop; the next one takes the request."""
    return Unavailable("stopping", "the server is stopping; send the request again")


def not_found(what: str, value: str, hint: str = "") -> RunError:
    """`what` of that `value` does not exist, or is not the caller's to know of."""
    return RunError(
        f"{what.replace(' ', '_')}_not_found",
        f"{what} {value!r} not found{hint}",
        reason="not_found",
    )
