"""Rebuilding a run's state: the newest intact snapshot, and what followed it, replayed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Protocol

from holdfast.catalog import CatalogUnavailable
from holdfast.engine.interface import OPTIMIZER_STATE, EngineError, RunConfig, WorkerDied
from holdfast.runs import bodies, journal, loading
from holdfast.runs.bodies import Create, CreateFromState, Load
from holdfast.runs.engines import Host
from holdfast.runs.errors import RunError, Waiting
from holdfast.runs.journal import Failure, Record
from holdfast.runs.order import Entry, State
from holdfast.runs.placement import Placement
from holdfast.runs.publishing import Publisher
from holdfast.runs.run import Run
from holdfast.runs.segments import JournalDamaged
from holdfast.store import Manifest

MOST_DEATHS = 5
"""Deaths of the worker during one recovery, after which it is tried again with pauses that grow.
Its neighbours may be the cause as well as itself, and each attempt may cost them a recovery."""
_PAUSE = 5.0
_LONGEST_PAUSE = 300.0
_SEARCH_TAKES = 600.0
"""Seconds for which who waits for a run that cannot be rebuilt waits for what it can go on from."""
_TOLD_EVERY = 5.0
"""Seconds after which the log says again how far a recovery is."""

CLEARING = frozenset({"incomplete_gradients", "gradient_not_finite"})
"""Failures of an optim_step that clear the gradients, hence change the state."""
DAMAGE = frozenset(
    {
        "corrupt",
        "corrupt_name",
        "corrupt_manifest",
        "corrupt_blob",
        "missing",
        "missing_manifest",
        "missing_blob",
        "missing_file",
        "damaged_checkpoint",
    }
)
"""Failures to read a checkpoint that stay. After any other one the same may work later: once there
is memory, the disk answers, or the right base model is served."""
UNREADABLE = frozenset({"io_failed"})
"""Failures to read a checkpoint that may be a bad sector's, or pass ..."""
UNREADABLE_FOR = 60.0
"""... within so many seconds."""
BROKEN_OFF = frozenset({"out_of_memory", "internal"})
"""Failures that the engine did not foresee: what they left of the gradients is not what there was.
The same operation may succeed later, once there is memory."""


class Performs(Protocol):
    """What a replay needs done, by the driver that did it the first time."""

    async def compute(self, entry: Entry, body: bytes) -> bytes: ...

    async def create(self, entry: Entry, config: RunConfig) -> None: ...

    async def restore(
        self, entry: Entry, manifest: Manifest, config: RunConfig, body: Load | CreateFromState
    ) -> None: ...


