"""What runs promise, as a sequential interpreter without time, failures or files.

A run's operations take effect in the order of their numbers, each wholly or not at all. The
interpreter is told which numbers were accepted, refused, given up or came late, and computes what
every operation must have answered and what every checkpoint must hold.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.engine.interface import EngineError, RunConfig
from holdfast.runs import bodies
from holdfast.runs.bodies import Body, CreateFromState, Load, OptimStep, Save, SaveSampler
from holdfast.runs.journal import Outcome
from holdfast.store import NameKey

from . import toy
from .toy import ToyState

LEASE = {"python": 360.0, "elixir": 10.0}
LEASE_AFTER_REFUSAL = 5.0
LEASE_AFTER_FORWARD = 120.0
KEPT_AFTER_READ = 600.0


@dataclass(slots=True)
class Op:
    """A number of a run."""

    seq: int
    kind: str
    body: bytes | Body
    fate: str = "accepted"
    """Or refused, missing, late; or short, of the memory that it needed."""
    request_id: str = ""
    refusal: str = "invalid_datum"
    seen: Outcome | None = None
    read_at: float | None = None
    refused_at: float | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint must hold."""

    state: ToyState
    seq: int
    optimizer: bool


@dataclass(frozen=True, slots=True)
class Done:
    """A result: its bytes, or as JSON where the wording is free."""

    result: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """A failure: its code, and a number that its message has to name."""

    code: str
    names: int | None = None


Expected = Done | Failed
Names = dict[NameKey, Saved]


