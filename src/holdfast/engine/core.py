"""The engine without its process: runs on one base model, one call at a time."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from holdfast.engine.base import Base
from holdfast.engine.batch import CheckedBatch, check
from holdfast.engine.forward import Network, forward, forward_backward, split_rows
from holdfast.engine.heap import Heap
from holdfast.engine.interface import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OPTIMIZER_STATE,
    AdamParams,
    EngineError,
    Incomplete,
    RunConfig,
    StateInfo,
    StateLost,
)
from holdfast.engine.optimizer import check_params, step
from holdfast.engine.payload import Array, ForwardOutput, PayloadError, SampleRequest
from holdfast.engine.plan import MicroBatch, plan
from holdfast.engine.sampling import Sampler
from holdfast.engine.slots import Slot, Slots
from holdfast.engine.state import (
    HostCopy,
    TrainingState,
    check_base,
    check_identity,
    copy_to_host,
    read_adapter,
    restore_optimizer,
)
from holdfast.store.model import Blob

ReadBlob = Callable[[Blob, str], bytes]
"""Gives a blob's verified bytes; the text says which file it is, for the error message."""

_DEVICE_FAILED: Any = getattr(torch, "AcceleratorError", ())
"""What torch raises for it; older ones raise nothing that can be told apart."""

_CACHED_ADAPTERS = 8
_CachedAdapter = tuple[int, tuple[str, ...], float, Tensor]
"""Rank, adapted modules, alpha, flat weights."""

log = logging.getLogger(__name__)


