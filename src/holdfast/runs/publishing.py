"""A run's saves and snapshots: copied in its order, written and published beside its training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from holdfast import failpoints
from holdfast.engine.interface import (
    OPTIMIZER_STATE,
    BaseModelInfo,
    Capture,
    Captured,
    EngineError,
    WorkerDied,
)
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import Save, SaveExternal, SaveSampler
from holdfast.runs.engines import Host, StateGone
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Failure, Kept, Outcome
from holdfast.runs.order import Entry
from holdfast.runs.placement import Placement
from holdfast.runs.poison import count_death, executing, is_last, is_quarantined
from holdfast.runs.run import Run
from holdfast.runs.samplers import Samplers
from holdfast.store import Manifest, NameKey
from holdfast.store.model import CheckpointKind

REPLAY_BOUND = 30.0
"""Seconds of compute after which a snapshot is taken."""
SNAPSHOT_SHARE = 0.02
"""A snapshot takes, from copy to record, at most this share of the compute since the last one."""
MOST_SNAPSHOT_DEATHS = 3
"""Deaths of the worker at snapshots in a row, after which none is taken for a while."""
WITHOUT_SNAPSHOTS = 600.0
"""Seconds for which a run then goes on without snapshots of its own accord."""
_AFTER_FAILED_SNAPSHOT = 30.0

_AnySave = Save | SaveExternal | SaveSampler

_KINDS: dict[type[_AnySave], CheckpointKind] = {
    Save: "training",
    SaveExternal: "external",
    SaveSampler: "sampler",
}
_SEGMENTS: dict[type[_AnySave], str] = {
    Save: "weights",
    SaveExternal: "external_weights",
    SaveSampler: "sampler_weights",
}


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copied state, and which life of which worker writes it."""

    capture: Capture
    info: BaseModelInfo
    host: Host
    life: int


@dataclass(frozen=True, slots=True)
class _Published:
    """A save's checkpoint that is there already, and the save's outcome."""

    manifest: str
    outcome: Outcome


