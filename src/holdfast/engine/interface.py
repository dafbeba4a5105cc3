"""The one interface between runs and the engine that trains them.

Nothing here imports torch: `holdfast.runs` and the API process use these types, a worker process
(or, across machines, an actor) does the work. Requests of one run are executed in the order in
which the methods are called; several runs may be interleaved. Bodies and results travel as bytes,
see `holdfast.engine.payload`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from holdfast.store.model import Blob
from holdfast.store.model import Incomplete as Incomplete
from holdfast.store.model import LoraConfig as LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER_STATE = "optimizer.safetensors"

Category = Literal["user", "server"]


class EngineError(Exception):
    """An operation that failed. It changed nothing, apart from marks that its method names.

    `code` is stable, `message` is for people: it names the value and what would be right.
    """

    def __init__(self, code: str, message: str, category: Category = "user") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.category: Category = category


class StateLost(Exception):
    """A run's state is gone from the worker, which has to end: another one brings it back.

    A change of it broke off half way, or the device failed under it.
    """


class WorkerDied(Exception):
    """The worker process ended before it answered. The operation may be sent again to a new one."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that decides a run's initial state."""

    base_model: str
    lora: LoraConfig
    optimizer: str = "adamw"


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One step's parameters, with the defaults of the wire (`weight_decay` is decoupled).

    `grad_clip_norm` 0 means no clipping, else the global norm that gradients are clipped to.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """A base model as the worker loaded it."""

    name: str
    """The name that clients use."""
    revision: str
    """blake3 over the model's files: what a checkpoint records and a load compares."""
    architecture: str
    vocab_size: int
    max_sequence_length: int
    tokenizer_id: str | None
    """An id that a client's machine can load, never a path of this machine."""
    fingerprint: Mapping[str, str | int | float | bool]
    """Versions, device, dtype, threads, token budget: where it agrees, steps are bit-identical."""


@dataclass(frozen=True, slots=True)
class StateInfo:
    """Where a run's training state stands; goes into manifests and load results."""

    config: RunConfig
    step: int
    """optim_steps applied."""
    pending_forward_backwards: int
    """forward_backwards accumulated and not applied yet."""
    incomplete: Incomplete | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """A state written durably: its blobs, and where the run stood when it was copied."""

    state: StateInfo
    files: Mapping[str, Blob] = field(default_factory=dict)


class Capture(Protocol):
    """A state copied to host memory; hashing and writing go on beside the training."""

    state: StateInfo

    async def written(self) -> Captured:
        """Wait until every blob is durable. Raises EngineError (disk full, …) or WorkerDied."""
        ...


class Engine(Protocol):
    """One base model and the runs that train adapters on it.

    Every method raises EngineError for a definite failure and WorkerDied when the worker is gone.
    """

    async def ready(self) -> BaseModelInfo:
        """Wait for the base model to be loaded. Raises EngineError when it cannot be."""
        ...

    async def create(self, run: str, config: RunConfig) -> StateInfo:
        """Initialise a run: LoRA weights from the seed, cold optimizer. Replaces one of that id."""
        ...

    async def restore(
        self, run: str, config: RunConfig, files: Mapping[str, Blob], *, optimizer: bool
    ) -> StateInfo:
        """Set a run's whole state from a checkpoint's files, creating the run if need be.

        Weights only (`optimizer=False`): a cold optimizer, no gradients, step 0, no mark. With the
        optimizer: weights, moments, steps, gradients and mark as captured; fails without
        optimizer state among the files. On failure the run is what it was before.
        """
        ...

    async def forward(self, run: str, seq: int, batch: bytes) -> bytes:
        """Log-probabilities and loss of a batch; state unchanged."""
        ...

    async def forward_backward(self, run: str, seq: int, batch: bytes) -> bytes:
        """Accumulate a batch's gradients. A failure sets the incomplete mark with `seq`."""
        ...

    async def mark_incomplete(self, run: str, seq: int, message: str) -> None:
        """Set the mark for a forward_backward that never reached the engine (refused, skipped)."""
        ...

    async def optim_step(self, run: str, params: AdamParams) -> dict[str, float]:
        """Apply the accumulated gradients and clear them; metrics of the step.

        Fails with the mark's message when the mark is set, and then clears gradients and mark.
        """
        ...

    async def capture(self, run: str, *, optimizer: bool = True) -> Capture:
        """Copy the run's state to host memory and begin to write it to the store."""
        ...

    async def sample(self, adapter: Mapping[str, Blob] | None, request: bytes) -> bytes:
        """Sample from the base model, or from it with an adapter's files."""
        ...

    async def drop(self, run: str) -> None:
        """Forget a run. Idempotent."""
        ...

    async def close(self) -> None:
        """End the worker."""
        ...


class Worker(Engine, Protocol):
    """An engine in a process of its own, as its supervisor sees it."""

    @property
    def in_flight(self) -> int:
        """Calls that wait for their answer."""
        ...

    @property
    def last_progress(self) -> float:
        """Monotonic time of the last sign of life, or of the first call after an idle time."""
        ...

    @property
    def resident_memory(self) -> int | None:
        """Bytes of memory that the process occupies; None where that is not known."""
        ...

    async def wait_died(self) -> int:
        """Wait until the process has ended; its exit status."""
        ...

    def kill(self) -> None:
        """End the process at once. Idempotent."""
        ...
