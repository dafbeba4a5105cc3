"""Everything the server asks of runs, in one place: sessions, runs, futures, samplers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import sqlalchemy as sa
import structlog
from sqlalchemy import Connection

from holdfast.catalog import Catalog, CatalogUnavailable
from holdfast.catalog.tables import operations, runs
from holdfast.engine.interface import LoraConfig, RunConfig
from holdfast.runs import bodies, contents, journal, last_state, retention
from holdfast.runs.bodies import Body, Create, CreateFromState
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.clock import ServingClock
from holdfast.runs.copies import Copies
from holdfast.runs.driver import Driver, Standing
from holdfast.runs.engines import Engines
from holdfast.runs.errors import RunError, not_found, stopping
from holdfast.runs.journal import Failure, Outcome, Resumed, RunKey
from holdfast.runs.order import Order, State
from holdfast.runs.poison import suspect
from holdfast.runs.run import Run, RunInfo, Services, patiently
from holdfast.runs.samplers import Samplers
from holdfast.runs.segments import Segments
from holdfast.runs.sessions import Session, Sessions
from holdfast.runs.stopping import Stopping
from holdfast.runs.stored import STORED
from holdfast.store import Store

ELIXIR = "elixir"
"""The client family whose numbers may have permanent gaps."""

_STATES = {
    "model_unloaded": "unloaded",
    "session_ended": "unloaded",
    "model_replaced": "replaced",
    "creation_failed": "failed",
}
"""What becomes of a run, by the reason of its end. For any other: its state cannot be had."""

_HIGHEST = 2**63 - 1

_log = structlog.get_logger("holdfast.runs")


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long things are kept, in seconds."""

    session_grace: float = 30 * 60
    """Without heartbeat, submission or poll."""
    results_kept: float = 10 * 60
    """After they were read."""
    last_state_kept: float = 7 * 24 * 3600
    """The final state of a run whose session has ended."""
    between_sweeps: float = 60.0
    """From one sweep of the store to the next."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A row of the runs table."""

    key: RunKey
    session_id: str
    owner: str
    created: float
    last_request: float
    state: str
    state_detail: str | None
    config: RunConfig | None
    user_metadata: dict[str, str] | None
    corrupted: bool
    refused_to: int = -1
    recoveries: int = 0
    replayed: int = 0
    """Operations, in all recoveries."""
    divergences: int = 0
    """Replayed operations whose results differed, under other numerics."""
    diverged_at: int | None = None
    """The number of the first that differed in the newest recovery in which one did."""
    ending: Failure | None = None
    """Why it is about to end, or has ended ..."""
    ends_after: int = -1
    """... and the number that was under way when that was noted."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run stands."""

    state: Standing | Literal["ended", "lost", "stored", "corrupted"]
    position: int | None
    """The highest number whose effect is complete; None when the run has ended."""
    pending: int
    """Operations that have no outcome yet."""
    snapshot: tuple[int, float] | None
    """Position and time (UTC seconds) of the newest snapshot."""
    note: str | None
    """What it waits for, or is busy with."""


@dataclass(slots=True, eq=False)
class _Live:
    run: Run
    driver: Driver
    finishing: asyncio.Task[bool] | None = None
    keeping: bool = False
    """Its last state is being stored."""