class Publisher:
    """Publishes one run's states, one after the other and in the order they were copied.

    So a snapshot is never there before the saves that precede it: a recovery from it has not
    passed over one that was still to be made.
    """

    def __init__(self, run: Run, placement: Placement, samplers: Samplers) -> None:
        self._run = run
        self._placement = placement
        self._samplers = samplers
        self._tail: asyncio.Task[None] | None = None
        self._cost = 0.0
        self._snapshot_deaths = 0
        self._no_snapshot_before = 0.0
        self.computed = 0.0
        """Seconds of compute since the last copy for a recovery point."""
        self.changed_at = -1
        """The last position that changed the state."""
        self.snapshot_at = -1
        """The position of the newest snapshot."""

    async def settled(self) -> None:
        """Wait until everything that was copied is published."""
        if self._tail is not None:
            await asyncio.wait([self._tail])

    @property
    def publishing(self) -> bool:
        """Whether something that was copied is not published yet."""
        return self._tail is not None and not self._tail.done()

    @property
    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        if self.publishing or not self.allowed:
            return False
        return self.computed >= min(REPLAY_BOUND, self._cost / SNAPSHOT_SHARE)

    @property
    def behind(self) -> bool:
        """Whether the state has changed since the last snapshot."""
        return self.changed_at > self.snapshot_at

    @property
    def allowed(self) -> bool:
        """Whether snapshots may be taken, which they may not for a while when they kill workers."""
        return time.monotonic() >= self._no_snapshot_before

    # --- Saves -------------------------------------------------------------------------------

    async def save(self, entry: Entry) -> None:
        """Copy the state for a save; the run goes on while it is written and published."""
        run = self._run
        save = _decode(entry, await run.body(entry.seq))
        published = await run.persistently(lambda: self._published(entry, save))
        if published is not None:
            run.order.passed(entry.seq)
            run.settle(entry.seq, published.outcome, target=published.manifest)
            return
        copy = await self._capture_for(entry, optimizer=isinstance(save, Save))
        covered = 0.0
        if isinstance(save, Save):  # becomes a recovery point
            covered, self.computed = self.computed, 0.0
        run.order.passed(entry.seq)
        failpoints.reach("save.copied")
        publishing = self._publish_next(copy, self._finish_save(entry, save, copy, covered))
        if is_quarantined(entry):  # which ends when it is settled
            run.services.gate.close_until(publishing)

    async def settle_published(self) -> None:
        """Settle as done the saves that are pending though their checkpoint is there.

        They were published before a crash that came before their settling. For a run that ends:
        what does not end executes them.
        """
        run = self._run
        for entry in run.order.unsettled:
            if entry.kind not in bodies.SAVES:
                continue
            with suppress(RunError):  # damage: the save fails, as what is pending does
                save = _decode(entry, await run.body(entry.seq))
                published = await self._published(entry, save)
                if published is not None:
                    run.settle(entry.seq, published.outcome, target=published.manifest)

    async def _published(self, entry: Entry, save: _AnySave) -> _Published | None:
        """What a save has made before a crash."""
        if save.name is None:
            return None
        key = _key(self._run, save, save.name)
        request_id = self._run.key.request_id(entry.seq)
        made = await self._run.services.checkpoints.made_by(key, request_id)
        return None if made is None else _Published(made, _saved(entry, key))

    async def _finish_save(self, entry: Entry, save: _AnySave, copy: _Copy, covered: float) -> None:
        run, info = self._run, copy.info
        try:
            try:
                captured = await copy.capture.written()
                self._placement.takes(captured.files)
            except WorkerDied:
                failure = await count_death(run, entry)
                if failure is not None:
                    await run.settle(entry.seq, Outcome(entry.kind, failure=failure))
                raise
            failpoints.reach("save.written")
            if entry.state.settled:  # the run has ended meanwhile, and this save failed with it
                return
            self._check_turn(entry.seq)
            if not await run.recorded():  # never ahead of the results that lead to it
                return
            now = time.time()
            manifest = self.manifest(
                captured,
                info,
                entry.seq,
                kind=_KINDS[type(save)],
                name=save.name,
                expires=None if save.ttl_seconds is None else now + save.ttl_seconds,
                user_metadata=None if isinstance(save, SaveExternal) else save.user_metadata,
                request_id=run.key.request_id(entry.seq),
            )
            replace = isinstance(save, Save) and save.overwrite
            manifest_id = await self._publish(manifest, replace=replace)
            failpoints.reach("save.published")
            if save.name is None:
                await self._settle_sampler(entry, save, manifest_id)
                return
            outcome = _saved(entry, _key(run, save, save.name))
            if isinstance(save, Save):
                # A recovery point of its own: the name may be deleted or moved.
                try:
                    base = await self._publish(self.manifest(captured, info, entry.seq))
                except RunError as error:  # the save itself is done
                    self.computed += covered
                    self._failed(entry.seq, error)
                    await run.settle(entry.seq, outcome, target=manifest_id)
                    return
                await self.settle_with_snapshot(entry, outcome, base, manifest_id)
            else:
                await run.settle(entry.seq, outcome, target=manifest_id)
        except (EngineError, RunError) as error:
            self.computed += covered
            failure = Failure(error.code, error.message, error.category)
            await run.settle(entry.seq, Outcome(entry.kind, failure=failure))

    async def _settle_sampler(self, entry: Entry, save: _AnySave, manifest_id: str) -> None:
        run = self._run
        assert run.info.config is not None and isinstance(save, SaveSampler)
        create = partial(
            self._samplers.create,
            run.info.session_id,
            run.info.owner,
            run.info.config.base_model,
            save.sampling_session_seq_id,
            manifest=manifest_id,
            run_id=run.key.id,
        )
        sampler = await run.patiently(create)
        result = bodies.encode_json({"sampling_session_id": sampler.id})
        await run.settle(entry.seq, Outcome(entry.kind, result=result), target=manifest_id)

    # --- Snapshots ---------------------------------------------------------------------------

    async def snapshot(self, *, optimizer: bool = True) -> None:
        """Take a recovery point at the current position, if one can be had and is `allowed`.

        Raises WorkerDied.
        """
        if not self.allowed:
            return
        seq = self._run.order.position
        started = time.monotonic()
        try:
            copy = await self._capture(optimizer=optimizer)
        except StateGone:
            raise
        except WorkerDied:
            self._died_at_snapshot()
            raise
        except EngineError as error:
            self._failed(seq, error)
            return
        self.computed = 0.0
        failpoints.reach("snapshot.copied")
        self._publish_next(copy, self._finish_snapshot(seq, copy, started))

    async def _finish_snapshot(self, seq: int, copy: _Copy, started: float) -> None:
        run, info = self._run, copy.info
        try:
            try:
                captured = await copy.capture.written()
                self._placement.takes(captured.files)
            except WorkerDied:
                self._died_at_snapshot()
                raise
            failpoints.reach("snapshot.written")
            self._check_turn(seq)
            manifest_id = await self._publish(self.manifest(captured, info, seq))
            failpoints.reach("snapshot.published")
        except (EngineError, RunError) as error:
            self._failed(seq, error)
            return
        self._snapshot_deaths = 0
        # Never ahead of the results that lead to it.
        if not await run.recorded():
            return
        kept: list[Kept] = []
        now = time.time()
        await run.write_patiently(
            lambda c: kept.append(journal.add_snapshot(c, run.key, seq, manifest_id, now=now))
        )
        await self._recorded(seq, kept)
        # Not the copy alone: what follows it takes processors and disk from the training.
        self._cost = time.monotonic() - started

    def _failed(self, seq: int, error: EngineError | RunError) -> None:
        self._run.log.warning("no snapshot", seq=seq, error=error.message)
        self._no_snapshot_before = time.monotonic() + _AFTER_FAILED_SNAPSHOT

    def _died_at_snapshot(self) -> None:
        """The worker died while it took a snapshot. Each death costs all its runs a recovery."""
        self._snapshot_deaths += 1
        if self._snapshot_deaths >= MOST_SNAPSHOT_DEATHS:
            self._no_snapshot_before = time.monotonic() + WITHOUT_SNAPSHOTS
            self._run.log.error(
                "snapshots kill the worker: this run goes on without, and a recovery replays "
                "all it has done meanwhile",
                deaths=self._snapshot_deaths,
                seconds=WITHOUT_SNAPSHOTS,
                position=self._run.order.position,
                snapshot=self.snapshot_at,
            )

    async def settle_with_snapshot(
        self, entry: Entry, outcome: Outcome, snapshot: str, target: str
    ) -> None:
        """Settle an operation and record a recovery point at its position, in one."""
        run = self._run
        if not await run.recorded():  # the results that lead to it
            return
        kept: list[Kept] = []
        now = time.time()

        def also(connection: Connection) -> None:
            kept.append(journal.add_snapshot(connection, run.key, entry.seq, snapshot, now=now))
            if entry.kind == bodies.CREATE_FROM_STATE:
                assert run.info.config is not None
                config = bodies.config_as_json(run.info.config)
                journal.set_config(connection, run.key, config, parent=target)

        await run.settle(entry.seq, outcome, target=target, also=also)
        await self._recorded(entry.seq, kept)

    async def _recorded(self, seq: int, kept: list[Kept]) -> None:
        run = self._run
        self.snapshot_at = max(self.snapshot_at, seq)
        if kept:
            run.order.forget(min(kept[-1].floor, run.order.position))
            with suppress(RunError):
                await run.services.checkpoints.discard(kept[-1].obsolete)

    # --- Both --------------------------------------------------------------------------------

    async def keep_as(self, name: str, kept: float) -> None:
        """Publish the current state as a checkpoint, for a run that has ended.

        It is `kept` for so many seconds from then on.
        """
        seq = self._run.order.position
        copy = await self._capture(optimizer=True)
        captured = await copy.capture.written()
        manifest = self.manifest(captured, copy.info, seq, name=name, expires=time.time() + kept)
        await self._publish(manifest, replace=True)

    async def _capture(self, *, optimizer: bool) -> _Copy:
        """Copy the state, to keep it: no reason for it to stay in the worker's memory."""
        async with self._placement.computing(use=False) as (engine, info):
            capture = await engine.capture(self._placement.key, optimizer=optimizer)
            return _Copy(capture, info, *self._placement.held_by)

    async def _capture_for(self, entry: Entry, *, optimizer: bool) -> _Copy:
        """Copy the state for a save; and write it at once if that is to be blamed for nothing."""
        alone = is_last(entry)
        async with (
            self._placement.computing(alone=alone) as (engine, info),
            executing(self._run, entry),
        ):
            host, life = self._placement.held_by
            capture = await engine.capture(self._placement.key, optimizer=optimizer)
            if alone or entry.begun_again:
                with suppress(EngineError):  # told to whoever publishes it
                    await capture.written()
        return _Copy(capture, info, host, life)

    async def _publish(self, manifest: Manifest, *, replace: bool = False) -> str:
        publish = self._run.services.checkpoints.publish
        return await self._run.persistently(lambda: publish(manifest, replace=replace))

    def _check_turn(self, seq: int) -> None:
        """Raises StateGone when an earlier save was lost with its worker, and is to come first."""
        if self._run.order.any_unsettled_below(seq):
            raise StateGone(f"what precedes position {seq} is to be published first")

    def _publish_next(self, copy: _Copy, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        before = self._tail

        async def after() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await work
            except WorkerDied:
                self._placement.lost_in(copy.host, copy.life)
            # A save that is settled starts the wait for a gap behind it, a lost one is taken again.
            self._run.wake.set()

        self._tail = asyncio.create_task(after())
        copy.host.writes(self._tail)
        self._tail.add_done_callback(self._report)
        return self._tail

    def _report(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._run.broke("publishing failed", error)

    def manifest(
        self,
        captured: Captured,
        info: BaseModelInfo,
        seq: int,
        *,
        kind: CheckpointKind = "training",
        name: str | None = None,
        expires: float | None = None,
        user_metadata: dict[str, str] | None = None,
        request_id: str | None = None,
        parent: str | None = None,
    ) -> Manifest:
        """The manifest of a captured state; without a name, a recovery point's."""
        state = captured.state
        return Manifest(
            kind=kind,
            run=self._run.key.id,
            name=name,
            seq=seq,
            step=state.step,
            base_model=state.config.base_model,
            base_revision=info.revision,
            lora=state.config.lora,
            optimizer=state.config.optimizer if OPTIMIZER_STATE in captured.files else None,
            pending_forward_backwards=state.pending_forward_backwards,
            incomplete=state.incomplete,
            parent=parent,
            owner=self._run.info.owner,
            created=time.time(),
            expires=expires,
            user_metadata=user_metadata,
            fingerprint=info.fingerprint,
            request_id=request_id,
            files=captured.files,
        )


def _decode(entry: Entry, body: bytes) -> _AnySave:
    match entry.kind:
        case bodies.SAVE_WEIGHTS:
            return Save.decode(body)
        case bodies.SAVE_EXTERNAL:
            return SaveExternal.decode(body)
    return SaveSampler.decode(body)


def _key(run: Run, save: _AnySave, name: str) -> NameKey:
    return NameKey(run.key.id, _SEGMENTS[type(save)], name)


def _saved(entry: Entry, key: NameKey) -> Outcome:
    return Outcome(entry.kind, result=bodies.encode_json({"path": f"tinker://{key}"}))
