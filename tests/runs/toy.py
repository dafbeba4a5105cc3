"""A toy engine of pure integers: training that costs microseconds and is exact everywhere.

`ToyState` and the functions on it say what each operation does to a state. `ToyEngine` is a
worker that keeps such states by run, reads and writes them through a real store, takes (virtual)
time, fails, and dies, on command. Its functions are what a model computes with too; which of them
are called, how often and in which order is what the tests are about.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from holdfast.engine.interface import (
    ADAPTER_WEIGHTS,
    OPTIMIZER_STATE,
    AdamParams,
    BaseModelInfo,
    Captured,
    EngineError,
    Incomplete,
    LoraConfig,
    RunConfig,
    StateInfo,
    WorkerDied,
)
from holdfast.engine.worker import store_error
from holdfast.store import Blob, Store, StoreError, Unavailable
from holdfast.store.retries import STORAGE_WAITED_FOR, pauses

P = ParamSpec("P")
T = TypeVar("T")

NAME, OTHER = "toy", "other"
_PRIME = (1 << 61) - 1

PIECE_TAKES = 60.0
"""Seconds after which a slow storage has read or written one more piece of a state."""
_MOVES_BYTES = frozenset({"write", "restore", "restore anew"})


def mixed(*values: object) -> int:
    """A number that depends on every value and on their order."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _PRIME


ENDS = "ends the server"
"""The point of an operation that does so."""


def batch(
    x: int,
    *,
    fail: str | None = None,
    kills: bool = False,
    ends: bool = False,
    not_finite: bool = False,
) -> bytes:
    """A body of a forward or forward_backward.

    `fail` is the code of the error it fails with, `kills` ends every worker that executes it,
    `ends` every server, `not_finite` makes the next optim_step fail.
    """
    odd = {"fail": fail, "kills": kills, "ends": ends, "not_finite": not_finite}
    return json.dumps({"x": x, **odd}).encode()


@dataclass(frozen=True, slots=True)
class ToyState:
    """A run's training state."""

    config: RunConfig
    weights: int
    moment: int = 0
    step: int = 0
    grads: int = 0
    pending: int = 0
    not_finite: bool = False
    mark: Incomplete | None = None

    @property
    def info(self) -> StateInfo:
        return StateInfo(self.config, self.step, self.pending, self.mark)

    def cleared(self) -> ToyState:
        return replace(self, grads=0, pending=0, not_finite=False, mark=None)

    def marked(self, seq: int, message: str) -> ToyState:
        """The first mark stays."""
        return self if self.mark is not None else replace(self, mark=Incomplete(seq, message))

    def cold(self) -> ToyState:
        """What a weights-only load leaves."""
        return ToyState(self.config, self.weights)

    def encode(self) -> tuple[bytes, bytes]:
        """The weights' file and the optimizer's."""
        rest = asdict(self)
        weights = {"config": rest.pop("config"), "weights": rest.pop("weights")}
        return json.dumps(weights).encode(), json.dumps(rest).encode()

    @classmethod
    def decode(cls, weights: bytes, optimizer: bytes | None) -> ToyState:
        first = json.loads(weights)
        lora = LoraConfig(**first["config"].pop("lora"))
        state = cls(RunConfig(lora=lora, **first["config"]), first["weights"])
        if optimizer is None:
            return state
        rest = json.loads(optimizer)
        mark = rest.pop("mark")
        return replace(state, mark=None if mark is None else Incomplete(**mark), **rest)


Result = bytes | dict[str, float] | EngineError


def initial(config: RunConfig) -> ToyState:
    return ToyState(config, mixed("seed", config.lora.seed, config.lora.rank))


def forward(state: ToyState, seq: int, body: bytes) -> tuple[ToyState, bytes | EngineError]:
    parsed = json.loads(body)
    if parsed["fail"]:
        return state, EngineError(parsed["fail"], f"batch {parsed['x']} was told to fail")
    return state, b"%d" % mixed("forward", state.weights, body)


def forward_backward(
    state: ToyState, seq: int, body: bytes
) -> tuple[ToyState, bytes | EngineError]:
    _, result = forward(state, seq, body)
    if isinstance(result, EngineError):
        return state.marked(seq, f"forward_backward {seq} failed: {result.message}"), result
    return (
        replace(
            state,
            grads=mixed(state.grads, state.weights, body),
            pending=state.pending + 1,
            not_finite=state.not_finite or json.loads(body)["not_finite"],
        ),
        result,
    )


