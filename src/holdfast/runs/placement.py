"""Where a run's training state is: in one life of one worker, or nowhere but in its snapshots."""

from __future__ import annotations

from contextlib import suppress

from holdfast.engine.interface import BaseModelInfo, Engine, EngineError, WorkerDied
from holdfast.runs.engines import Host


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
        """The worker that holds the state. Raises WorkerDied when that is gone."""
        assert self.host is not None
        engine, info, life = await self.host.engine()
        if life != self._life:
            raise WorkerDied(f"the worker that held run {self.key} is gone")
        return engine, info

    async def choose(self, host: Host) -> tuple[Engine, BaseModelInfo, int]:
        """A worker that may be given the state; `put` says that it has it.

        Raises WorkerDied when the state is held by a worker that is gone: it must be recovered
        first, since what was to replace it may still fail.
        """
        engine, info, life = await host.engine()
        if self._life is not None and (self.host is not host or life != self._life):
            raise WorkerDied(f"the worker that held run {self.key} is gone")
        return engine, info, life

    def put(self, host: Host, life: int) -> None:
        """That life of the host's worker holds the state now."""
        self.host = host
        self._life = life

    def held_in(self, host: Host, life: int) -> bool:
        return self.host is host and self._life == life

    def lost(self) -> None:
        """The worker died, or must be taken for dead."""
        if self.host is not None and self._life is not None:
            self.host.lost(self._life)
        self._life = None

    async def drop(self) -> None:
        """Take the state out of the worker's memory."""
        if self.held:
            with suppress(WorkerDied, EngineError):
                engine, _ = await self.engine()
                await engine.drop(self.key)
        self._life = None
