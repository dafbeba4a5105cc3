"""Bodies of submitting and of retrieving a future."""

from __future__ import annotations

from typing import Literal

from holdfast.protocol.bodies import Body, Counter, Id


class FutureHandle(Body):
    """What a submission answers."""

    request_id: Id
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None
    """One id for each sample asked for."""


class RetrieveFutureRequest(Body):
    request_id: Id
    allow_metadata_only: bool = False


class TryAgainResponse(Body):
    """Still pending."""

    request_id: str | None = None
    type: Literal["try_again"] = "try_again"
    queue_state: str = "active"
    queue_state_reason: str | None = None
    retry_after_ms: int | None = None


class FutureMetadataResponse(Body):
    """Done; the result itself is given when it is asked for without allow_metadata_only."""

    status: Literal["complete_metadata"] = "complete_metadata"
    response_payload_size: Counter


class CancelFutureRequest(Body):
    request_id: Id