def optim_step(
    state: ToyState, params: AdamParams
) -> tuple[ToyState, dict[str, float] | EngineError]:
    if params.learning_rate < 0:
        return state, EngineError("invalid_adam_params", f"rate {params.learning_rate}")
    if state.mark is not None:
        message = f"the gradients lacked a part and were cleared. {state.mark.message}"
        return state.cleared(), EngineError("incomplete_gradients", message)
    if state.not_finite:
        return state.cleared(), EngineError("gradient_not_finite", "a gradient is not finite")
    if state.pending == 0:
        return state, {"skipped": 1.0, "step": float(state.step)}
    stepped = replace(
        state.cleared(),
        weights=mixed(state.weights, state.grads, state.moment, params),
        moment=mixed(state.moment, state.grads),
        step=state.step + 1,
    )
    # The weights as a number that JSON carries exactly.
    return stepped, {"skipped": 0.0, "step": float(stepped.step), "w": float(stepped.weights >> 10)}


def _in_turn(
    method: Callable[Concatenate[ToyEngine, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ToyEngine, P], Coroutine[Any, Any, T]]:
    """As a worker executes calls: one after the other, to its end, whoever still waits for it."""

    @wraps(method)
    async def call(engine: ToyEngine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async def execute() -> T:
            async with engine.executing:
                result = await method(engine, *args, **kwargs)
            engine.last_progress = engine.clock()
            return result

        if not engine.in_flight:
            engine.last_progress = engine.clock()
        engine.in_flight += 1
        task = asyncio.create_task(execute())
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await asyncio.shield(task)
        finally:
            engine.in_flight -= 1

    return call


class ToyEngine:
    """A worker. `point` is called before and after it changes anything, and may raise WorkerDied;
    `pause` gives the seconds that an operation takes."""

    def __init__(
        self,
        store: Store,
        point: Callable[[str], None],
        pause: Callable[[str], float],
        info: BaseModelInfo,
        clock: Callable[[], float],
        known: set[str] | None = None,
    ) -> None:
        self.known = set() if known is None else known
        """Runs whose state this or another worker has had."""
        self.states: dict[str, ToyState] = {}
        self.dead = False
        self.executed: list[tuple[str, str, int]] = []
        """(run, kind, seq) of every forward_backward whose gradients were added."""
        self.in_flight = 0
        """Calls that wait for their answer."""
        self.last_progress = clock()
        self.resident_memory: int | None = None
        self.executing = asyncio.Lock()
        self.clock = clock
        self._hangs = False
        self._loads = True
        self._store = store
        self._point = point
        self._pause = pause
        self._info = info
        self._ended = asyncio.Event()

    def hang(self) -> None:
        """Answer nothing any more, until it is killed."""
        self._hangs = True

    @property
    def hangs(self) -> bool:
        """Whether it answers nothing, and was not ended yet."""
        return self._hangs and not self.dead

    def cannot_load(self) -> None:
        """Fail to load its base model."""
        self._loads = False

    async def wait_died(self) -> int:
        await self._ended.wait()
        return -9

    def kill(self) -> None:
        self.dead = True
        self.states.clear()
        self._ended.set()

    async def close(self) -> None:
        self.kill()

    @_in_turn
    async def ready(self) -> BaseModelInfo:
        await self._reach("ready")
        if not self._loads:
            raise EngineError("model_not_loadable", "no memory is left for it", "server")
        return self._info

    @_in_turn
    async def create(self, run: str, config: RunConfig) -> StateInfo:
        await self._reach("create")
        self.states[run] = initial(config)
        self.known.add(run)
        self._die_perhaps("created")
        return self.states[run].info

    @_in_turn
    async def restore(
        self, run: str, config: RunConfig, files: Mapping[str, Blob], *, optimizer: bool
    ) -> StateInfo:
        await self._reach("restore" if run in self.known else "restore anew")
        rest = None
        try:
            weights = self._store.read_blob(files[ADAPTER_WEIGHTS], what=f"weights of {run}")
            if optimizer:
                rest = self._store.read_blob(files[OPTIMIZER_STATE], what=f"optimizer of {run}")
        except StoreError as error:
            raise store_error(error) from error
        self.states[run] = replace(ToyState.decode(weights, rest), config=config)
        self.known.add(run)
        self._die_perhaps("restored")
        return self.states[run].info

    @_in_turn
    async def forward(self, run: str, seq: int, batch: bytes) -> bytes:
        return await self._batch("forward", forward, run, seq, batch)

    @_in_turn
    async def forward_backward(self, run: str, seq: int, batch: bytes) -> bytes:
        return await self._batch("forward_backward", forward_backward, run, seq, batch)

    @_in_turn
    async def mark_incomplete(self, run: str, seq: int, message: str) -> None:
        await self._reach("mark")
        self.states[run] = self._state(run).marked(seq, message)

    @_in_turn
    async def optim_step(self, run: str, params: AdamParams) -> dict[str, float]:
        short = await self._reach_or_be_short("optim_step")
        before = self._state(run)
        self.states[run], result = optim_step(before, params)
        if short is not None and not isinstance(result, EngineError) and not result["skipped"]:
            self.states[run], result = before.cleared(), short
        self._die_perhaps("optim_stepped")
        if isinstance(result, EngineError):
            raise result
        return result

    @_in_turn
    async def capture(self, run: str, *, optimizer: bool = True) -> ToyCapture:
        await self._reach("capture")
        return ToyCapture(self, self._state(run), optimizer)

    @_in_turn
    async def sample(self, adapter: Mapping[str, Blob] | None, request: bytes) -> bytes:
        await self._reach("sample")
        weights = None if adapter is None else adapter[ADAPTER_WEIGHTS].hash
        return b"%d" % mixed("sample", weights, request)

    @_in_turn
    async def drop(self, run: str) -> None:
        await self._reach("drop")
        self.states.pop(run, None)

    async def write(self, state: ToyState, optimizer: bool) -> Captured:
        """What a capture does beside the training."""
        self.in_flight += 1
        try:
            await self._reach("write")
        finally:
            self.in_flight -= 1
        weights, rest = state.encode()
        again = pauses(within=STORAGE_WAITED_FOR)
        while True:
            try:
                files = {ADAPTER_WEIGHTS: self._store.put_blob([weights])}
                if optimizer:
                    files[OPTIMIZER_STATE] = self._store.put_blob([rest])
                break
            except StoreError as error:
                pause = next(again, None) if isinstance(error, Unavailable) else None
                if pause is None:
                    raise store_error(error) from error
            await asyncio.sleep(pause)
            self._die_perhaps("write again")
        self._die_perhaps("written")
        return Captured(state.info, files)

    async def _batch(
        self,
        kind: str,
        function: Callable[[ToyState, int, bytes], tuple[ToyState, bytes | EngineError]],
        run: str,
        seq: int,
        body: bytes,
    ) -> bytes:
        short = await self._reach_or_be_short(kind)
        if json.loads(body)["kills"]:
            self.kill()
            raise WorkerDied("the batch was told to kill")
        if json.loads(body)["ends"]:
            self._point(ENDS)
        before = self._state(run)
        self.states[run], result = function(before, seq, body)
        if short is not None and not isinstance(result, EngineError):
            marked = before.marked(seq, f"forward_backward {seq} failed: {short.message}")
            result = short
            self.states[run] = marked if kind == "forward_backward" else before
        self._die_perhaps(f"after {kind}")
        if isinstance(result, EngineError):
            raise result
        return result

    def _state(self, run: str) -> ToyState:
        if run not in self.states:
            raise EngineError("unknown_run", f"no run {run}", "server")
        return self.states[run]

    async def _reach(self, what: str) -> None:
        """Take time, and perhaps die before anything is changed."""
        self._die_perhaps(what)
        left = self._pause(what)
        while what in _MOVES_BYTES and left > PIECE_TAKES:
            await asyncio.sleep(PIECE_TAKES)
            self.last_progress = self.clock()
            left -= PIECE_TAKES
        await asyncio.sleep(left)
        if self._hangs:
            await self._ended.wait()
        self._die_perhaps(what)

    async def _reach_or_be_short(self, what: str) -> EngineError | None:
        """As `_reach`; the error with which it fails that finds nothing else wrong."""
        try:
            await self._reach(what)
        except EngineError as short:
            return short
        return None

    def _die_perhaps(self, what: str) -> None:
        if self.dead:
            raise WorkerDied("it is dead")
        try:
            self._point(what)
        except WorkerDied:
            self.kill()
            raise


class ToyCapture:
    """A copied state; it is written beside what follows."""

    def __init__(self, engine: ToyEngine, state: ToyState, optimizer: bool) -> None:
        self.state = state.info
        self._engine = engine
        self._writing = asyncio.create_task(engine.write(state, optimizer))
        # A worker's death is noticed by whoever waits for the result, perhaps nobody.
        self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def written(self) -> Captured:
        died = asyncio.create_task(self._engine.wait_died())
        await asyncio.wait([self._writing, died], return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not self._writing.done():
            raise WorkerDied("it died while it wrote")
        return self._writing.result()


def base_info(fingerprint: Mapping[str, Any] | None = None, name: str = NAME) -> BaseModelInfo:
    """One of the toy's base models."""
    return BaseModelInfo(name, "0" * 64, "Toy", 100, 1000, None, fingerprint or {"toy": 1})