class Recovery:
    """Brings a run's state back into a worker, and its order to where it had been."""

    def __init__(
        self, run: Run, placement: Placement, publisher: Publisher, driver: Performs
    ) -> None:
        self._run = run
        self._placement = placement
        self._publisher = publisher
        self._driver = driver
        self._from = self._to = -1
        self._deaths = 0
        self.given_up = False
        """The state cannot be brought back, so that the run has ended."""
        self.under_way = False
        """The state is being brought back."""
        self.evicted = False
        """The run left the worker's memory of its own accord: its return is no recovery."""
        self._told = 0.0
        self._replayed = 0
        self._differing: list[int] = []
        self._computed_under: list[dict[str, Any] | None] = []
        """Fingerprints of the recovery points from which on it is replayed, where known."""
        self._unreadable_since: float | None = None
        self.diverged = False
        """A replay gave another result than the first time."""
        self._marked: set[int] = set()

    async def attach(self) -> bool:
        """Make sure that a worker holds the state. False when it was restored, and rewound.

        Raises EngineError when that cannot be done now, and may be later.
        """
        run = self._run
        assert run.info.config is not None
        host = self._host()
        _, _, life = await host.engine()
        if self._placement.held_in(host, life):
            return True
        # What was copied before its worker died may still become the newest snapshot.
        await self._publisher.settled()
        # A replay compares with the outcomes that are in the journal.
        if not await run.recorded():
            return False
        self._marked.clear()
        self.under_way = True
        run.note = None if self.evicted else "recovering"
        self._to = run.order.reached
        points = await run.read_patiently(lambda c: journal.recovery_points(c, run.key))
        self._computed_under = [] if points else [None]
        damaged: dict[int, str] = {}
        unreadable: RunError | EngineError | None = None
        for seq, manifest_id in points:
            fingerprint = None
            try:
                manifest = await run.services.checkpoints.manifest(manifest_id)
                fingerprint = dict(manifest.fingerprint)
                async with host.receiving(self._placement.wanted) as (engine, life):
                    await engine.restore(
                        self._placement.key,
                        run.info.config,
                        manifest.files,
                        optimizer=OPTIMIZER_STATE in manifest.files,
                    )
            except WorkerDied as died:
                waits = self.died()
                if waits is not None:
                    raise waits from died
                return False
            except (RunError, EngineError) as error:
                if error.code in UNREADABLE and self._stays_unreadable():
                    unreadable = error
                elif error.code not in DAMAGE:
                    raise Waiting(error) from error
                run.log.error("snapshot not usable", seq=seq, error=error.message)
                damaged[seq] = error.message
                continue
            finally:
                self._computed_under.append(fingerprint)
            await self._restored(host, life, seq, [p for p in points if p[0] in damaged])
            self._placement.takes(manifest.files)
            return False
        if run.order.replays_from_start:
            # Nothing of it is lost as long as every body is there; no state is needed for that.
            await self._restored(host, life, -1, [p for p in points if p[0] in damaged])
            return False
        if unreadable is not None:
            raise Waiting(unreadable)
        found = "; ".join(f"at position {seq}: {message}" for seq, message in damaged.items())
        await self._stop(
            "state_lost", f"none of the snapshots of run {run.key} can be read any more ({found})"
        )
        return False

    def from_start(self) -> None:
        """A server has begun with a run of which no snapshot was kept: all of it is replayed."""
        if self.under_way:
            return
        self.under_way = True
        self._told = time.monotonic()
        self._from, self._to = -1, self._run.order.reached
        self._replayed, self._differing = 0, []
        self._computed_under = [None]

    async def _restored(
        self, host: Host, life: int, seq: int, damaged: Collection[tuple[int, str]]
    ) -> None:
        run = self._run
        run.order.rewind(seq)
        self._publisher.snapshot_at = self._publisher.changed_at = seq
        self._placement.put(host, life)
        run.log.info("restored", position=seq, to=self._to)
        self._told = time.monotonic()
        self._from = seq
        self._replayed, self._differing = 0, []
        self._unreadable_since = None
        if damaged:  # or else the next snapshot would take the place of an intact one
            seqs = [seq for seq, _ in damaged]
            await run.write_patiently(lambda c: journal.drop_snapshots(c, run.key, seqs))
            with suppress(RunError, CatalogUnavailable):  # the next start finds them
                await run.services.checkpoints.discard_unused(id for _, id in damaged)
        if seq >= self._to:
            await self._complete()

    def _host(self) -> Host:
        """Raises EngineError while the run's base model is not served: it may be again."""
        config = self._run.info.config
        assert config is not None
        try:
            return self._run.services.engines[config.base_model]
        except RunError as error:
            raise Waiting(error) from error

    def _stays_unreadable(self) -> bool:
        """Whether the storage has failed for a while: that is no passing shortage any more."""
        if self._unreadable_since is None:
            self._unreadable_since = time.monotonic()
        return time.monotonic() - self._unreadable_since > UNREADABLE_FOR

    async def redo(self, entry: Entry) -> None:
        """Bring a settled operation's effect about again."""
        run = self._run
        changes = entry.kind in bodies.CHANGES_STATE
        if entry.state is State.SKIPPED or entry.late or not changes:
            return
        record = await run.read_patiently(lambda c: journal.record(c, run.key, entry.seq))
        done, all_ = entry.seq - self._from - 1, self._to - self._from
        run.note = f"recovering, {done} of {all_} operations"
        if (now := time.monotonic()) - self._told >= _TOLD_EVERY:
            self._told = now
            run.log.info("recovering", done=done, of=all_)
        if entry.state is State.FAILED:
            await self._redo_failure(entry, record)
            return
        body = await self._body(entry)
        if body is None:
            return
        match entry.kind:
            case bodies.CREATE:
                self._host()
                config = bodies.config_from_json(Create.decode(body).config)
                await self._driver.create(entry, config)
            case bodies.CREATE_FROM_STATE:
                await self._reload(entry, CreateFromState.decode(body))
            case bodies.LOAD_WEIGHTS:
                await self._reload(entry, Load.decode(body))
            case _:
                self._placement.engine()  # whose failure is none of the operation's
                try:
                    result = await self._driver.compute(entry, body)
                except EngineError as error:
                    run.log.error("replay failed", seq=entry.seq, error=error.message)
                    if error.code in BROKEN_OFF:
                        raise await self._broken_off(entry, error) from error
                    await self._diverged(entry)
                    return
                if journal.digest(result, like=record.result_hash) != record.result_hash:
                    await self._diverged(entry)

    async def _broken_off(self, entry: Entry, error: EngineError) -> EngineError:
        """The failure of a replay that is to begin anew, from the snapshot, in a while."""
        await self._placement.drop()
        return EngineError(
            error.code,
            f"the recovery is tried again: request {entry.seq} succeeded before, and when it was "
            f"replayed {error.message}",
            "server",
        )

    async def passed(self, *, replayed: bool) -> None:
        """What came up is done, again where it was `replayed`. Perhaps that was the last one."""
        if not self.under_way:
            return  # settled ahead of its turn, by a refusal or a skip
        self._replayed += replayed
        if self._run.order.position >= self._to:
            await self._complete()

    async def _complete(self) -> None:
        """The state is back. Keep what its recovery has brought."""
        run, replayed, differing = self._run, self._replayed, self._differing
        self._deaths = 0
        self.under_way = False
        run.note = None
        evicted, self.evicted = self.evicted, False
        if replayed or not evicted:
            run.log.info("recovered", replayed=replayed, diverged=len(differing))
            await run.write_patiently(
                lambda c: journal.note_recovery(c, run.key, replayed=replayed, diverged=differing)
            )
        other = self._other_numerics
        if other or (self._publisher.due and self._publisher.behind):
            try:
                await self._publisher.snapshot()
            except WorkerDied:  # after the replay: none of its deaths
                self._placement.lost()
        if other:  # what is computed now must not be compared with what the old ones give
            await self._publisher.settled()

    async def apply_late_marks(self) -> None:
        """Mark the gradients for forward_backwards that came after they had been skipped."""
        run = self._run
        for seq in run.order.late_marks():
            if seq not in self._marked and self._placement.held:
                engine, _ = self._placement.engine()
                await engine.mark_incomplete(
                    self._placement.key,
                    seq,
                    f"request {seq} came after the run had gone on without it",
                )
                self._marked.add(seq)

    def died(self) -> EngineError | None:
        """The worker died during a replay. After too many times, why it is to wait."""
        self._deaths += 1
        if self._deaths < MOST_DEATHS:
            return None
        return EngineError(
            "worker_dies",
            f"the recovery is tried again: the worker died {self._deaths} times while run "
            f"{self._run.key} was being recovered; the server's log says why",
            "server",
        )

    @property
    def pause(self) -> float:
        """Seconds until a recovery that cannot go on is tried again."""
        return min(_PAUSE * 2.0 ** max(0, self._deaths - MOST_DEATHS), _LONGEST_PAUSE)

    async def _reload(self, entry: Entry, body: Load | CreateFromState) -> None:
        try:
            _, manifest = await loading.resolve(self._run, entry, body)
            config = loading.check(self._run, manifest, body)
            await self._driver.restore(entry, manifest, config, body)
        except (RunError, EngineError) as error:
            if error.code not in DAMAGE:
                raise Waiting(error) from error
            await self._stop(
                "state_lost",
                f"request {entry.seq} of run {self._run.key} loaded 'tinker://{body.key}' and "
                f"cannot be repeated: {error.message}",
            )

    async def _redo_failure(self, entry: Entry, record: Record) -> None:
        assert record.failure is not None
        if entry.seq == 0:  # the server went away before it had taken note of the run's end
            self._run.creation_failed(record.failure)
            return
        engine, _ = self._placement.engine()
        if entry.kind == bodies.FORWARD_BACKWARD:
            # In the engine's words: a mark is part of the state, a replay must give it alike.
            message = f"forward_backward {entry.seq} failed: {record.failure.message}"
            await engine.mark_incomplete(self._placement.key, entry.seq, message)
        elif entry.kind == bodies.OPTIM_STEP and record.failure.code in CLEARING | BROKEN_OFF:
            body = await self._body(entry)
            if body is None:
                return
            if record.failure.code in BROKEN_OFF:
                # What broke it off may not come again; a mark makes it fail, and clear, for sure.
                await engine.mark_incomplete(self._placement.key, entry.seq, "it failed before")
            with suppress(EngineError):
                await self._driver.compute(entry, body)
                await self._diverged(entry)

    async def _body(self, entry: Entry) -> bytes | None:
        """What is to be executed again; None, and the run has stopped, when that is damaged."""
        try:
            return await self._run.body(entry.seq)
        except JournalDamaged as error:
            await self._stop(
                error.code,
                f"request {entry.seq} of run {self._run.key} cannot be replayed, and what followed "
                f"it neither: {error.message}",
            )
            return None

    @property
    def _other_numerics(self) -> bool:
        """Whether what is replayed was perhaps computed under other numerics than it is now."""
        host = self._placement.host
        assert host is not None and host.info is not None
        return any(under != dict(host.info.fingerprint) for under in self._computed_under)

    async def _diverged(self, entry: Entry) -> None:
        if self._other_numerics:
            self._run.log.warning("replay differs under other numerics", seq=entry.seq)
            self._differing.append(entry.seq)
            return
        self.diverged = True
        await self._stop(
            "replay_diverged",
            f"replaying request {entry.seq} of run {self._run.key} gave another result than the "
            "first time, on the same software and device: its state cannot be trusted",
        )

    async def _stop(self, code: str, message: str) -> None:
        """End the run, and say where to go on."""
        run = self._run
        self.given_up = True
        await self._publisher.settled()
        await self._publisher.settle_published()
        checkpoints = run.services.checkpoints
        try:
            async with asyncio.timeout(_SEARCH_TAKES):
                intact = await run.patiently(lambda: checkpoints.newest_intact(run.key.id))
        except TimeoutError:
            advice = "which of its checkpoints are intact could not be found out in time"
        else:
            advice = (
                "none of its checkpoints is intact, if there are any"
                if intact is None
                else f"create a new client from its last intact checkpoint, 'tinker://{intact}'"
            )
        run.end(Failure(code, f"{message}; {advice}", "server"))
