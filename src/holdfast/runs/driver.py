"""Executing a run: its operations in order, its saves beside them, its recovery after a death."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection

from holdfast.engine import interface as engine_interface
from holdfast.engine.interface import (
    OPTIMIZER_STATE,
    BaseModelInfo,
    Capture,
    Captured,
    Engine,
    EngineError,
    RunConfig,
    StateInfo,
    WorkerDied,
)
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import Create, CreateFromState, Load, OptimStep, Save, SaveSampler
from holdfast.runs.engines import Host
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Failure, Kept, Outcome
from holdfast.runs.order import Entry, Gap, State
from holdfast.runs.run import Run
from holdfast.runs.samplers import Samplers
from holdfast.store import Incomplete, Manifest, NameKey

REPLAY_BOUND = 30.0
"""Seconds of compute after which a snapshot is taken."""
SNAPSHOT_SHARE = 0.02
"""A snapshot may stall the run by this share of the compute since the last one."""
MOST_DEATHS = 3
"""Deaths of the worker while the same operation ran, after which the operation fails."""
MOST_REPLAY_DEATHS = 5
"""Deaths of the worker during one recovery, after which the run stops."""

CLEARING = frozenset({"incomplete_gradients", "gradient_not_finite"})
"""Failures of an optim_step that clear the gradients, hence change the state."""


class Driver:
    """Executes what comes up in one run's order, until the run ends.

    The training state lives in one life of one worker. When that ends, the state is rebuilt from
    the newest intact snapshot, and the order brings up again what followed it.
    """

    def __init__(self, run: Run, samplers: Samplers) -> None:
        self._run = run
        self._key = str(run.key)
        self._samplers = samplers
        self._host: Host | None = None
        self._life: int | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._computed = 0.0
        self._copy_seconds = 0.0
        self._snapshot_at = -1
        self._snapshot_numerics: dict[str, Any] | None = None
        self._replay_to = -1
        self._replay_deaths = 0
        self._marked: set[int] = set()
        self._placed: int | None = None

    async def drive(self) -> None:
        """Run until the run is closing or has ended."""
        run, order = self._run, self._run.order
        while not run.closing and run.ended is None:
            run.wake.clear()
            due = order.next(time.monotonic())
            lost = self._life is None and any(e.seq <= order.position for e in order.unsettled)
            if lost:
                await self._attach()
            elif due is None:
                run.note = None
                await run.wake.wait()
            elif isinstance(due, Gap):
                await self._wait_for(due)
            else:
                await self._take(due)
        if self._publishing is not None:
            await asyncio.wait([self._publishing])

    async def last_state(self, name: str, expires: float) -> str | None:
        """Keep the final state under a name, for a run whose driver has stopped.

        None when there is no training to keep or the state is no longer there.
        """
        run = self._run
        if run.order.position < 1 or self._life is None or self._host is None:
            return None
        engine, info, life = await self._host.engine()
        if life != self._life:
            return None
        async with self._host.turn:
            capture = await engine.capture(self._key)
        captured = await capture.written()
        manifest = self._manifest(captured, info, run.order.position, name=name, expires=expires)
        return await run.services.checkpoints.publish(manifest, replace=True)

    async def drop(self) -> None:
        """Take the state out of the worker's memory."""
        if self._life is not None and self._host is not None:
            with suppress(WorkerDied, EngineError):
                engine, _, life = await self._host.engine()
                if life == self._life:
                    await engine.drop(self._key)
        self._life = None

    # --- What comes up -----------------------------------------------------------------------

    async def _wait_for(self, gap: Gap) -> None:
        run = self._run
        left = gap.due - time.monotonic()
        if left <= 0:
            await run.skip(gap.seq)
            return
        run.note = f"waiting for request {gap.seq}, at most {left:.0f} s more"
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await run.wake.wait()

    async def _take(self, entry: Entry) -> None:
        run, order = self._run, self._run.order
        creating = entry.kind in (bodies.CREATE, bodies.CREATE_FROM_STATE)
        try:
            if not creating and not await self._attach():
                return  # rewound: something else comes up now
            await self._apply_late_marks()
            if entry.state is State.ACCEPTED:
                order.begin(entry.seq)
                await self._execute(entry)
            else:
                await self._redo(entry)
                order.passed(entry.seq)
                if order.position == self._replay_to and self._snapshot_is_wanted():
                    await self._snapshot()
        except WorkerDied:
            await self._worker_died(entry)
        except EngineError as error:
            # The base model cannot be loaded: nothing was executed.
            if entry.state.settled:
                run.log.error("recovery waits for the base model", error=error.message)
                run.note = error.message
                await asyncio.sleep(5)
            else:
                self._fail(entry, Failure(error.code, error.message, error.category))

    async def _execute(self, entry: Entry) -> None:
        run = self._run
        run.note = None
        if entry.kind in (bodies.SAVE_WEIGHTS, bodies.SAVE_SAMPLER):
            await self._save(entry)
            return
        started = time.monotonic()
        body = await run.body(entry.seq)
        try:
            match entry.kind:
                case bodies.CREATE:
                    await self._create(entry, Create.decode(body))
                case bodies.CREATE_FROM_STATE:
                    await self._load(entry, CreateFromState.decode(body))
                case bodies.LOAD_WEIGHTS:
                    await self._load(entry, Load.decode(body))
                case _:
                    result = await self._compute(entry, body)
                    run.order.passed(entry.seq)
                    run.settle(entry.seq, Outcome(entry.kind, result=result))
        except (EngineError, RunError) as error:
            self._fail(entry, Failure(error.code, error.message, error.category))
            return
        self._computed += time.monotonic() - started
        if self._snapshot_is_due():
            await self._snapshot()

    async def _compute(self, entry: Entry, body: bytes) -> bytes:
        """Perform a forward, forward_backward or optim_step; the bytes of its result."""
        engine, _ = await self._engine()
        assert self._host is not None
        async with self._host.turn:
            match entry.kind:
                case bodies.FORWARD:
                    return await engine.forward(self._key, entry.seq, body)
                case bodies.FORWARD_BACKWARD:
                    return await engine.forward_backward(self._key, entry.seq, body)
                case bodies.OPTIM_STEP:
                    params = OptimStep.decode(body).params
                    return bodies.encode_json(await engine.optim_step(self._key, params))
        raise AssertionError(f"an operation of kind {entry.kind!r}")

    def _fail(self, entry: Entry, failure: Failure) -> None:
        self._run.order.passed(entry.seq)
        self._run.settle(entry.seq, Outcome(entry.kind, failure=failure))
        if entry.seq == 0:
            self._run.end(Failure("creation_failed", f"the run was not created: {failure.message}"))

    # --- Creating and loading ----------------------------------------------------------------

    async def _create(self, entry: Entry, body: Create) -> None:
        run = self._run
        config = bodies.config_from_json(body.config)
        await self._create_state(config)
        run.order.passed(entry.seq)
        run.settle(entry.seq, Outcome(entry.kind, result=b"{}"))
        await self._snapshot(optimizer=False)

    async def _create_state(self, config: RunConfig) -> None:
        self._host = self._run.services.engines[config.base_model]
        engine, info, life = await self._host.engine()
        async with self._host.turn:
            await engine.create(self._key, config)
        self._life = life
        self._snapshot_numerics = dict(info.fingerprint)

    async def _load(self, entry: Entry, body: Load | CreateFromState) -> None:
        run = self._run
        if self._publishing is not None:
            await asyncio.wait([self._publishing])
        manifest_id, manifest = await self._resolve(entry, body)
        config = self._check(manifest, body)
        engine, info = await self._place(manifest, config, body)
        await run.services.catalog.write(
            lambda c: journal.set_target(c, run.key, entry.seq, manifest_id)
        )
        # The state from here on hangs on these blobs, whatever becomes of the name. Published
        # before the state is touched: a load that fails changes nothing.
        loaded = _loaded(manifest, config, optimizer=body.optimizer)
        base = self._manifest(loaded, info, entry.seq, parent=manifest_id)
        base_id = await run.services.checkpoints.publish(base)
        try:
            await self._restore(engine, config, manifest, body)
        except EngineError:
            await run.services.checkpoints.discard([base_id])
            raise
        run.info = dataclasses.replace(run.info, config=config)
        state = loaded.state
        result = bodies.encode_json(
            {
                "path": f"tinker://{body.key}",
                "step": state.step,
                "pending_forward_backwards": state.pending_forward_backwards,
                "incomplete": None if state.incomplete is None else state.incomplete.message,
                "same_numerics": dict(manifest.fingerprint) == dict(info.fingerprint),
            }
        )
        run.order.passed(entry.seq)
        await self._settle_with_snapshot(entry, result, base_id, manifest_id)

    async def _resolve(self, entry: Entry, body: Load | CreateFromState) -> tuple[str, Manifest]:
        """The manifest a load reads: fixed by its first execution."""
        run = self._run
        record = await run.services.catalog.read(lambda c: journal.record(c, run.key, entry.seq))
        if record.target is not None:
            return record.target, await run.services.checkpoints.manifest(record.target)
        if body.segment != "weights":
            raise RunError(
                "not_a_training_checkpoint",
                f"'tinker://{body.key}' holds weights for sampling only; training continues from "
                "a path with /weights/, as save_state gives it",
            )
        return await run.services.checkpoints.resolve(body.key, body.readers)

    def _check(self, manifest: Manifest, body: Load | CreateFromState) -> RunConfig:
        """The configuration that a checkpoint is loaded into. RunError unless it fits."""
        if body.optimizer and OPTIMIZER_STATE not in manifest.files:
            raise RunError(
                "no_optimizer_state",
                f"'tinker://{body.key}' has no optimizer state; load it without optimizer",
            )
        config = self._run.info.config
        if isinstance(body, CreateFromState):
            config = bodies.config_of(manifest)
            if body.base_model is not None:
                config = dataclasses.replace(config, base_model=body.base_model)
            if body.optimizer_type is not None:
                config = dataclasses.replace(config, optimizer=body.optimizer_type)
        assert config is not None
        _check_fit(body.key, manifest, config, optimizer=body.optimizer)
        return config

    async def _place(
        self, manifest: Manifest, config: RunConfig, body: Load | CreateFromState
    ) -> tuple[Engine, BaseModelInfo]:
        """The worker for a configuration; RunError when its base model has other weights."""
        self._host = self._run.services.engines[config.base_model]
        engine, info, life = await self._host.engine()
        if manifest.base_revision != info.revision:
            raise RunError(
                "base_revision_mismatch",
                f"'tinker://{body.key}' was trained on another version of base model "
                f"{config.base_model!r}: its files hash to {manifest.base_revision}, those "
                f"served here to {info.revision}",
            )
        if self._life is not None and life != self._life:
            raise WorkerDied(f"the worker that held run {self._key} is gone")
        self._placed = life
        return engine, info

    async def _restore(
        self, engine: Engine, config: RunConfig, manifest: Manifest, body: Load | CreateFromState
    ) -> None:
        assert self._host is not None
        async with self._host.turn:
            await engine.restore(self._key, config, manifest.files, optimizer=body.optimizer)
        self._life = self._placed

    async def _settle_with_snapshot(
        self, entry: Entry, result: bytes, snapshot: str, target: str
    ) -> None:
        kept: list[Kept] = []
        now = time.time()

        def also(connection: Connection) -> None:
            kept.append(
                journal.add_snapshot(connection, self._run.key, entry.seq, snapshot, now=now)
            )
            if entry.kind == bodies.CREATE_FROM_STATE:
                config = self._run.info.config
                assert config is not None
                journal.set_config(
                    connection, self._run.key, bodies.config_as_json(config), parent=target
                )

        outcome = Outcome(entry.kind, result=result)
        await self._run.settle(entry.seq, outcome, target=target, also=also)
        await self._snapshot_recorded(entry.seq, kept)

    # --- Saves and snapshots -----------------------------------------------------------------

    async def _save(self, entry: Entry) -> None:
        run = self._run
        body = await run.body(entry.seq)
        save = (Save if entry.kind == bodies.SAVE_WEIGHTS else SaveSampler).decode(body)
        segment = "weights" if isinstance(save, Save) else "sampler_weights"
        if save.name is not None:
            key = NameKey(run.key.id, segment, save.name)
            made = await run.services.checkpoints.made_by(key, run.key.request_id(entry.seq))
            if made is not None:
                run.order.passed(entry.seq)
                run.settle(entry.seq, _saved(entry, key), target=made)
                return
        capture = await self._capture(optimizer=isinstance(save, Save))
        run.order.passed(entry.seq)
        self._publish_next(self._finish_save(entry, save, segment, capture))

    async def _finish_save(
        self, entry: Entry, save: Save | SaveSampler, segment: str, capture: Capture
    ) -> None:
        run = self._run
        try:
            captured = await capture.written()
            _, info = await self._engine()
            now = time.time()
            manifest = self._manifest(
                captured,
                info,
                entry.seq,
                kind="training" if isinstance(save, Save) else "sampler",
                name=save.name,
                created=now,
                expires=None if save.ttl_seconds is None else now + save.ttl_seconds,
                user_metadata=save.user_metadata,
                request_id=run.key.request_id(entry.seq),
            )
            replace = isinstance(save, Save) and save.overwrite
            manifest_id = await run.services.checkpoints.publish(manifest, replace=replace)
            if isinstance(save, Save):
                base = self._manifest(captured, info, entry.seq)
                base_id = await run.services.checkpoints.publish(base)
                outcome = _saved(entry, NameKey(run.key.id, segment, save.name))
                assert outcome.result is not None
                await self._settle_with_snapshot(entry, outcome.result, base_id, manifest_id)
            elif save.name is not None:
                outcome = _saved(entry, NameKey(run.key.id, segment, save.name))
                await run.settle(entry.seq, outcome, target=manifest_id)
            else:
                assert run.info.config is not None
                sampler = await self._samplers.create(
                    run.info.session_id,
                    run.info.owner,
                    run.info.config.base_model,
                    save.sampling_session_seq_id,
                    manifest=manifest_id,
                )
                result = bodies.encode_json({"sampling_session_id": sampler.id})
                outcome = Outcome(entry.kind, result=result)
                await run.settle(entry.seq, outcome, target=manifest_id)
        except (EngineError, RunError) as error:
            failure = Failure(error.code, error.message, error.category)
            await run.settle(entry.seq, Outcome(entry.kind, failure=failure))

    async def _snapshot(self, *, optimizer: bool = True) -> None:
        """Take a recovery point at the current position."""
        seq = self._run.order.position
        started = time.monotonic()
        capture = await self._capture(optimizer=optimizer)
        self._copy_seconds = time.monotonic() - started
        self._computed = 0.0
        self._publish_next(self._finish_snapshot(seq, capture))

    async def _finish_snapshot(self, seq: int, capture: Capture) -> None:
        run = self._run
        try:
            captured = await capture.written()
            _, info = await self._engine()
            manifest = self._manifest(captured, info, seq)
            manifest_id = await run.services.checkpoints.publish(manifest)
        except (EngineError, RunError) as error:
            run.log.warning("no snapshot", seq=seq, error=error.message)
            return
        await run.recorded()
        kept: list[Kept] = []
        now = time.time()
        await run.write_patiently(
            lambda c: kept.append(journal.add_snapshot(c, run.key, seq, manifest_id, now=now))
        )
        self._snapshot_numerics = dict(info.fingerprint)
        await self._snapshot_recorded(seq, kept)

    async def _snapshot_recorded(self, seq: int, kept: list[Kept]) -> None:
        run = self._run
        self._snapshot_at = max(self._snapshot_at, seq)
        self._computed = 0.0
        if kept:
            run.order.forget(min(kept[-1].floor, run.order.position))
            with suppress(RunError):
                await run.services.checkpoints.discard(kept[-1].obsolete)

    def _snapshot_is_due(self) -> bool:
        if self._publishing is not None and not self._publishing.done():
            return False
        return self._computed >= min(REPLAY_BOUND, self._copy_seconds / SNAPSHOT_SHARE)

    def _snapshot_is_wanted(self) -> bool:
        """After a recovery: when it took long, or went over to other numerics."""
        assert self._host is not None and self._host.info is not None
        other = self._snapshot_numerics != dict(self._host.info.fingerprint)
        return other or self._snapshot_is_due()

    async def _capture(self, *, optimizer: bool) -> Capture:
        engine, _ = await self._engine()
        assert self._host is not None
        async with self._host.turn:
            return await engine.capture(self._key, optimizer=optimizer)

    def _publish_next(self, work: Coroutine[Any, Any, None]) -> None:
        """Publish beside the training, but one after the other and in order."""
        before = self._publishing

        async def after() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await work
            except WorkerDied:
                self._lost()
                self._run.wake.set()

        self._publishing = asyncio.create_task(after())
        self._publishing.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._run.log.error("publishing failed", exc_info=task.exception())

    def _manifest(
        self,
        captured: Captured,
        info: BaseModelInfo,
        seq: int,
        *,
        kind: Any = "training",
        name: str | None = None,
        created: float | None = None,
        expires: float | None = None,
        user_metadata: dict[str, str] | None = None,
        request_id: str | None = None,
        parent: str | None = None,
    ) -> Manifest:
        state = captured.state
        mark = state.incomplete
        return Manifest(
            kind=kind,
            run=self._run.key.id,
            name=name,
            seq=seq,
            step=state.step,
            base_model=state.config.base_model,
            base_revision=info.revision,
            lora=bodies.manifest_lora(state.config),
            optimizer=state.config.optimizer if OPTIMIZER_STATE in captured.files else None,
            pending_forward_backwards=state.pending_forward_backwards,
            incomplete=None if mark is None else Incomplete(mark.seq, mark.message),
            parent=parent,
            owner=self._run.info.owner,
            created=time.time() if created is None else created,
            expires=expires,
            user_metadata=user_metadata,
            fingerprint=info.fingerprint,
            request_id=request_id,
            files=captured.files,
        )

    # --- Recovery ----------------------------------------------------------------------------

    async def _engine(self) -> tuple[Engine, BaseModelInfo]:
        """The worker that holds the run's state. Raises WorkerDied when that is gone."""
        assert self._host is not None
        engine, info, life = await self._host.engine()
        if life != self._life:
            raise WorkerDied(f"the worker that held run {self._key} is gone")
        return engine, info

    async def _attach(self) -> bool:
        """Make sure that the worker holds the state. False when it was restored, and rewound."""
        run = self._run
        assert run.info.config is not None
        self._host = run.services.engines[run.info.config.base_model]
        engine, _, life = await self._host.engine()
        if self._life == life:
            return True
        self._life = None
        self._marked.clear()
        run.note = "recovering"
        points = await run.services.catalog.read(lambda c: journal.recovery_points(c, run.key))
        self._replay_to = max(self._replay_to, run.order.settled_through)
        for seq, manifest_id in points:
            try:
                manifest = await run.services.checkpoints.manifest(manifest_id)
                async with self._host.turn:
                    await engine.restore(
                        self._key,
                        run.info.config,
                        manifest.files,
                        optimizer=OPTIMIZER_STATE in manifest.files,
                    )
            except (RunError, EngineError) as error:
                run.log.error("snapshot not usable", seq=seq, error=error.message)
                continue
            run.order.rewind(seq)
            self._snapshot_numerics = dict(manifest.fingerprint)
            self._life = life
            run.log.info("restored", position=seq, to=self._replay_to)
            return False
        if points:
            run.end(
                Failure(
                    "state_lost",
                    f"none of the snapshots of run {run.key} can be read any more; create a new "
                    "client from its last checkpoint",
                    "server",
                )
            )
            return False
        run.order.rewind(-1)
        self._life = life
        return False

    async def _redo(self, entry: Entry) -> None:
        """Bring a settled operation's effect about again."""
        run = self._run
        record = await run.services.catalog.read(lambda c: journal.record(c, run.key, entry.seq))
        run.note = f"recovering, operation {entry.seq} of {self._replay_to}"
        if entry.state is State.FAILED:
            await self._redo_failure(entry, record)
        elif entry.state is State.DONE and entry.kind in bodies.CHANGES_STATE:
            assert record.body is not None
            started = time.monotonic()
            if entry.kind == bodies.CREATE:
                await self._create_state(bodies.config_from_json(Create.decode(record.body).config))
                return
            if entry.kind in (bodies.LOAD_WEIGHTS, bodies.CREATE_FROM_STATE):
                cls = Load if entry.kind == bodies.LOAD_WEIGHTS else CreateFromState
                body = cls.decode(record.body)
                _, manifest = await self._resolve(entry, body)
                config = self._check(manifest, body)
                engine, _ = await self._place(manifest, config, body)
                await self._restore(engine, config, manifest, body)
                return
            result = await self._compute(entry, record.body)
            self._computed += time.monotonic() - started
            if journal.digest(result) != record.result_hash:
                self._diverged(entry)

    async def _redo_failure(self, entry: Entry, record: journal.Record) -> None:
        assert record.failure is not None
        engine, _ = await self._engine()
        if entry.kind == bodies.FORWARD_BACKWARD:
            await engine.mark_incomplete(self._key, entry.seq, record.failure.message)
        elif entry.kind == bodies.OPTIM_STEP and record.failure.code in CLEARING:
            assert record.body is not None
            with suppress(EngineError):
                await self._compute(entry, record.body)
                self._diverged(entry)

    def _diverged(self, entry: Entry) -> None:
        run = self._run
        assert self._host is not None and self._host.info is not None
        if self._snapshot_numerics != dict(self._host.info.fingerprint):
            run.log.warning("replay differs under other numerics", seq=entry.seq)
            return
        run.end(
            Failure(
                "replay_diverged",
                f"replaying request {entry.seq} of run {run.key} gave another result than the "
                "first time, on the same software and device: its state cannot be trusted. Create "
                "a new client from its last checkpoint",
                "server",
            )
        )

    async def _apply_late_marks(self) -> None:
        run = self._run
        for seq in run.order.late_marks():
            if seq not in self._marked and self._life is not None:
                engine, _ = await self._engine()
                await engine.mark_incomplete(
                    self._key, seq, f"request {seq} came after the run had gone on without it"
                )
                self._marked.add(seq)

    async def _worker_died(self, entry: Entry) -> None:
        run = self._run
        self._lost()
        if entry.state.settled:
            self._replay_deaths += 1
            if self._replay_deaths >= MOST_REPLAY_DEATHS:
                run.end(
                    Failure(
                        "recovery_failed",
                        f"the worker died {self._replay_deaths} times while run {run.key} was "
                        "being recovered; create a new client from its last checkpoint",
                        "server",
                    )
                )
            return
        if entry.seq > run.order.position:
            run.order.again(entry.seq)
        attempts = await run.services.catalog.write(
            lambda c: journal.count_attempt(c, run.key, entry.seq)
        )
        run.log.error("worker died", seq=entry.seq, kind=entry.kind, attempts=attempts)
        if attempts >= MOST_DEATHS:
            failure = Failure(
                "operation_kills_worker",
                f"the worker died {attempts} times while it executed this {entry.kind}; the run "
                "goes on from before it",
                "server",
            )
            run.order.begin(entry.seq)
            self._fail(entry, failure)

    def _lost(self) -> None:
        if self._host is not None and self._life is not None:
            self._host.lost(self._life)
        self._life = None


