"""Executing a run: what comes up in its order, one after the other, until the run ends."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import suppress
from typing import Literal

from holdfast import failpoints
from holdfast.engine.interface import Engine, EngineError, RunConfig, WorkerDied
from holdfast.runs import bodies, journal, loading
from holdfast.runs.bodies import Create, CreateFromState, Load, OptimStep
from holdfast.runs.engines import NotLoaded, StateGone
from holdfast.runs.errors import RunError, Unavailable, storage_failed
from holdfast.runs.journal import Failure, Outcome
from holdfast.runs.order import Entry, Gap, State
from holdfast.runs.placement import Placement
from holdfast.runs.poison import EndsServer, count_death, executing, is_last, left
from holdfast.runs.publishing import Publisher
from holdfast.runs.recovery import Recovery
from holdfast.runs.run import Run
from holdfast.runs.samplers import Samplers
from holdfast.runs.segments import JournalDamaged
from holdfast.store import Manifest
from holdfast.store.retries import pauses

IDLE_BEFORE_SNAPSHOT = 10.0
"""Seconds without an operation after which what was done since the last snapshot is kept, ..."""
_LONGEST_BEFORE_SNAPSHOT = 600.0
"""... or kept again where that failed, after pauses that grow to this."""
IDLE_BEFORE_EVICTION = 300.0
"""Seconds without an operation after which a run leaves the worker's memory."""
Standing = Literal["live", "idle", "evicted", "recovering"]
"""Has something to do; has nothing, and is in a worker's memory or is not; is being rebuilt."""

MOST_STALLED = 600.0
"""Seconds for which operations wait for a recovery that cannot go on, until they fail."""
LAST_STATE_WAITED_FOR = 120.0
"""Seconds for which a run that has ended tries to bring its state back, to keep it ..."""
LAST_STATE_STORED_WITHIN = 24 * 3600.0
"""... and for which it tries to keep it while the storage takes nothing: nor could its newest
snapshot be kept then, and that may be older."""
LEAVES_WITHIN = 10.0
"""Seconds for which others wait for a run that has ended to leave its worker. It does so as soon as
it is kept, and otherwise nobody can say when."""
_GAP_WATCHED_EVERY = 1.0
_LEAVING_PAUSE = 1.0
_BASE_MODEL_PAUSE = 5.0
_JOURNAL_PAUSE = 1.0
_MOST_ATTEMPTS = 3