class Runs:
    """All runs of a server. Its methods belong to one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        segments: Segments,
        store: Store,
        engines: Engines,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.catalog = catalog
        catalog.before_commit(segments.sync)
        store.before_change(catalog.verify_epoch)
        self.engines = engines
        self.stopping = Stopping()
        self.checkpoints = Checkpoints(store, catalog)
        self.lifetimes = lifetimes or Lifetimes()
        self._clock = ServingClock()
        self.samplers = Samplers(catalog, self.checkpoints, engines, self.stopping, self._clock)
        self.sessions = Sessions(
            catalog, self._clock, self.stopping, grace=self.lifetimes.session_grace
        )
        self._services = Services(
            catalog, segments, self.checkpoints, engines, self._clock, self.stopping
        )
        self._live: dict[str, _Live] = {}
        """The newest generation of each model that has not ended."""
        self._executed: dict[RunKey, _Live] = {}
        """All that have not ended."""
        self._creating = asyncio.Lock()
        """Held while any run is created; for as long as that takes the catalog, never a store."""
        self.copies = Copies(catalog, self.checkpoints, self.sessions, self.stopping)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take up the runs of sessions that have not ended. The store is not waited for."""
        half_ended = await self.sessions.half_ended()
        sessions = {s.id: s for s in [*await self.sessions.open(), *half_ended]}
        found = await self.catalog.read(journal.live_runs)
        for resumed in found.values():
            for item in resumed.operations:
                self._clock.go_on_from(item.accepted)
        for record in await self._records(runs.c.state == "live"):
            session = sessions.get(record.session_id)
            if session is not None:
                self._take_up(session, record, found[record.key])
        for session in half_ended:
            self._background(self._close_session(session.id, session.end_reason))
        self._background(self._housekeeping())
        self._background(self._sweeping())

    async def stop(self, within: float = 20.0) -> None:
        """Stop executing. Nothing ends: a later start goes on where this one stopped.

        Nothing new is taken from now on. Who polls is answered still: with outcomes as they come,
        and at the end without one. All of it takes at most `within` seconds. Operations under way
        may finish in the first four tenths; then each run's state is kept, unless its operation was
        left: that is replayed.
        """
        self.stopping.begun.set()
        try:
            await self._stop(within)
        finally:
            self.stopping.done.set()

    async def _stop(self, within: float) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + within

        def share(part: float) -> float:
            return max(0.0, (ends - loop.time()) * part)

        async def bounded(part: float, *work: Coroutine[Any, Any, object]) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(share(part)):
                    await asyncio.gather(*work)

        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(live.run.stop(share(0.4)) for live in self._executed.values()))
        finishing = [
            live.finishing for live in self._executed.values() if live.finishing is not None
        ]
        if finishing:  # the next start ends what is not ended by then
            _, late = await asyncio.wait(finishing, timeout=share(0.4))
            for unfinished in late:
                unfinished.cancel()
            await asyncio.gather(*finishing, return_exceptions=True)
        await bounded(0.5, *(live.driver.park() for live in self._executed.values()))
        await bounded(0.5, *(live.run.note_read() for live in self._executed.values()))
        await bounded(0.5, self.samplers.close())
        for live in self._executed.values():
            live.driver.abandon()
        await bounded(0.9, self.engines.close())
        self.engines.kill()

    # --- Creating ----------------------------------------------------------------------------

    async def create(
        self,
        session: Session,
        model_seq_id: int,
        *,
        base_model: str,
        lora: Mapping[str, Any],
        optimizer: str,
        user_metadata: dict[str, str] | None,
        idempotency_key: str | None,
    ) -> Run:
        """Create a run, as operation 0. `lora` is a LoraConfig's fields, its seed may be None.

        Raises RunError for an unknown base model and for a model number that is in use.
        """
        self.engines[base_model]
        asked = {"base_model": base_model, "lora": dict(lora), "optimizer": optimizer}
        asked_for = bodies.encode_json({**asked, "metadata": user_metadata})
        seed = lora["seed"]
        drawn = secrets.randbits(31) if seed is None else seed
        config = RunConfig(base_model, LoraConfig(**{**lora, "seed": drawn}), optimizer)
        # A client that goes away meanwhile leaves no run that is journaled and not executed.
        return await asyncio.shield(
            self._create(
                session,
                model_seq_id,
                Create.of(config),
                config,
                user_metadata,
                asked_for,
                idempotency_key,
            )
        )

    async def create_from_state(
        self,
        session: Session,
        model_seq_id: int,
        body: CreateFromState,
        *,
        user_metadata: dict[str, str] | None,
        idempotency_key: str | None,
    ) -> Run:
        """Create a run from a checkpoint, which its first operation reads."""
        if body.base_model is not None:
            self.engines[body.base_model]
        return await asyncio.shield(
            self._create(
                session, model_seq_id, body, None, user_metadata, body.encode(), idempotency_key
            )
        )

    async def _create(
        self,
        session: Session,
        model_seq_id: int,
        body: Body,
        config: RunConfig | None,
        user_metadata: dict[str, str] | None,
        asked_for: bytes,
        idempotency_key: str | None,
    ) -> Run:
        model_id = f"{session.id}:train:{model_seq_id}"
        async with self.checkpoints.creating(model_id), self._creating:
            self.stopping.check()
            generation = 0
            history = await self._history(model_id)
            before = self._live.get(model_id)
            if history is not None:
                same_request = (
                    idempotency_key is not None and idempotency_key == history.idempotency_key
                )
                same_body = (
                    journal.digest(asked_for, like=history.body_hash) == history.body_hash
                    and not history.anything_failed
                )
                if before is not None and (same_request or same_body):
                    return before.run
                if history.anything_done:
                    raise RunError(
                        "model_exists",
                        f"model {model_id!r} exists and was created by another request; a new "
                        "model needs another model_seq_id",
                    )
                generation = history.generation + 1
            key = RunKey(model_id, generation)
            now = time.time()
            row = {
                "id": key.id,
                "generation": key.generation,
                "session_id": session.id,
                "owner": session.owner,
                "created": now,
                "last_request": now,
                "state": "live",
                "base_model": None if config is None else config.base_model,
                "config": None if config is None else bodies.config_as_json(config),
                "user_metadata": user_metadata,
                "body_hash": journal.digest(asked_for),
                "idempotency_key": idempotency_key,
                "corrupted": False,
            }
            order = Order(elixir=session.client == ELIXIR)
            info = RunInfo(session.id, session.owner, config, user_metadata)
            run = Run(key, info, self._services, order)

            replaced = Failure(
                "model_replaced", f"model {model_id!r} was created anew by a later request"
            )

            def first(connection: Connection) -> None:
                self.sessions.check_open(connection, session.id)
                if before is not None:
                    journal.note_end(connection, before.run.key, replaced)
                connection.execute(runs.insert().values(row))

            await run.submit(0, body.kind, body.encode(), first=first)
            if before is not None:
                before.run.end(replaced)
                # Beside: its driver may be waiting for a base model, and others want to create.
                self._background(self._finish(before, replaced))
            self._start(run)
            return run

    def _start(self, run: Run) -> _Live:
        driver = Driver(run, self.samplers)
        live = _Live(run, driver)
        self._live[run.key.id] = live
        self._executed[run.key] = live

        async def drive() -> None:
            try:
                await driver.drive()
            except Exception as error:
                run.broke("the run's driver failed", error)
            if run.ended is not None and not run.closing:
                # Its creation failed, it could not be recovered, or it met a defect.
                self._background(self._finish(live, run.ended))

        if self.stopping.begun.is_set():  # it was journaled just before: the next start executes it
            run.closing = True
        run.start(drive)
        return live

    def _take_up(self, session: Session, record: RunRecord, found: Resumed) -> None:
        order = Order(
            elixir=session.client == ELIXIR,
            floor=found.floor,
            position=found.position,
            refused_to=record.refused_to,
        )
        items = found.operations
        order.read_back((item.entry for item in items), {x.entry.seq for x in items if x.overtaken})
        for item in sorted(items, key=lambda item: item.accepted):  # the first mark stays
            if item.mark_at is not None and item.entry.kind == bodies.FORWARD_BACKWARD:
                order.add_late_mark(item.entry.seq, item.mark_at)
        suspect(item.entry for item in items)
        info = RunInfo(record.session_id, record.owner, record.config, record.user_metadata)
        run, reason = Run(record.key, info, self._services, order), record.ending
        if reason is None and session.ended is not None:
            reason = _session_ended(session.id, session.end_reason)
        if reason is None:
            self._start(run)
        else:
            run.end_was_noted(reason, record.ends_after)
            self._background(self._finish(self._start(run), reason))

    # --- Runs --------------------------------------------------------------------------------

    async def live(self, model_id: str, owner: str) -> Run:
        """A run that takes operations. RunError when there is none, or it has ended."""
        self.stopping.check()
        live = self._live.get(model_id)
        if live is None or live.run.info.owner != owner:
            for record in await self._records((runs.c.id == model_id) & (runs.c.owner == owner)):
                detail = record.state_detail or "it has ended"
                raise RunError(f"model_{record.state}", f"model {model_id!r} is gone: {detail}")
            raise not_found("model", model_id)
        self.sessions.seen(live.run.info.session_id)
        return live.run

    async def unload(self, model_id: str, owner: str) -> None:
        """Have a run end after the operation under way. Idempotent.

        That is noted durably, and nothing more is taken. The end itself is not waited for: it may
        take as long as that operation, or as a store that is full. Raises CatalogUnavailable.
        """
        self.stopping.check()
        live = self._live.get(model_id)
        if live is not None and live.run.info.owner == owner:
            await asyncio.shield(self._unload(live))  # what is noted is also done
        elif not await self._records((runs.c.id == model_id) & (runs.c.owner == owner)):
            raise not_found("model", model_id)

    async def _unload(self, live: _Live) -> None:
        reason = Failure("model_unloaded", f"model {live.run.key.id!r} was unloaded")
        await live.run.note_end(reason)
        self._background(self._finish(live, reason))

    async def record(self, model_id: str, owner: str) -> RunRecord:
        """A run, also one that has ended. RunError when there is none."""
        found = await self._records(_visible(owner) & (runs.c.id == model_id))
        if not found:
            raise not_found("model", model_id)
        return found[-1]

    async def page(self, owner: str, *, offset: int, limit: int) -> tuple[list[RunRecord], int]:
        """An owner's runs, newest first, and how many there are in all."""
        where = _visible(owner)
        total = await self.catalog.read(
            lambda c: c.scalar(sa.select(sa.func.count()).select_from(runs).where(where)) or 0
        )
        return await self._records(where, offset=offset, limit=limit, newest_first=True), total

    async def statuses(self, records: Sequence[RunRecord]) -> dict[RunKey, RunStatus]:
        """Where each of these runs stands."""
        keys = [record.key for record in records]
        newest = await self.catalog.read(lambda c: journal.newest_snapshots(c, keys))
        return {record.key: self._status(record, newest.get(record.key)) for record in records}

    def _status(self, record: RunRecord, snapshot: tuple[int, float] | None) -> RunStatus:
        live = self._live.get(record.key.id)
        ended = record.ending is not None and live is not None and live.run.ended is not None
        if live is None or live.run.key != record.key or ended:
            state = record.state if record.state in ("lost", STORED) else "ended"
            note = record.state_detail
            if live is not None and live.run.key == record.key and live.keeping:
                note = last_state.not_stored_yet(live.run)
            return RunStatus(
                "corrupted" if record.corrupted else state,  # type: ignore[arg-type]
                None,
                0,
                snapshot,
                note,
            )
        order = live.run.order
        pending = len(order.unsettled)
        note = self._note(live.run)
        return RunStatus(live.driver.standing, order.reached, pending, snapshot, note)

    async def config(self, model_id: str, owner: str, timeout: float) -> RunConfig:
        """A run's configuration; waits for a creating load that is still to read it."""
        live = self._live.get(model_id)
        if live is not None and live.run.info.owner == owner and live.run.info.config is None:
            await self.stopping.wait_for(live.run.outcome(0, timeout))
        if live is not None and live.run.info.config is not None:
            return live.run.info.config
        record = await self.record(model_id, owner)
        if record.config is None:
            raise not_found("model", model_id, ": its creation has not finished or has failed")
        return record.config

    # --- Futures -----------------------------------------------------------------------------

    async def outcome(
        self, request_id: str, owner: str, timeout: float
    ) -> tuple[Outcome | None, str | None]:
        """A request's outcome, waited for at most `timeout` seconds, and what it waits for.

        Raises RunError for a request id that is not known.
        """
        found = await self.stopping.wait_for(self._outcome(request_id, owner, timeout))
        return (None, "the server is being started again") if found is None else found

    async def _outcome(
        self, request_id: str, owner: str, timeout: float
    ) -> tuple[Outcome | None, str | None]:
        stem, seq = _split(request_id)
        sampler, _, number = stem.rpartition(":sample:")
        if sampler and number:
            await self.samplers.get(stem, owner)
            self.sessions.seen(sampler)
            return await self.samplers.outcome(stem, seq, timeout), None
        key = _key(stem)
        run = self._run_of(key)
        if run is not None:
            if run.info.owner != owner:
                raise not_found("request", request_id)
            self.sessions.seen(run.info.session_id)
            return await run.outcome(seq, timeout), self._note(run)
        if not await self._records(_is(key) & (runs.c.owner == owner)):
            raise not_found("request", request_id)
        outcome = await self.catalog.read(
            lambda c: journal.outcome(c, self._services.segments, key, seq)
        )
        if outcome is None:
            raise not_found("request", request_id)
        return outcome, None

    def _run_of(self, key: RunKey) -> Run | None:
        """A run that has not ended, also one whose model was created anew since."""
        live = self._executed.get(key)
        return None if live is None else live.run

    def _note(self, run: Run) -> str | None:
        """What a run is busy with, or waits for."""
        if run.note is not None or run.info.config is None or not run.order.unsettled:
            return run.note
        with suppress(RunError):  # a base model that is not served any more
            host = self.engines[run.info.config.base_model]
            if host.state == "loading":
                return f"base model {host.name!r} is being loaded"
        return None

    async def cancel_sample(self, request_id: str, owner: str) -> None:
        """Drop a sampling request that nobody waits for. Training operations are left alone."""
        stem, seq = _split(request_id)
        if ":sample:" in stem:
            await self.samplers.get(stem, owner)
            self.samplers.cancel(stem, seq)

    async def refused_without_number(self, owner: str) -> None:
        """A submission of that owner was refused whose model and number could not be read."""
        concerned = [x.run for x in self._live.values() if x.run.info.owner == owner]
        reaches = [(run.key, run.refused_without_number()) for run in concerned]

        def work(connection: Connection) -> None:
            for key, refused_to in reaches:
                journal.note_refusal(connection, key, refused_to)

        with suppress(CatalogUnavailable):  # forgotten by a restart: some gap is waited for longer
            await self.catalog.write(work)

    def delivered(self, request_id: str) -> None:
        """An outcome was handed out in full."""
        stem, seq = _split(request_id)
        if ":sample:" in stem:
            self.samplers.delivered(stem, seq)
            return
        run = self._run_of(_key(stem))
        if run is not None:
            run.delivered(seq)

    # --- Sessions ----------------------------------------------------------------------------

    async def end_session(self, session_id: str, reason: str, detail: str | None = None) -> None:
        """End a session: its runs keep their last state a while, its samplers go. Idempotent."""
        await asyncio.shield(self._end_session(session_id, reason, detail))

    async def _end_session(self, session_id: str, reason: str, detail: str | None) -> None:
        failure = _session_ended(session_id, reason)
        # With what each of its runs is to finish: the server may die before they are told.
        notes = [live.run.end_note(failure) for live in self._live_in(session_id)]
        if await self.sessions.end(session_id, reason, detail, also=notes):
            self._background(self._close_session(session_id, reason))

    def _live_in(self, session_id: str) -> list[_Live]:
        return [live for live in self._live.values() if live.run.info.session_id == session_id]

    async def _close_session(self, session_id: str, reason: str | None) -> None:
        failure = _session_ended(session_id, reason)
        async with self._creating:  # a run that is being created is one of them
            mine = self._live_in(session_id)

        async def end_samplers() -> None:
            await patiently(lambda: self.samplers.end_session(session_id))

        # At once: a last state may have to wait for the storage. One run's defect keeps neither
        # the others nor the samplers.
        found = await asyncio.gather(
            end_samplers(),
            *(self._finish(live, failure) for live in mine),
            return_exceptions=True,
        )
        for error in found:
            if isinstance(error, Exception):
                _log.error("a session was not closed", session=session_id, exc_info=error)
        if mine:  # a save that was under way may have made another one
            await end_samplers()

    async def _finish(self, live: _Live, reason: Failure) -> None:
        """End a run, keep its last state, and let it go; once, however many ask for it.

        Raises Unavailable when the server stops before that.
        """
        if live.finishing is None:
            live.finishing = asyncio.create_task(self._finish_once(live, reason))
        finishing = live.finishing
        await asyncio.wait([finishing])  # whoever goes away leaves it to the others
        if finishing.cancelled() or not finishing.result():
            raise stopping()

    async def _finish_once(self, live: _Live, reason: Failure) -> bool:
        """Whether that was possible: the server may stop before."""
        run, driver = live.run, live.driver
        await run.patiently(lambda: run.note_end(reason))
        if not await run.finish(reason):
            return False
        assert run.ended is not None
        state, lacks = _STATES.get(reason.code, "lost"), ""
        if state == "unloaded" or run.broken:
            live.keeping, run.note = True, None
            kept = await self._keep_last_state(live)
            live.keeping = False
            state = "lost" if kept is None else "unloaded"
            lacks = "" if kept is None else last_state.what_it_lacks(run, kept)
        await driver.drop()
        ended, now = run.ended, self._clock.now()
        values = {
            "state": state,
            "state_detail": ended.message + lacks,
            "corrupted": driver.diverged or ended.code == "replay_diverged",
        }

        def end(connection: Connection) -> None:
            journal.settle_rest(connection, run.key, ended, now=now)
            connection.execute(runs.update().where(_is(run.key)).values(values))

        await run.write_patiently(end)
        self._executed.pop(run.key, None)
        if self._live.get(run.key.id) is live:
            del self._live[run.key.id]
        if state == "lost":  # whoever can repair it needs its snapshots
            return True
        points = await run.read_patiently(lambda c: journal.recovery_points(c, run.key))
        await run.write_patiently(lambda c: journal.close(c, run.key, now=self._clock.now()))
        with suppress(RunError):
            await self.checkpoints.discard([manifest for _, manifest in points])
        return True

    async def _keep_last_state(self, live: _Live) -> int | None:
        """Keep the state of a run that has ended: as a worker gives it, or its newest snapshot.

        The position that it is of; None when neither can be had.
        """
        run, driver = live.run, live.driver
        kept = self.lifetimes.last_state_kept
        try:
            if await driver.keep_last_state(kept):
                return run.order.reached
        except Exception as error:
            run.log.warning("no worker gives the last state", error=str(error))
        if driver.diverged:
            return None
        await driver.drop()  # which is not what its snapshots need
        return await last_state.keep_recovery_point(run, kept)

    async def _housekeeping(self) -> None:
        keep = partial(journal.keep_what_was_read, now=self._clock.now())
        await patiently(lambda: self.catalog.write(keep))
        while True:
            pause = min(30.0, self.lifetimes.session_grace / 4)
            began = time.monotonic()
            await asyncio.sleep(pause)
            # Suspended, or starved of the processor: that is not the clients' silence.
            asleep = time.monotonic() - began - pause
            if asleep > 1.0:
                self.sessions.forgive(asleep)
                self._clock.forgive(asleep)
            for session_id in self.sessions.silent():
                if not self.sessions.is_silent(session_id):  # while others were being ended
                    continue
                _log.info("session expired", session=session_id)
                await _tried("a session was not ended", self.end_session(session_id, "expired"))
            for live in list(self._live.values()):
                await _tried("results that were read are not noted", live.run.note_read())
            await _tried("nothing was removed from the journal", self._tidy())
            await _tried("no sampler was released", self.samplers.release_unused())

    async def _tidy(self) -> None:
        """Remove what nobody needs any more from the journal."""
        before = self._clock.now() - self.lifetimes.results_kept
        skipped: dict[RunKey, list[int]] = {}
        for gone in await self.catalog.write(partial(retention.expire, read_before=before)):
            skipped.setdefault(RunKey(gone.run_id, gone.generation), []).append(gone.seq)
        for key, seqs in skipped.items():
            run = self._run_of(key)
            if run is not None:
                await run.forget_skipped(seqs)
        await self._remove_segments()

    async def _remove_segments(self) -> None:
        segments = self._services.segments
        unreferenced = partial(contents.unreferenced, segments=segments)
        gone = await self.catalog.write(unreferenced)
        if gone:
            await asyncio.to_thread(segments.remove, gone)

    async def _sweeping(self) -> None:
        """Remove expired and unreferenced checkpoints from the store, for as long as it serves."""
        reconciled = await self._reconciled()
        while True:
            await asyncio.sleep(self.lifetimes.between_sweeps)
            reconciled = reconciled or await self._reconciled()
            try:
                report = await self.checkpoints.sweep()
            except (RunError, CatalogUnavailable) as error:
                _log.error("the store could not be swept", error=str(error))
                continue
            except Exception:  # a defect: the next sweep may do without it
                _log.exception("the store could not be swept")
                continue
            for path in report.damaged:
                _log.error("damage in the store: what it may refer to is kept", file=path)
            if report.names or report.manifests or report.blobs:
                _log.info(
                    "store swept",
                    expired=[f"tinker://{key}" for key in report.names],
                    manifests=report.manifests,
                    blobs=report.blobs,
                    bytes=report.size,
                )

    async def _reconciled(self) -> bool:
        """Find what a crash has left between the store and the catalog; whether that succeeded."""
        try:
            await self.checkpoints.reconcile()
            await self.checkpoints.discard_orphans()
        except (RunError, CatalogUnavailable) as error:
            _log.error("store and catalog could not be compared", error=str(error))
            return False
        except Exception:  # a defect
            _log.exception("store and catalog could not be compared")
            return False
        return True

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        if self.stopping.begun.is_set():  # what it is to end is ended by the next start
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                _log.error("background work failed", exc_info=task.exception())

        task.add_done_callback(done)

    # --- Rows --------------------------------------------------------------------------------

    async def _records(
        self,
        where: sa.ColumnElement[bool],
        *,
        offset: int = 0,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[RunRecord]:
        order = runs.c.created.desc() if newest_first else runs.c.created
        rows = await self.catalog.read(
            lambda c: c.execute(
                sa.select(runs)
                .where(where)
                .order_by(order, runs.c.generation)
                .offset(offset)
                .limit(limit)
            ).all()
        )
        return [
            RunRecord(
                RunKey(row.id, row.generation),
                row.session_id,
                row.owner,
                row.created,
                row.last_request,
                row.state,
                row.state_detail,
                None if row.config is None else bodies.config_from_json(row.config),
                row.user_metadata,
                row.corrupted,
                -1 if row.refused_to is None else row.refused_to,
                row.recoveries,
                row.replayed,
                row.divergences,
                row.diverged_at,
                None if row.ending is None else Failure.from_json(row.ending),
                -1 if row.ending is None else row.ending.get("after", -1),
            )
            for row in rows
        ]

    async def _history(self, model_id: str) -> _History | None:
        """The newest generation of a model id, and how its operations ended."""

        def query(connection: Connection) -> _History | None:
            row = connection.execute(
                sa.select(runs).where(runs.c.id == model_id).order_by(runs.c.generation.desc())
            ).first()
            if row is None:
                return None
            ended = connection.execute(
                sa.select(operations.c.seq, operations.c.state).where(
                    (operations.c.run_id == model_id)
                    & (operations.c.generation == row.generation)
                    & operations.c.state.in_([State.DONE.value, State.FAILED.value])
                )
            ).all()
            return _History(
                row.generation,
                row.body_hash,
                row.idempotency_key,
                row.state == STORED
                or any(e.state == State.DONE.value and e.seq > 0 for e in ended),
                any(e.state == State.FAILED.value for e in ended)
                or row.state != "live"
                or row.ending is not None,
            )

        return await self.catalog.read(query)


async def _tried(what: str, work: Awaitable[None]) -> None:
    """Do something that comes again: an error ends neither what follows nor the next time."""
    try:
        await work
    except (CatalogUnavailable, OSError) as error:
        _log.warning(what, error=str(error))
    except Exception:
        _log.exception(f"{what}: a defect")


@dataclass(frozen=True, slots=True)
class _History:
    generation: int
    body_hash: str
    idempotency_key: str | None
    anything_done: bool
    anything_failed: bool


def _session_ended(session_id: str, reason: str | None) -> Failure:
    why = reason or "unknown"
    return Failure("session_ended", f"session {session_id!r} has ended ({why})")


def _is(key: RunKey) -> sa.ColumnElement[bool]:
    return (runs.c.id == key.id) & (runs.c.generation == key.generation)


def _visible(owner: str) -> sa.ColumnElement[bool]:
    return (runs.c.owner == owner) & runs.c.state.not_in(("failed", "replaced"))


def _split(request_id: str) -> tuple[str, int]:
    stem, _, digits = request_id.rpartition(":")
    seq = _number(digits)
    if not stem or seq is None:
        raise not_found("request", request_id)
    return stem, seq


def _number(digits: str) -> int | None:
    """A number of 63 bits, of which the catalog's are; None for anything else."""
    if not digits.isascii() or not digits.isdigit() or len(digits) > len(str(_HIGHEST)):
        return None
    number = int(digits)
    return number if number <= _HIGHEST else None


def _key(stem: str) -> RunKey:
    """The run that a request id begins with."""
    model_id, _, digits = stem.rpartition(":g")
    generation = _number(digits)
    if model_id and generation is not None:
        return RunKey(model_id, generation)
    return RunKey(stem)
