"""Holdfast: a training service whose runs cannot be lost.

The client's names are resolved when they are first used, so `import holdfast` costs nothing that
is not needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast import errors as errors
    from holdfast.client import types as types
    from holdfast.client.futures import Future as Future
    from holdfast.client.http import RetryConfig as RetryConfig
    from holdfast.client.rest import RestClient as RestClient
    from holdfast.client.sampling import SamplingClient as SamplingClient
    from holdfast.client.schedule import CheckpointSchedule as CheckpointSchedule
    from holdfast.client.schedule import Resumed as Resumed
    from holdfast.client.schedule import resume_or_create as resume_or_create
    from holdfast.client.schedule import resume_or_create_async as resume_or_create_async
    from holdfast.client.service import ServiceClient as ServiceClient
    from holdfast.client.training import TrainingClient as TrainingClient
    from holdfast.client.types import AdamParams as AdamParams
    from holdfast.client.types import Datum as Datum
    from holdfast.client.types import ForwardBackwardOutput as ForwardBackwardOutput
    from holdfast.client.types import ModelInput as ModelInput
    from holdfast.client.types import SampleResponse as SampleResponse
    from holdfast.client.types import SamplingParams as SamplingParams
    from holdfast.client.types import TensorData as TensorData
    from holdfast.protocol.errors import HoldfastError as HoldfastError

_HOME = {
    "AdamParams": "holdfast.client.types",
    "CheckpointSchedule": "holdfast.client.schedule",
    "Datum": "holdfast.client.types",
    "ForwardBackwardOutput": "holdfast.client.types",
    "Future": "holdfast.client.futures",
    "HoldfastError": "holdfast.protocol.errors",
    "ModelInput": "holdfast.client.types",
    "RestClient": "holdfast.client.rest",
    "Resumed": "holdfast.client.schedule",
    "RetryConfig": "holdfast.client.http",
    "SampleResponse": "holdfast.client.types",
    "SamplingClient": "holdfast.client.sampling",
    "SamplingParams": "holdfast.client.types",
    "ServiceClient": "holdfast.client.service",
    "TensorData": "holdfast.client.types",
    "TrainingClient": "holdfast.client.training",
    "errors": "holdfast",
    "resume_or_create": "holdfast.client.schedule",
    "resume_or_create_async": "holdfast.client.schedule",
    "types": "holdfast.client",
}

__all__ = [
    "AdamParams",
    "CheckpointSchedule",
    "Datum",
    "ForwardBackwardOutput",
    "Future",
    "HoldfastError",
    "ModelInput",
    "RestClient",
    "Resumed",
    "RetryConfig",
    "SampleResponse",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "__version__",
    "errors",
    "resume_or_create",
    "resume_or_create_async",
    "types",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("types", "errors"):
        value: Any = importlib.import_module(f"{home}.{name}")
    else:
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
