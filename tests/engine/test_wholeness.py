"""Operations change a run's state wholly or not at all, whichever call of torch fails in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.engine import optimizer
from holdfast.engine.core import Core
from holdfast.engine.interface import OPTIMIZER_STATE, AdamParams, EngineError, StateLost
from holdfast.store import Store
from tests.engine.conftest import MakeCore
from tests.engine.helpers import make_batch, run_config

BODY, OTHER = make_batch(0).encode(), make_batch(1).encode()
STEP = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)


class Fails(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets one call fail, before it has done anything or after it has done all."""

    def __init__(self, number: int, *, after: bool = False, only_allocating: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._number = number
        self.calls = 0
        self._after = after
        self._only_allocating = only_allocating

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {})) if self._after else None
        if not self._only_allocating or _allocates(func):
            self.calls += 1
            if self.calls == self._number:
                raise torch.OutOfMemoryError(f"out of memory in {func}")
        return result if self._after else func(*args, **(kwargs or {}))


def _allocates(func: Any) -> bool:
    in_place = func._schema.is_mutable or func.is_view
    return not in_place and func is not torch.ops.aten._local_scalar_dense.default


def outcomes(
    prepare: Callable[[], object], operation: Callable[[], object], every: int = 1, **how: bool
) -> Iterator[Exception | None]:
    """How the operation ends when its first call fails, its second one, and so on, and then none.

    With `every`, only each so-manieth fails, and each of the last fifty.
    """
    prepare()
    with Fails(0, **how) as counted:
        operation()
    late = max(1, counted.calls - 50)
    for number in (*range(1, late, every), *range(late, counted.calls + 1), 0):
        prepare()
        error: Exception | None = None
        with Fails(number, **how):
            try:
                operation()
            except Exception as found:
                error = found
        assert (error is None) == (number == 0)
        yield error


def state(core: Core, run: str = "run") -> dict[str, bytes]:
    files = core.copy_state(run, optimizer=True).files
    return {name: b"".join(bytes(part) for part in parts) for name, parts in files.items()}


BEFORE_OR_AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@pytest.fixture
def core(make_core: MakeCore) -> Core:
    return make_core("qwen3")


@pytest.fixture(params=[0, 2], ids=["first", "later"])
def prepare(
    request: pytest.FixtureRequest, core: Core, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Makes a run that is about to take its first step, or one with moments; in some chunks."""
    monkeypatch.setattr(optimizer, "_CHUNK", 128)

    def prepare() -> None:
        core.create("run", run_config(4, attn=False, mlp=False))
        for seq in range(request.param):
            core.forward_backward("run", seq, OTHER)
            core.optim_step("run", STEP)
        core.forward_backward("run", 9, BODY)

    return prepare


@BEFORE_OR_AFTER
def test_a_step_is_taken_or_not_or_its_state_is_lost(
    core: Core, prepare: Callable[[], None], after: bool
) -> None:
    prepare()
    core._runs["run"].clear_gradients()
    old = state(core)
    prepare()
    core.optim_step("run", STEP)
    new = state(core)
    seen = []
    for error in outcomes(prepare, lambda: core.optim_step("run", STEP), after=after):
        seen.append(type(error))
        if isinstance(error, StateLost):
            with pytest.raises(EngineError, match="no run 'run'"):
                core.optim_step("run", STEP)
        else:
            assert state(core) == (old if error else new)
    # First those that change nothing, which are most, then those in the middle of the update.
    order = [EngineError, StateLost, type(None)]
    assert seen == sorted(seen, key=order.index) and {*seen} == {*order}


def test_a_step_that_is_short_of_memory_is_not_taken(
    core: Core, prepare: Callable[[], None]
) -> None:
    """All the memory that it needs is had before anything is changed."""
    prepare()
    core._runs["run"].clear_gradients()
    old = state(core)
    seen = []
    for error in outcomes(prepare, lambda: core.optim_step("run", STEP), only_allocating=True):
        if error is not None:
            seen.append(getattr(error, "code", error))
            assert state(core) == old
    assert {*seen} == {"out_of_memory"} and len(seen) > 5


@BEFORE_OR_AFTER
def test_the_gradients_of_a_batch_are_added_or_not(core: Core, after: bool) -> None:
    def prepare() -> None:
        core.create("run", run_config(4, mlp=False))
        core.forward_backward("run", 0, OTHER)

    prepare()
    old = state(core)
    core.forward_backward("run", 1, BODY)
    new = state(core)
    assert old != new
    for error in outcomes(prepare, lambda: core.forward_backward("run", 1, BODY), 97, after=after):
        core._runs["run"].incomplete = None
        assert state(core) == (old if error else new), error


def test_a_run_that_cannot_be_made_leaves_everything_as_it_was(core: Core) -> None:
    """The one that it would have replaced, and the others; of its layers all or none are there."""
    small, large = run_config(4, mlp=False), run_config(8)

    def parameters() -> int:
        return sum(1 for _ in core.base.model.parameters())

    def prepare() -> None:
        for key in list(core._slots._slots):
            if key[0] == 8:
                core._slots._remove(key)
        core.create("neighbour", small)
        core.create("run", small)
        core.forward_backward("run", 0, OTHER)

    prepare()
    old, there = state(core), parameters()
    answer = core.forward_backward("neighbour", 0, BODY)
    gradients = state(core, "neighbour")
    core.create("run", large)
    new, with_slot = state(core), parameters()
    for error in outcomes(prepare, lambda: core.create("run", large), 11):
        if error is None:
            assert state(core) == new
        else:
            assert state(core) == old, error
            assert parameters() in (there, with_slot), error
            assert core.forward_backward("neighbour", 0, BODY) == answer
            assert state(core, "neighbour") == gradients
            core.create("run", large)
            assert state(core) == new


def test_a_state_is_restored_or_stays_as_it_was(core: Core, store: Store) -> None:
    core.create("run", run_config(4, mlp=False))
    core.forward_backward("run", 0, OTHER)
    core.optim_step("run", STEP)
    core.forward_backward("run", 1, BODY)
    new = state(core)
    parts = core.copy_state("run", optimizer=True).files
    files = {name: store.put_blob(part) for name, part in parts.items()}
    assert OPTIMIZER_STATE in files
    config = run_config(4, mlp=False)
    core.create("run", config)
    old = state(core)

    def restore() -> None:
        core.restore("run", config, files, optimizer=True)

    for error in outcomes(lambda: core.create("run", config), restore, 7):
        assert state(core) == (old if error else new), error
