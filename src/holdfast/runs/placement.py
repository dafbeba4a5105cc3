"""Where a run's training state is: in one life of one worker, or nowhere but in its snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from holdfast.engine.interface import BaseModelInfo, Engine, EngineError, WorkerDied
from holdfast.runs.engines import Host, StateGone


class Placement:
    """The worker that holds the state of the run `key`. A state does not survive its worker."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.host: Host | None = None
        self._life: int | None = None

    @property
    def held(self) -> bool:
        """Whether a worker holds the state, as far as is known."""
        return self._life is not None

    async def engine(self) -> tuple[Engine, BaseModelInfo]:
        """The worker that holds the state. Raises StateGone when that has ended."""
        assert self.host is not None
        engine, info, life = await self.host.engine()
        if life != self._life:
            raise StateGone(f"the worker that held run {self.key} is gone")
        return engine, info

    @asynccontextmanager
    async def computing(self) -> AsyncIterator[tuple[Engine, BaseModelInfo]]:
        """The worker that holds the state, for one operation: it computes nothing else meanwhile.

        Raises StateGone, so that a death that came before is not laid to this operation.
        """
        assert self.host is not None
        async with self.host.turn:
            yield await self.engine()

    def check(self, host: Host, life: int) -> None:
        """Whether that life of the host's worker may be given the state; `put` says that it has it.

        Raises StateGone when the state is held by a worker that is gone: it must be recovered
        first, since what was to replace it may still fail.
        """
        if self._life is not None and (self.host is not host or life != self._life):
            raise StateGone(f"the worker that held run {self.key} is gone")

    def put(self, host: Host, life: int) -> None:
        """That life of the host's worker holds the state now."""
        self.host = host
        self._life = life

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
        """Take the state out of the worker's memory."""
        if self.held:
            with suppress(WorkerDied, EngineError):
                engine, _ = await self.engine()
                await engine.drop(self.key)
        self._life = None