class Driver:
    """Executes one run's operations; its saves are published beside, by `Publisher`."""

    def __init__(self, run: Run, samplers: Samplers) -> None:
        self._run = run
        self._placement = Placement(str(run.key), self._asked_to_leave, self._is_wanted)
        self._leaving = False
        self._publisher = Publisher(run, self._placement, samplers)
        self._recovery = Recovery(run, self._placement, self._publisher, self)
        self._stalled_since: float | None = None
        self._keeps_after = IDLE_BEFORE_SNAPSHOT

    def _asked_to_leave(self) -> None:
        """Others need the worker's memory, or it is recycled. A run that computes may stay."""
        self._leaving = True
        self._run.wake.set()

    def _is_wanted(self) -> bool:
        """Whether what the run computes is waited for: a recovery may be of no hurry."""
        return not self._recovery.under_way or self._run.wanted

    @property
    def standing(self) -> Standing:
        """What the run is doing."""
        if self._recovery.under_way:
            return "recovering"
        if self._run.order.unsettled:
            return "live"
        return "idle" if self._placement.held else "evicted"

    async def drive(self) -> None:
        """Run until the run is closing or has ended."""
        run = self._run
        while self._goes_on:
            await self._step()
        await self._publisher.settled()
        if run.ending and run.ended is None:
            await self._finish_begun()
            await self._publisher.settle_published()

    async def _step(self) -> None:
        run, order = self._run, self._run.order
        run.wake.clear()
        if self._placement.recycled and self._state_is_known and not self._recovery.under_way:
            await self._make_way()
        due = order.next(time.monotonic())
        if due is not None and self._leaving:
            self._leaving = False
            self._placement.stays()
        if due is not None:
            self._keeps_after = IDLE_BEFORE_SNAPSHOT
        # A save that was copied but not published when its worker died is taken again.
        if not self._placement.held and order.any_unsettled_below(order.position + 1):
            await self._attach_alone()
        elif due is None:
            run.note = None
            await self._idle()
        elif isinstance(due, Gap):
            await self._wait_for(due)
        else:
            await self._take(due)

    async def _finish_begun(self) -> None:
        """Take the saves again that were lost with a worker after their turn had come.

        Later operations may be done, so that these are not pending: they were passed. And finish
        what was under way when the end was noted, if it was lost with the server.
        """
        run, order = self._run, self._run.order
        while run.ended is None and self._stalled_since is None:
            if not order.any_unsettled_below(max(order.reached, run.begun_to) + 1):
                return
            await self._step()
            await self._publisher.settled()

    async def park(self) -> None:
        """Keep what was done since the last snapshot, for a driver that has stopped.

        Not when it was stopped in the middle of an operation: the worker executes it all the same,
        and what would be kept as the state before it may be the state after it.
        """
        for entry in self._run.order.unsettled:
            await left(self._run, entry)
        with suppress(WorkerDied, EngineError):
            if self._placement.held and self._publisher.behind and self._state_is_known:
                await self._publisher.snapshot()
        await self._publisher.settled()

    def abandon(self) -> None:
        """End a worker that still computes the operation in whose middle this was stopped."""
        host = self._placement.host
        if host is not None and self._placement.held and not self._state_is_known:
            host.kill()

    async def keep_last_state(self, kept: float) -> bool:
        """Keep the state of a run that has ended as a checkpoint, if it was trained at all.

        It is `kept` for so many seconds from when it is stored, which is tried for up to a day.
        False when a worker could not be given the state: its snapshots are what there is. So they
        are after an EngineError or RunError.
        """
        if self._run.order.reached < 1:
            return True
        fixing = asyncio.get_running_loop().call_later(LEAVES_WITHIN, self._placement.fix)
        try:
            return await self._keep_patiently(kept)
        finally:
            fixing.cancel()

    async def _keep_patiently(self, kept: float) -> bool:
        run, order = self._run, self._run.order
        again, attempts = pauses(_BASE_MODEL_PAUSE, within=LAST_STATE_WAITED_FOR), 0
        until_stored = pauses(_BASE_MODEL_PAUSE, 60.0, within=LAST_STATE_STORED_WITHIN)
        while attempts < _MOST_ATTEMPTS:
            try:
                if await self._catch_up():
                    if self._publisher.changed_at >= 1:
                        await self._publisher.keep_as(f"auto.{order.position}", kept)
                    return True
                attempts += 1
            except WorkerDied:
                self._placement.lost()
                attempts += 1
            except (EngineError, RunError) as error:
                is_storage = storage_failed(error)
                pause = next(until_stored if is_storage else again, None)
                if pause is None or (isinstance(error, RunError) and not is_storage):
                    raise
                run.log.warning("the last state cannot be kept yet", error=error.message)
                run.note = error.message
                await asyncio.sleep(pause)
                if is_storage:  # meanwhile no worker was waited for, and none has died
                    again = pauses(_BASE_MODEL_PAUSE, within=LAST_STATE_WAITED_FOR)
                    attempts = 0
        return False

    async def _catch_up(self) -> bool:
        """Bring the state of a run that has ended to where it had been, if it is not there."""
        order = self._run.order
        if not self._state_is_known:
            await self._placement.drop()
        if not await self._recovery.attach() and not await self._recovery.attach():
            return False
        while order.position < order.reached:
            entry = order[order.position + 1]
            await self._recovery.apply_late_marks()
            order.begin(entry.seq)
            await self._recovery.redo(entry)
            if self._recovery.given_up:
                return False
            self._passed(entry)
        await self._recovery.apply_late_marks()
        return True

    @property
    def _state_is_known(self) -> bool:
        """Whether what a worker holds is the state of the position, for all that is known.

        Not after a defect, which may have been met in the middle of an operation.
        """
        return self._run.order.under_way is None and not self._run.broken

    @property
    def diverged(self) -> bool:
        """Whether a replay gave another result than the first time, so that the run ended."""
        return self._recovery.diverged

    async def drop(self) -> None:
        """Take the state out of the worker's memory."""
        await self._placement.drop()

    # --- What comes up -----------------------------------------------------------------------

    async def _idle(self) -> None:
        """Wait for the next operation. Meanwhile keep what there is, later leave the memory."""
        run = self._run
        if self._placement.recycled:  # and it could not leave yet
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEAVING_PAUSE):
                    await run.wake.wait()
            return
        if self._leaving and self._placement.held:
            self._leaving = False
            try:
                await self._keep()
                await self._evict()
                self._placement.stays()
            except (WorkerDied, EngineError):
                self._placement.lost()
        while self._placement.held:
            behind = self._publisher.behind
            with suppress(TimeoutError):
                async with asyncio.timeout(self._keeps_after if behind else IDLE_BEFORE_EVICTION):
                    await run.wake.wait()
                return
            try:
                if not behind:
                    await self._evict()
                    continue
                self._keeps_after = min(2 * self._keeps_after, _LONGEST_BEFORE_SNAPSHOT)
                if not self._publisher.publishing:
                    await self._keep()
            except (WorkerDied, EngineError):
                self._placement.lost()
        await run.wake.wait()

    async def _keep(self) -> None:
        if self._publisher.behind:
            await self._publisher.snapshot()

    async def _make_way(self) -> None:
        """Leave a worker that is being recycled, whatever is pending: that waits for the next one.

        Where no snapshot can be had now the run goes on, and tries again after its next operation.
        """
        self._leaving = False
        try:
            await self._publisher.settled()
            await self._keep()
            await self._evict(pending=True)
        except (WorkerDied, EngineError):
            self._placement.lost()

    async def _evict(self, *, pending: bool = False) -> None:
        """Leave the worker's memory; the next operation restores the snapshot.

        Not when one is `pending`, unless that is to do so.
        """
        await self._publisher.settled()
        if not self._publisher.behind and (pending or not self._run.order.unsettled):
            await self._placement.drop()
            self._recovery.evicted = True
            self._run.log.info("left the worker's memory", position=self._run.order.position)

    async def _wait_for(self, gap: Gap) -> None:
        run = self._run
        left = gap.due - time.monotonic()
        if left <= 0:
            try:
                await run.skip(gap.seq)
            except Unavailable as error:
                run.log.warning("number not skipped yet", seq=gap.seq, error=error.message)
                await asyncio.sleep(_JOURNAL_PAUSE)
            return
        run.note = f"waiting for request {gap.seq}, at most {left:.0f} s more"
        began, pause = time.monotonic(), min(left, _GAP_WATCHED_EVERY)
        run.awaited = gap.seq
        try:
            async with asyncio.timeout(pause):
                await run.wake.wait()
        except TimeoutError:
            pass
        finally:
            run.awaited = None
        if time.monotonic() - began - pause > 1.0:
            run.order.wait_anew()  # suspended: nobody could send it

    async def _attach_alone(self) -> None:
        try:
            await self._recovery.attach()
            if not self._recovery.under_way:
                self._stalled_since = None
        except EngineError as error:
            await self._stalled(error)

    async def _stalled(self, error: EngineError) -> None:
        """A recovery, or a creation, cannot go on for now. What is pending is told after a while.

        From then on it is tried again when there is a new request.
        """
        run, now = self._run, time.monotonic()
        run.log.error("recovery waits", error=error.message)
        run.note = error.message
        if self._stalled_since is None:
            self._stalled_since = now
        if now - self._stalled_since > MOST_STALLED:
            run.log.error("what is pending fails, for it has waited long enough")
            failure = Failure(error.code, error.message, error.category)
            if run.order.reached < 0:  # it was its creation that waited
                run.settle(0, Outcome(run.order[0].kind, failure=failure))
                run.creation_failed(failure)
                return
            await self._publisher.settle_published()
            run.fail_pending(failure)
        until = now + self._recovery.pause
        while self._goes_on and (left := until - time.monotonic()) > 0:
            run.wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await run.wake.wait()
        if self._goes_on and not run.order.unsettled:
            await run.wake.wait()

    @property
    def _goes_on(self) -> bool:
        return not self._run.closing and self._run.ended is None

    async def _take(self, entry: Entry) -> None:
        run, order = self._run, self._run.order
        creating = entry.kind in (bodies.CREATE, bodies.CREATE_FROM_STATE)
        try:
            if not creating and not await self._recovery.attach():
                return  # rewound: something else comes up now
            await self._recovery.apply_late_marks()
            if order.held or run.ended is not None:
                return
            replayed = entry.state.settled
            order.begin(entry.seq)
            if replayed:
                if creating:
                    self._recovery.from_start()
                await self._recovery.redo(entry)
                if run.ended is None:
                    self._passed(entry)
            else:
                if not creating:  # that may be what waits
                    self._stalled_since = None
                await self._execute(entry)
            if run.ended is None:
                again = replayed and entry.kind in bodies.CHANGES_STATE
                await self._recovery.passed(replayed=again)
                if not self._recovery.under_way:
                    self._stalled_since = None
        except StateGone:  # it died before this operation, which comes up again
            self._placement.lost()
            if entry.state is State.RUNNING and entry.seq > order.position:
                order.again(entry.seq)
        except WorkerDied:
            await self._worker_died(entry)
        except EngineError as error:  # there is no worker, or no state: it was not executed
            if entry.state is State.RUNNING:
                order.again(entry.seq)
            await self._stalled(error)

    async def _execute(self, entry: Entry) -> None:
        run = self._run
        run.note = None
        try:
            body = await run.body(entry.seq)
        except JournalDamaged as error:
            await self._cannot_execute(entry, error)
            return
        try:
            match entry.kind:
                case bodies.SAVE_WEIGHTS | bodies.SAVE_SAMPLER | bodies.SAVE_EXTERNAL:
                    await self._publisher.save(entry)
                    return
                case bodies.CREATE:
                    await self.create(entry, bodies.config_from_json(Create.decode(body).config))
                    self._passed(entry)
                    run.settle(entry.seq, Outcome(entry.kind, result=b"{}"))
                case bodies.CREATE_FROM_STATE:
                    await self._load(entry, CreateFromState.decode(body))
                case bodies.LOAD_WEIGHTS:
                    await self._load(entry, Load.decode(body))
                case _:
                    result = await self.compute(entry, body)
                    failpoints.reach("operation.computed")
                    self._passed(entry)
                    run.settle(entry.seq, Outcome(entry.kind, result=result))
        except NotLoaded:
            raise
        except EndsServer as found:
            await self._give_up(entry, found.failure)
            return
        except (EngineError, RunError) as error:
            self._fail(entry, Failure(error.code, error.message, error.category))
            return
        # A library of another version would draw other initial weights.
        if self._publisher.due or entry.kind == bodies.CREATE:
            await self._snapshot(optimizer=entry.kind != bodies.CREATE)

    async def _cannot_execute(self, entry: Entry, error: JournalDamaged) -> None:
        """Fail an operation whose body is damaged, as if the engine had refused it."""
        message = f"the request was damaged before it was executed: {error.message}; send it again"
        await self._give_up(entry, Failure(error.code, message, error.category))

    async def _give_up(self, entry: Entry, failure: Failure) -> None:
        """Fail an operation without executing it."""
        if entry.kind == bodies.FORWARD_BACKWARD:
            engine, _ = self._placement.engine()
            mark = f"forward_backward {entry.seq} failed: {failure.message}"
            await engine.mark_incomplete(self._placement.key, entry.seq, mark)
        self._fail(entry, failure)

    async def _snapshot(self, *, optimizer: bool) -> None:
        try:
            await self._publisher.snapshot(optimizer=optimizer)
        except WorkerDied:  # the operation itself is done
            self._placement.lost()

    def _passed(self, entry: Entry) -> None:
        self._run.order.passed(entry.seq)
        if entry.kind in bodies.CHANGES_STATE:
            self._publisher.changed_at = entry.seq

    def _fail(self, entry: Entry, failure: Failure) -> None:
        self._passed(entry)  # a mark, or cleared gradients, is a change too
        self._run.settle(entry.seq, Outcome(entry.kind, failure=failure))
        if entry.seq == 0:
            self._run.creation_failed(failure)

    async def _worker_died(self, entry: Entry) -> None:
        run = self._run
        self._placement.lost()
        if entry.state.settled:
            waits = self._recovery.died()
            if waits is not None:
                await self._stalled(waits)
            return
        if entry.state is not State.RUNNING:
            return  # it died at a mark, before the operation
        # Under way until that is counted: what comes late meanwhile takes effect after it.
        failure = await count_death(run, entry)
        if run.ended is not None:
            return  # meanwhile, and this operation failed with it
        if failure is None:
            run.order.again(entry.seq)
        else:
            self._fail(entry, failure)

    # --- What an operation does, the first time and in a replay ------------------------------

    async def compute(self, entry: Entry, body: bytes) -> bytes:
        """Perform a forward, forward_backward or optim_step; the bytes of its result."""
        async with (
            self._placement.computing(alone=is_last(entry)) as (engine, _),
            executing(self._run, entry),
        ):
            started = time.monotonic()
            result = await self._computed_by(engine, entry, body)
            # Without the wait for the turn, in which others computed.
            self._publisher.computed += time.monotonic() - started
            return result

    async def _computed_by(self, engine: Engine, entry: Entry, body: bytes) -> bytes:
        key = self._placement.key
        match entry.kind:
            case bodies.FORWARD:
                return await engine.forward(key, entry.seq, body)
            case bodies.FORWARD_BACKWARD:
                return await engine.forward_backward(key, entry.seq, body)
            case bodies.OPTIM_STEP:
                params = OptimStep.decode(body).params
                return bodies.encode_json(await engine.optim_step(key, params))
        raise AssertionError(f"an operation of kind {entry.kind!r}")

    async def create(self, entry: Entry, config: RunConfig) -> None:
        """Give a worker the initial state."""
        host = self._run.services.engines[config.base_model]
        async with host.receiving(self._is_wanted) as (engine, life), executing(self._run, entry):
            await engine.create(self._placement.key, config)
        self._placement.put(host, life)

    async def restore(
        self, entry: Entry, manifest: Manifest, config: RunConfig, body: Load | CreateFromState
    ) -> None:
        """Give a worker the state of a checkpoint."""
        key, files = self._placement.key, manifest.files
        if self._placement.held:  # as it must be, unless the run begins with this
            async with self._placement.computing() as (engine, _), executing(self._run, entry):
                await engine.restore(key, config, files, optimizer=body.optimizer)
        else:
            host = self._run.services.engines[config.base_model]
            receiving = host.receiving(self._is_wanted)
            async with receiving as (engine, life), executing(self._run, entry):
                await engine.restore(key, config, files, optimizer=body.optimizer)
            self._placement.put(host, life)
        self._placement.takes(files)

    async def _load(self, entry: Entry, body: Load | CreateFromState) -> None:
        run, checkpoints = self._run, self._run.services.checkpoints
        await self._publisher.settled()
        if isinstance(body, Load):
            # A save that was lost with its worker may be the one to be read.
            self._placement.engine()
        manifest_id, manifest = await run.persistently(lambda: loading.resolve(run, entry, body))
        config = loading.check(run, manifest, body)
        if self._placement.held:
            _, info = self._placement.engine()
        else:
            _, info, _ = await run.services.engines[config.base_model].engine()
        loading.check_revision(body.key, manifest, info)
        await run.write_patiently(lambda c: journal.set_target(c, run.key, entry.seq, manifest_id))
        # The state from here on hangs on these blobs, whatever becomes of the name. Published
        # before the state is touched: a load that fails changes nothing.
        loaded = loading.loaded(manifest, config, optimizer=body.optimizer)
        base = self._publisher.manifest(loaded, info, entry.seq, parent=manifest_id)
        base_id = await run.persistently(lambda: checkpoints.publish(base))
        failpoints.reach("load.published")
        try:
            await self.restore(entry, manifest, config, body)
        except (EngineError, WorkerDied, EndsServer):
            with suppress(RunError):  # the next start finds it
                await checkpoints.discard([base_id])
            raise
        failpoints.reach("load.restored")
        run.info = dataclasses.replace(run.info, config=config)
        result = loading.result(body, manifest, loaded.state, info)
        self._passed(entry)
        await self._publisher.settle_with_snapshot(
            entry, Outcome(entry.kind, result=result), base_id, manifest_id
        )