class Core:
    """All runs of one worker. Not thread-safe: one compute thread calls it."""

    def __init__(
        self,
        base: Base,
        read_blob: ReadBlob,
        token_budget: int,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.base = base
        self._read_blob = read_blob
        self._budget = token_budget
        self._progress = progress
        self._network = Network(base)
        self._slots = Slots(base)
        self._sampler = Sampler(base, self._network, token_budget)
        self._runs: dict[str, TrainingState] = {}
        self._heap = Heap()
        self._adapters: OrderedDict[tuple[str, ...], _CachedAdapter] = OrderedDict()
        self._spare: Tensor | None = None

    def create(self, run: str, config: RunConfig) -> StateInfo:
        """Initialise a run from its seed, with a cold optimizer. Replaces one of that id."""
        modules = self._check_config(config)
        lora = config.lora
        if not -(1 << 63) <= lora.seed < 1 << 64:
            raise EngineError("invalid_seed", f"The seed {lora.seed} does not fit in 64 bits.")
        slot = self._slots.get(lora.rank, modules)
        weights = slot.initialise(lora.seed).to(self.base.device)
        return self._install(run, self._new_state(config, modules, slot, weights))

    def restore(
        self, run: str, config: RunConfig, files: Mapping[str, Blob], *, optimizer: bool
    ) -> StateInfo:
        """Set a run's whole state from a checkpoint's files; on failure nothing changes."""
        modules = self._check_config(config)
        if optimizer and OPTIMIZER_STATE not in files:
            raise EngineError(
                "no_optimizer_state",
                "The checkpoint holds no optimizer state; load it without the optimizer.",
            )
        wanted = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, *((OPTIMIZER_STATE,) if optimizer else ()))
        data = {name: self._read_blob(files[name], name) for name in wanted if name in files}
        adapter = read_adapter(data)
        check_identity(adapter.meta, config, self.base.info)
        check_identity({"rank": adapter.rank, "alpha": adapter.alpha}, config, self.base.info)
        if adapter.modules != modules:
            strange = sorted(set(adapter.modules) ^ set(modules))[0]
            where = "the checkpoint" if strange in adapter.modules else "this run"
            raise EngineError(
                "train_flags_mismatch",
                f"The checkpoint and this run adapt different layers: {strange!r} is adapted in "
                f"{where} alone. Use the checkpoint's train_attn, train_mlp and train_unembed.",
            )
        slot = self._slots.get(config.lora.rank, modules)
        weights = adapter.fill(slot.layout)
        state = self._new_state(config, modules, slot, weights.to(self.base.device))
        if optimizer:
            restore_optimizer(state, data[OPTIMIZER_STATE], self.base.info)
        return self._install(run, state)

    def forward(self, run: str, body: bytes) -> bytes:
        """Log-probabilities and loss; state unchanged."""
        state = self._state(run)
        with _definite("forward"):
            batch = self._check_batch(body)
            self._bind(state)
            return self._compute(batch, lambda part: forward(self._network, part, batch)).encode()

    def forward_backward(self, run: str, seq: int, body: bytes) -> bytes:
        """Accumulate gradients; a failure sets the incomplete mark with `seq`."""
        state = self._state(run)
        try:
            with _definite("forward_backward"):
                batch = self._check_batch(body)
                return self._accumulate(state, batch).encode()
        except EngineError as error:
            self.mark_incomplete(run, seq, f"forward_backward {seq} failed: {error.message}")
            raise

    def mark_incomplete(self, run: str, seq: int, message: str) -> None:
        """Set the mark, unless an earlier failure has set it."""
        state = self._state(run)
        if state.incomplete is None:
            state.incomplete = Incomplete(seq, message)

    def optim_step(self, run: str, params: AdamParams) -> dict[str, float]:
        """Apply and clear the accumulated gradients; metrics of the step.

        After StateLost the run is unknown: nobody can go on with half of a step.
        """
        state = self._state(run)
        check_params(params)
        if state.incomplete is not None:
            message = state.incomplete.message
            self._keep(state.clear_gradients())
            raise EngineError(
                "incomplete_gradients",
                f"The accumulated gradients lacked a part and were cleared. {message}",
            )
        metrics = {
            "grad_norm": 0.0,
            "learning_rate": params.learning_rate,
            "tokens": float(state.pending_tokens),
            "forward_backwards": float(state.pending),
            "skipped": 1.0,
        }
        if state.grads is not None:
            try:
                with _definite("optim_step"):
                    metrics["grad_norm"] = step(
                        state.weights, state.grads, state.present, state.adam, params
                    )
            except EngineError:
                self._keep(state.clear_gradients())
                raise
            except StateLost:
                del self._runs[run]
                raise
            metrics["skipped"] = 0.0
            state.step += 1
        self._keep(state.clear_gradients())
        return {**metrics, "step": float(state.step)}

    def copy_state(self, run: str, *, optimizer: bool) -> HostCopy:
        """A copy of the run's state in host memory, as its files' bytes."""
        return copy_to_host(self._state(run), self.base.info, optimizer=optimizer)

    def state_size(self, run: str) -> int:
        """About how many bytes a copy of the run's state takes."""
        return 16 * self._state(run).layout.size

    def sample(self, adapter: Mapping[str, Blob] | None, body: bytes) -> bytes:
        """Sample from the base model, or from it with an adapter's files."""
        try:
            request = SampleRequest.decode(body)
        except PayloadError as error:
            raise EngineError(
                "invalid_sample_request", f"The request cannot be read: {error}"
            ) from error
        with _definite("sample"):
            if adapter is None:
                self._slots.activate(None)
            else:
                self._bind_adapter(adapter)
            return self._sampler.sample(request, self._progress).encode()

    def drop(self, run: str) -> None:
        """Forget a run. Idempotent."""
        state = self._runs.get(run)
        if state is not None:
            self._slots.release(state.weights)
            del self._runs[run]
            size = 4 * state.weights.nbytes  # two moments and gradients besides, once it trained
            del state
            self._heap.freed(size)

    def _check_config(self, config: RunConfig) -> tuple[str, ...]:
        """The modules that a run adapts. Raises EngineError (user) for what cannot be trained."""
        if config.base_model != self.base.info.name:
            raise EngineError(
                "base_model_mismatch",
                f"This worker serves {self.base.info.name!r}, not {config.base_model!r}.",
            )
        if config.optimizer != "adamw":
            raise EngineError(
                "unknown_optimizer",
                f"Unknown optimizer {config.optimizer!r}; 'adamw' is the one there is.",
            )
        alpha = config.lora.alpha
        if not (math.isfinite(alpha) and alpha > 0):
            raise EngineError("invalid_alpha", f"lora_alpha is {alpha}; it must be above 0.")
        return self._slots.targets.select(config.lora)

    def _state(self, run: str) -> TrainingState:
        state = self._runs.get(run)
        if state is None:
            raise EngineError("unknown_run", f"The worker has no run {run!r}.", "server")
        return state

    def _new_state(
        self, config: RunConfig, modules: tuple[str, ...], slot: Slot, weights: Tensor
    ) -> TrainingState:
        short = self._slots.targets.short(modules)
        return TrainingState(config, modules, short, slot.layout, weights)

    def _install(self, run: str, state: TrainingState) -> StateInfo:
        self.drop(run)
        self._runs[run] = state
        return state.info

    def _check_batch(self, body: bytes) -> CheckedBatch:
        info = self.base.info
        return check(body, vocab_size=info.vocab_size, max_length=info.max_sequence_length)

    def _bind(self, state: TrainingState) -> Slot:
        slot = self._slots.get(state.config.lora.rank, state.modules)
        slot.bind(state.weights, state.config.lora.alpha)
        self._slots.activate(slot)
        return slot

    def _compute(
        self, batch: CheckedBatch, run_part: Callable[[MicroBatch], tuple[Tensor, float]]
    ) -> ForwardOutput:
        """Run a batch by its plan; `run_part` gives a micro-batch's log-probabilities and loss."""
        logprobs: dict[int, Array] = {}
        loss = 0.0
        for part in plan(batch.lengths, self._budget):
            logprobs_TK, part_loss = run_part(part)
            loss += part_loss
            for index, rows in split_rows(part, logprobs_TK.cpu()).items():
                targets = batch.sequences[index].targets
                width = 1 if targets.ndim == 1 else targets.shape[1]
                logprobs[index] = rows[:, :width].reshape(targets.shape).numpy()
            self._progress()
        outputs = [{"logprobs": logprobs[i]} for i in range(len(batch.sequences))]
        return ForwardOutput(outputs, {"loss:sum": loss})

    def _accumulate(self, state: TrainingState, batch: CheckedBatch) -> ForwardOutput:
        """The operation's gradients go to a buffer of their own, added once all has succeeded."""
        slot = self._bind(state)
        layout, parameters = state.layout, slot.parameters
        fresh = self._take(layout.size)
        views = layout.views(fresh)
        present = [False] * len(parameters)

        def run_part(part: MicroBatch) -> tuple[Tensor, float]:
            result = forward_backward(self._network, part, batch)
            for i, parameter in enumerate(parameters):
                grad = parameter.grad
                if grad is not None:
                    if present[i]:
                        views[i].add_(grad)
                    else:
                        views[i].copy_(grad)
                    present[i] = True
                    parameter.grad = None
            return result

        try:
            output = self._compute(batch, run_part)
        finally:
            for parameter in parameters:
                parameter.grad = None
        for view, there in zip(views, present, strict=True):
            if not there:
                view.zero_()
        if any(present):
            if state.grads is not None:
                fresh.add_(state.grads)  # not the other way round: if that fails, these are whole
            state.present = [a or b for a, b in zip(state.present, present, strict=True)]
            state.grads, fresh = fresh, state.grads
        self._keep(fresh)
        state.pending += 1
        state.pending_tokens += sum(batch.lengths)
        return output

    def _take(self, size: int) -> Tensor:
        """A gradient buffer; only the gaps between parameters are sure to be zero."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.numel() == size:
            return spare
        return torch.zeros(size, device=self.base.device)

    def _keep(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._spare = buffer

    def _bind_adapter(self, files: Mapping[str, Blob]) -> None:
        names = [name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if name in files]
        key = tuple(files[name].hash for name in names)
        if key not in self._adapters:
            adapter = read_adapter({name: self._read_blob(files[name], name) for name in names})
            check_base(adapter.meta, self.base.info)
            slot = self._slots.get(adapter.rank, adapter.modules)
            weights = adapter.fill(slot.layout).to(self.base.device)
            self._adapters[key] = (adapter.rank, adapter.modules, adapter.alpha, weights)
            if len(self._adapters) > _CACHED_ADAPTERS:
                self._slots.release(self._adapters.popitem(last=False)[1][-1])
        self._adapters.move_to_end(key)
        rank, modules, alpha, weights = self._adapters[key]
        slot = self._slots.get(rank, modules)
        slot.bind(weights, alpha)
        self._slots.activate(slot)


@contextmanager
def _definite(what: str) -> Iterator[None]:
    """Turn whatever else goes wrong inside into an EngineError; a run survives all of them."""
    try:
        yield
    except (EngineError, StateLost):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(what) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise _out_of_memory(what) from error
        if isinstance(error, _DEVICE_FAILED):  # the device answers nothing else any more
            raise StateLost(f"the device failed in the {what}: {error}") from error
        log.exception("%s failed", what)
        raise EngineError(
            "internal", f"The {what} failed inside the engine: {error}", "server"
        ) from error
    except Exception as error:
        log.exception("%s failed", what)
        raise EngineError(
            "internal", f"The {what} failed inside the engine: {error}", "server"
        ) from error


def _out_of_memory(what: str) -> EngineError:
    return EngineError(
        "out_of_memory",
        f"The {what} ran out of memory. Send shorter sequences, or serve the model with a smaller "
        "token budget.",
        "server",
    )
