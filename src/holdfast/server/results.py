"""Outcomes of operations as the wire's results."""

from __future__ import annotations

import json
import math
from typing import Any

from holdfast.runs import bodies
from holdfast.runs.journal import Outcome
from holdfast.server.translate import batch_result, sample_result


def protobuf_result(outcome: Outcome) -> bytes:
    """The result of a forward, forward_backward or sample."""
    assert outcome.result is not None
    if outcome.kind == "sample":
        return sample_result(outcome.result).to_protobuf()
    return batch_result(outcome.result).to_protobuf()


def json_result(outcome: Outcome, request_id: str) -> dict[str, Any]:
    """Any result as JSON. Each has a `type`, without which some clients do not see a result."""
    assert outcome.result is not None
    match outcome.kind:
        case "sample":
            return {**sample_result(outcome.result).to_json(), "type": "sample"}
        case bodies.FORWARD | bodies.FORWARD_BACKWARD:
            return batch_result(outcome.result).to_json()
        case bodies.OPTIM_STEP:
            metrics = json.loads(outcome.result)
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            return {"type": "optim_step", "metrics": finite}
        case bodies.CREATE:
            return {"type": "create_model", "model_id": _model_id(request_id)}
        case bodies.CREATE_FROM_STATE:
            result = json.loads(outcome.result)
            return {**result, "type": "load_weights", "model_id": _model_id(request_id)}
        case _:
            return {**json.loads(outcome.result), "type": outcome.kind}


def _model_id(request_id: str) -> str:
    stem = request_id.rpartition(":")[0]
    model_id, generation, _ = stem.rpartition(":g")
    return model_id if generation else stem
