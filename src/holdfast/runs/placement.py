"""Where a run's training state is: in one life of one worker, or nowhere but in its snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from holdfast.engine.interface import (
    ADAPTER_WEIGHTS,
    BaseModelInfo,
    Engine,
    EngineError,
    WorkerDied,
)
from holdfast.runs.engines import Host, StateGone
from holdfast.store import Blob


class Placement:
    """The worker that holds the state of the run `key`. A state does not survive its worker.

    `leave` asks the run to take its state out of the worker's memory; `wanted` says whether
    somebody waits for what it computes.
    """

    def __init__(self, key: str, leave: Callable[[], None], wanted: Callable[[], bool]) -> None:
        self.key = key
        self._leave = leave
        self.wanted = wanted
        self.host: Host | None = None
        self._life: int | None = None
        self._fixed = False

    @property
    def held(self) -> bool:
        """Whether a worker holds the state, as far as is known."""
        return self._life is not None

    @property
    def recycled(self) -> bool:
        """Whether the worker that holds the state is being replaced, so that it has to leave."""
        return self.host is not None and self._life is not None and self.host.recycles(self._life)

    def engine(self) -> tuple[Engine, BaseModelInfo]:
        """The worker that holds the state. Raises StateGone when that has ended."""
        assert self.host is not None
        found = None if self._life is None else self.host.worker(self._life)
        if found is None:
            raise StateGone(f"the worker that held run {self.key} is gone")
        return found

    @asynccontextmanager
    async def computing(
        self, *, alone: bool = False, use: bool = True
    ) -> AsyncIterator[tuple[Engine, BaseModelInfo]]:
        """The worker that holds the state, for one operation: it computes nothing else meanwhile.

        `alone`: nor does it write what was copied, so that a death is this operation's for sure.
        Without `use` it is no reason for the state to stay in the worker's memory.
        Raises StateGone, so that a death that came before is not laid to this operation.
        """
        host = self.host
        assert host is not None
        async with host.turns.take(self.wanted):
            if alone:
                await host.written()
            engine = self.engine()
            if use:
                host.residents.used(self.key)
            yield engine

    def put(self, host: Host, life: int) -> None:
        """That life of the host's worker holds the state now."""
        if self.host is not None and self.host is not host:
            self.host.residents.gone(self.key)
        self.host = host
        self._life = life
        if life == host.life:
            host.residents.put(self.key, self._leave, fixed=self._fixed)

    def takes(self, manifest_files: Mapping[str, Blob]) -> None:
        """The state is that of these files: the worker keeps four numbers where they have a weight.

        Its weights, two moments of the optimizer, and gradients.
        """
        if self.held and self.host is not None and ADAPTER_WEIGHTS in manifest_files:
            self.host.residents.takes(self.key, 4 * manifest_files[ADAPTER_WEIGHTS].size)

    def stays(self) -> None:
        """The worker keeps the state, if it holds it still: it could not leave."""
        if self.held and self.host is not None:
            self.host.residents.stays(self.key)

    def fix(self) -> None:
        """Let nobody wait from now on for the state to leave a worker: nobody can say when."""
        self._fixed = True
        if self.held and self.host is not None:
            self.host.residents.fix(self.key)

    @property
    def held_by(self) -> tuple[Host, int]:
        """The host and its life that hold the state, which must be held."""
        assert self.host is not None and self._life is not None
        return self.host, self._life

    def held_in(self, host: Host, life: int) -> bool:
        return self.host is host and self._life == life

    def lost(self) -> None:
        """The worker died, or must be taken for dead."""
        if self.host is not None and self._life is not None:
            self.lost_in(self.host, self._life)

    def lost_in(self, host: Host, life: int) -> None:
        """That life of the host's worker is over, which may have held the state or not."""
        host.lost(life)
        if self.held_in(host, life):
            self._life = None

    async def drop(self) -> None:
        """Take the state out of the worker's memory; also one of which it is not known what it is.

        It has to be restored, there or elsewhere.
        """
        if self.held:
            assert self.host is not None
            with suppress(WorkerDied, EngineError):
                await self.engine()[0].drop(self.key)
            self.host.residents.gone(self.key)
        self._life = None