def _saved(entry: Entry, key: NameKey) -> Outcome:
    return Outcome(entry.kind, result=bodies.encode_json({"path": f"tinker://{key}"}))


def _loaded(manifest: Manifest, config: RunConfig, *, optimizer: bool) -> Captured:
    """What a load leaves behind: a function of the checkpoint alone."""
    if not optimizer:
        files = {name: blob for name, blob in manifest.files.items() if name != OPTIMIZER_STATE}
        return Captured(StateInfo(config, 0, 0), files)
    mark = manifest.incomplete
    state = StateInfo(
        config,
        manifest.step,
        manifest.pending_forward_backwards,
        None if mark is None else engine_interface.Incomplete(mark.seq, mark.message),
    )
    return Captured(state, manifest.files)


def _check_fit(key: NameKey, manifest: Manifest, config: RunConfig, *, optimizer: bool) -> None:
    """Raises RunError naming the first thing in which a checkpoint and a run differ."""
    mine, theirs = config.lora, manifest.lora
    pairs: list[tuple[str, object, object]] = [
        ("base model", config.base_model, manifest.base_model),
        ("LoRA rank", mine.rank, theirs.rank),
        ("LoRA alpha", mine.alpha, theirs.alpha),
        ("train_attn", mine.train_attn, theirs.train_attn),
        ("train_mlp", mine.train_mlp, theirs.train_mlp),
        ("train_unembed", mine.train_unembed, theirs.train_unembed),
    ]
    if optimizer:
        pairs.append(("optimizer", config.optimizer, manifest.optimizer))
    for name, ours, saved in pairs:
        if ours != saved:
            raise RunError(
                "incompatible_checkpoint",
                f"'tinker://{key}' does not fit this run: the checkpoint has {name} {saved}, "
                f"the run has {ours}",
            )