class ModelRun:
    """One run, interpreted as far as its order is known."""

    def __init__(self, id: str, client: str, names: Names, generation: int = 0) -> None:
        self.id = id
        self.generation = generation
        self.client = client
        self.names = names
        self.ops: dict[int, Op] = {}
        self.expected: dict[int, Expected] = {}
        self.state: ToyState | None = None
        self.at = -1
        """Every number up to here has been interpreted."""
        self.history: dict[int, ToyState] = {}
        """The state at each position, marks of late requests that fall there included."""
        self.late_marks: dict[int, list[int]] = {}
        self.following: dict[int, float] = {}
        """Missing numbers, and since when a later one has been there."""
        self.refused_to = -1
        """Up to here a refusal explains what is missing."""
        self.ending: str | None = None
        """The code with which operations fail that the run's end overtook."""
        self.asked_to_end = False
        self.cut: int | None = None
        """The first operation known to have been overtaken."""

    @property
    def highest(self) -> int:
        return max(self.ops, default=-1)

    @property
    def holes(self) -> list[int]:
        return [n for n in range(self.highest) if n not in self.ops]

    def lease(self, seq: int) -> float:
        """The shortest time for which a missing number is waited for."""
        if seq <= self.refused_to:
            return LEASE_AFTER_REFUSAL
        before = self.ops.get(seq - 1)
        if self.client == "elixir" and before is not None and before.kind == bodies.FORWARD:
            return LEASE_AFTER_FORWARD
        return LEASE[self.client]

    def add(self, op: Op, now: float) -> None:
        self.ops[op.seq] = op
        self.following.pop(op.seq, None)
        for hole in self.holes:
            self.following.setdefault(hole, now)

    def skipped(self, seq: int) -> bool:
        return seq in self.ops and self.ops[seq].fate == "missing"

    def came_late(self, op: Op, position: int) -> None:
        """A number that had been skipped; it takes effect after `position`."""
        assert position >= self.at, f"{op} would change {position}, which is history"
        op.fate = "late"
        self.ops[op.seq] = op
        self.expected[op.seq] = Failed(op.refusal)
        if op.kind == bodies.FORWARD_BACKWARD:
            self.late_marks.setdefault(position, []).append(op.seq)
            if position == self.at:
                self._apply_late_marks()

    def interpret(self, seq: int, now: float) -> Expected:
        """What number `seq` must have answered, once it has answered: nothing before it is open."""
        while self.at < seq:
            number = self.at + 1
            op = self.ops.get(number)
            if op is None:
                waited = now - self.following[number]
                assert waited > self.lease(number) - 1e-6, f"{number} was skipped after {waited} s"
                self.following.pop(number)
                op = self.ops[number] = Op(number, bodies.MISSING, b"", "missing")
            expected = self._effect(op)
            if op.fate != "late":
                self.expected[number] = expected
            self.at = number
            self._apply_late_marks()
        return self.expected[seq]

    def _apply_late_marks(self) -> None:
        for late in self.late_marks.get(self.at, []):
            self._mark(late)
        if self.state is not None:
            self.history[self.at] = self.state

    def _mark(self, seq: int) -> None:
        assert self.state is not None
        self.state = self.state.marked(seq, f"number {seq} is missing")

    def _effect(self, op: Op) -> Expected:
        if op.fate in ("missing", "late"):
            return Done()  # its mark has a place of its own
        if op.fate == "refused":
            if op.kind == bodies.FORWARD_BACKWARD:
                self._mark(op.seq)
            return Failed(op.refusal)
        if op.fate == "short":
            return self._broken_off(op)
        match op.body:
            case bodies.Create(config):
                self.state = toy.initial(bodies.config_from_json(config))
                return Done(b"{}")
            case CreateFromState() | Load():
                return self._load(op.body)
            case OptimStep():
                return self._step(op.body)
            case Save(name, _, overwrite):
                key = NameKey(self.id, "weights", name)
                return self._save(op, key, optimizer=True, overwrite=overwrite)
            case SaveSampler(name):
                assert name is not None
                key = NameKey(self.id, "sampler_weights", name)
                return self._save(op, key, optimizer=False, overwrite=False)
        assert isinstance(op.body, bytes) and self.state is not None
        for deadly, code in (
            ("kills", "operation_kills_worker"),
            ("ends", "operation_kills_server"),
        ):
            if json.loads(op.body)[deadly]:
                if op.kind == bodies.FORWARD_BACKWARD:
                    self._mark(op.seq)
                return Failed(code)
        function = toy.forward if op.kind == bodies.FORWARD else toy.forward_backward
        self.state, result = function(self.state, op.seq, op.body)
        return Failed(result.code) if isinstance(result, EngineError) else Done(result)

    def _broken_off(self, op: Op) -> Expected:
        assert self.state is not None
        if op.kind == bodies.FORWARD_BACKWARD:
            self._mark(op.seq)
        elif op.kind == bodies.OPTIM_STEP:
            self.state = self.state.cleared()
        return Failed("out_of_memory")

    def _step(self, body: OptimStep) -> Expected:
        assert self.state is not None
        mark = self.state.mark
        self.state, result = toy.optim_step(self.state, body.params)
        if isinstance(result, EngineError):
            missing = mark is not None and result.code == "incomplete_gradients"
            return Failed(result.code, mark.seq if missing and mark else None)
        return Done(bodies.encode_json(result))

    def _save(self, op: Op, key: NameKey, *, optimizer: bool, overwrite: bool) -> Expected:
        assert self.state is not None
        if key in self.names and not overwrite:
            return Failed("checkpoint_exists")
        self.names[key] = Saved(self.state, op.seq, optimizer)
        return Done(bodies.encode_json({"path": f"tinker://{key}"}))

    def _load(self, body: Load | CreateFromState) -> Expected:
        if body.segment != "weights":
            return Failed("not_a_training_checkpoint")
        saved = self.names.get(body.key)
        if saved is None:
            return Failed("checkpoint_not_found")
        config: RunConfig = saved.state.config
        if isinstance(body, Load):
            assert self.state is not None
            config = self.state.config
            if config.lora.rank != saved.state.config.lora.rank:
                return Failed("incompatible_checkpoint")
        loaded = replace(saved.state, config=config)
        self.state = loaded if body.optimizer else loaded.cold()
        fields = {
            "path": f"tinker://{body.key}",
            "step": self.state.step,
            "pending_forward_backwards": self.state.pending,
            "same_numerics": True,
        }
        return Done(fields=fields)


def agree(expected: Expected, found: Outcome) -> bool:
    """Whether an outcome is the one that the model expects."""
    if isinstance(expected, Failed):
        if found.failure is None or found.failure.code != expected.code:
            return False
        numbers = re.findall(r"\d+", found.failure.message)
        return expected.names is None or str(expected.names) in numbers
    if found.result is None:
        return False
    if expected.result is not None:
        return found.result == expected.result
    return bool(expected.fields.items() <= json.loads(found.result).items())
