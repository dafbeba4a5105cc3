"""One live run: what was accepted, its turn at the worker, and who waits for which outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection

from holdfast import failpoints
from holdfast.catalog import Catalog, CatalogUnavailable
from holdfast.engine.interface import RunConfig
from holdfast.runs import journal
from holdfast.runs.bodies import FORWARD_BACKWARD, MISSING
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.clock import ServingClock
from holdfast.runs.engines import Engines
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.gate import QUARANTINED_AFTER, Gate
from holdfast.runs.journal import Failure, Outcome, RunKey
from holdfast.runs.order import Accept, Entry, Gap, Order, State
from holdfast.runs.segments import Segments
from holdfast.runs.stopping import Stopping
from holdfast.runs.submitting import Submitting
from holdfast.store.retries import STORAGE_WAITED_FOR, pauses

T = TypeVar("T")

_BODIES_IN_MEMORY = 256 << 10
"""Bytes of bodies from which on a run keeps no more at hand: those are read from the journal when
they are due. Many small ones that wait would cost more in memory than the reading does in time."""
_OUTCOMES_IN_MEMORY = 16 << 20
"""Bytes of results a run keeps at hand for the first poll; the catalog has them all."""

_HASHED_AT_ONCE = 1 << 20
"""Bytes of a body from which on it is hashed in a thread, so that other requests are answered."""
_REQUEST_NOTED_EVERY = 1.0
"""Seconds for which the time of a run's last request is not written down again."""

_AFTER_WHAT_HAS_BEGUN = frozenset({"model_unloaded", "session_ended"})
"""Codes of ends that come from outside: what had been begun then is finished."""

_WANTED_FOR = 60.0
"""Seconds after a request for which its client is taken to wait: longer than between two polls."""

_log = structlog.get_logger("holdfast.runs")


@dataclass(frozen=True, slots=True)
class Services:
    """What every run works with."""

    catalog: Catalog
    segments: Segments
    checkpoints: Checkpoints
    engines: Engines
    clock: ServingClock
    stopping: Stopping
    gate: Gate = field(default_factory=Gate)
    """Passed by every operation that a worker executes."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is fixed when a run is created, or when its creating load has read its checkpoint."""

    session_id: str
    owner: str
    config: RunConfig | None
    user_metadata: dict[str, str] | None = None


@dataclass(slots=True)
class _Recent:
    """Settled outcomes that nobody has read yet."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    size: int = 0

    def add(self, seq: int, outcome: Outcome) -> None:
        self.outcomes[seq] = outcome
        self.size += len(outcome.result or b"")
        while self.size > _OUTCOMES_IN_MEMORY:
            self.pop(next(iter(self.outcomes)))

    def pop(self, seq: int) -> Outcome | None:
        outcome = self.outcomes.pop(seq, None)
        if outcome is not None:
            self.size -= len(outcome.result or b"")
        return outcome


class Run:
    """A run that takes submissions and answers polls.

    What executes them is given as `drive`, one task that runs as long as the run lives; this class
    is its mailbox and its book-keeping. All methods belong to one event loop.
    """

    def __init__(self, key: RunKey, info: RunInfo, services: Services, order: Order) -> None:
        self.key = key
        self.info = info
        self.services = services
        self.order = order
        self.wake = asyncio.Event()
        """Set when something may have come up."""
        self.awaited: int | None = None
        """The missing number that the driver waits for: later ones do not change what comes up."""
        self.ended: Failure | None = None
        """Why the run takes no more operations."""
        self.closing = False
        """Set when the driver is to stop after the operation under way."""
        self.ending = False
        """Set besides when that is the run's end: what was begun is finished."""
        self.begun_to = -1
        """The number that was under way when an earlier life of the server noted the end."""
        self.broken = False
        """The run has ended because of a defect of ours."""
        self.note: str | None = None
        """What the run is busy with, for those who wait: recovering, waiting for a number, …"""
        self.log = _log.bind(run=str(key))
        self._request_noted = 0.0
        self._asked: float | None = None
        self._polls = 0
        self._bodies: dict[int, bytes] = {}
        self._bodies_size = 0
        self._recent = _Recent()
        self._read: set[int] = set()
        self._waiting: dict[int, asyncio.Event] = {}
        self._recording: dict[int, asyncio.Task[None]] = {}
        self._unrecorded = False
        self._noted: Failure | None = None
        """The end that is noted durably: nothing more is taken, though it has not come yet."""
        self._submitting = Submitting()
        self._driver: asyncio.Task[None] | None = None

    # --- Submissions -------------------------------------------------------------------------

    async def submit(
        self,
        seq: int,
        kind: str,
        body: bytes,
        *,
        first: Callable[[Connection], object] | None = None,
    ) -> str:
        """Journal an operation and put it in its place; returns its request id.

        The same submission again gets the same answer. `first` is written before it, in the same
        transaction. Raises RunError for a number that another request has, and for a run that has
        ended; Unavailable when the server stops or the journal took nothing. A caller that goes
        away while it waits takes nothing back: what is journaled is also put in its place.
        """
        async with self._submitting:
            recorded = self.order[seq].body_hash if self.order.knows(seq) else None
            body_hash = await _digest(body, recorded)
            self._asked = time.monotonic()
            self.services.stopping.check()
            ended = self.ended or self._noted
            if ended is not None and seq not in self.order:
                try:
                    await self.note_end(ended)
                except CatalogUnavailable as error:
                    raise Unavailable("journal_unavailable", str(error)) from error
                raise RunError(ended.code, ended.message)
            if self.order.is_too_far(seq):
                raise RunError(
                    "number_too_high",
                    f"number {seq} is far above {self.order.highest}, the highest one of run "
                    f"{self.key} so far; requests are numbered one after the other",
                )
            match self.order.classify(seq, kind, body_hash):
                case Accept.NEW if self.order.is_full(seq):
                    raise Unavailable(
                        "too_many_operations",
                        f"run {self.key} has so much to do that it takes no more; send number "
                        f"{seq} again later",
                    )
                case Accept.NEW:
                    entry = Entry(seq, kind, body_hash, size=len(body))
                    await self._accept(entry, body, first)
                case Accept.CONFLICT:
                    raise self._conflict(seq, self.order[seq].kind)
                case Accept.FORGOTTEN:
                    known = await self.services.catalog.read(
                        lambda c: journal.identity(c, self.key, seq)
                    )
                    if known is not None and known != (kind, await _digest(body, known[1])):
                        raise self._conflict(seq, known[0])
                case Accept.LATE:
                    failure = Failure(
                        "arrived_late",
                        f"request {seq} of run {self.key} came after the run had stopped waiting "
                        "for it and gone on; send it again with a new number",
                    )
                    await self._accept_late(seq, kind, body_hash, failure)
                case Accept.DUPLICATE:
                    self.wake.set()
        return self.key.request_id(seq)

    async def refuse(self, seq: int, kind: str, failure: Failure) -> None:
        """Settle a number whose request is refused for good, before the refusal is answered.

        An operation that was accepted under that number stays as it is. Nobody waits for one that
        is far too high.
        """
        async with self._submitting:
            self.services.stopping.check()
            if self.order.is_too_far(seq):
                return
            refused_to = self.order.refused(seq)

            def note(connection: Connection) -> None:
                journal.note_refusal(connection, self.key, refused_to)

            if self.ended is None and seq not in self.order:
                entry = Entry(seq, kind, None, State.FAILED)
                await self._journal(entry, self._enters(entry), failure=failure, first=note)
            elif self.order.was_skipped(seq):
                await self._accept_late(seq, kind, None, failure)
        self.wake.set()

    async def _accept(
        self, entry: Entry, body: bytes, first: Callable[[Connection], object] | None
    ) -> None:
        # It enters the order only when it is durable: what was not journaled is never executed.
        def accepted(journaled: bool) -> None:
            if not journaled:
                return
            failpoints.reach("submission.journaled")
            self.order.add(entry)
            if self.awaited is None or entry.seq <= self.awaited:
                self.wake.set()
            if self.ended is not None:  # meanwhile: what was pending then has failed
                self.settle(entry.seq, Outcome(entry.kind, failure=self.ended))
            elif self._bodies_size < _BODIES_IN_MEMORY:
                self._bodies[entry.seq] = body
                self._bodies_size += len(body)

        await self._journal(entry, accepted, body=body, first=first)

    def _conflict(self, seq: int, kind: str) -> RunError:
        return RunError(
            "sequence_conflict",
            f"number {seq} of run {self.key} was used for another request ({kind}); every request "
            "needs a number of its own",
        )

    def refused_without_number(self) -> int:
        """A request that was perhaps this run's could not be read and was refused.

        Returns the number up to which that explains gaps, to be noted.
        """
        self.wake.set()
        return self.order.refused()

    async def _accept_late(
        self, seq: int, kind: str, body_hash: str | None, failure: Failure
    ) -> None:
        # Durable before it has an effect that anybody could see: nothing begins meanwhile.
        position = self.order.hold()

        def ended(journaled: bool) -> None:
            if journaled:
                self.order.arrived_late(seq, kind, body_hash)
                if kind == FORWARD_BACKWARD:
                    self.order.add_late_mark(seq, position)
            self.order.go_on()
            self.wake.set()

        entry = Entry(seq, kind, body_hash, State.FAILED, late=True)
        await self._journal(entry, ended, failure=failure, mark_at=position)

    def _enters(self, entry: Entry) -> Callable[[bool], None]:
        """What there is to do with an entry that is settled as soon as it is journaled."""

        def ended(journaled: bool) -> None:
            if journaled:
                self.order.add(entry)
                self.wake.set()

        return ended

    async def _journal(
        self,
        entry: Entry,
        ended: Callable[[bool], None],
        *,
        body: bytes | None = None,
        failure: Failure | None = None,
        mark_at: int | None = None,
        first: Callable[[Connection], object] | None = None,
    ) -> None:
        """Write an entry down. `ended` is told whether it was, also when the caller is gone."""
        now, wall = self.services.clock.now(), time.time()
        note = abs(wall - self._request_noted) >= _REQUEST_NOTED_EVERY

        def work(connection: Connection) -> None:
            if first is not None:
                first(connection)
            journal.add(
                connection,
                self.services.segments,
                self.key,
                entry,
                now=now,
                body=body,
                failure=failure,
                requested=wall if note else None,
                mark_at=mark_at,
            )

        def written(error: Exception | None) -> None:
            journaled = error is None
            try:
                if journaled and note:
                    self._request_noted = wall
                if not journaled and entry.seq < self.order.highest and entry.seq not in self.order:
                    self.order.wait_anew()  # it is missing because it was not taken: it comes again
                ended(journaled)
            finally:
                self._submitting.written()

        write = self.services.catalog.begin_write(work, written)
        self._submitting.writing()
        try:
            await write
        except CatalogUnavailable as error:
            raise Unavailable("journal_unavailable", str(error)) from error

    # --- Outcomes ----------------------------------------------------------------------------

    async def outcome(self, seq: int, timeout: float) -> Outcome | None:
        """The outcome of an accepted number, waited for at most `timeout` seconds.

        None when it is not there yet. Raises RunError for a number that was never accepted.
        """
        if seq not in self.order:
            raise RunError(
                "request_not_found",
                f"request {self.key.request_id(seq)!r} is not known here",
                reason="not_found",
            )
        recent = self._recent.outcomes.get(seq)
        if recent is None and self._is_open(seq):
            event = self._waiting.setdefault(seq, asyncio.Event())
            self._polls += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await event.wait()
            finally:
                self._polls -= 1
                self._asked = time.monotonic()
            if not event.is_set():
                return None
            recent = self._recent.outcomes.get(seq)
        if recent is not None:
            return recent
        found = await self.services.catalog.read(
            lambda c: journal.outcome(c, self.services.segments, self.key, seq)
        )
        return journal.expired(self.key, seq) if found is None else found

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for this run: by a held poll, or by a request just now."""
        if self._polls > 0:
            return True
        return self._asked is not None and time.monotonic() - self._asked < _WANTED_FOR

    def delivered(self, seq: int) -> None:
        """An outcome was handed out: it is kept in the catalog only, and for a while only."""
        self._recent.pop(seq)
        self._read.add(seq)

    async def note_read(self) -> None:
        """Record which outcomes were handed out since the last call."""
        if not self._read:
            return
        seqs, self._read = self._read, set()
        now = self.services.clock.now()
        try:
            await self.services.catalog.write(
                lambda c: journal.mark_read(c, self.key, seqs, now=now)
            )
        except CatalogUnavailable:
            self._read |= seqs

    def _is_open(self, seq: int) -> bool:
        if seq in self._recording:
            return True
        try:
            return not self.order[seq].state.settled
        except KeyError:  # forgotten, hence settled
            return False

    def settle(
        self,
        seq: int,
        outcome: Outcome,
        *,
        target: str | None = None,
        also: Callable[[Connection], object] | None = None,
    ) -> asyncio.Task[None]:
        """Make an outcome final: recorded durably, then shown to those who wait.

        The run goes on meanwhile. `also` writes more in the same transaction.
        """
        entry = self.order[seq]
        if entry.state.settled:  # the run ended while it was executed
            return self._recording.get(seq) or asyncio.create_task(asyncio.sleep(0))
        self.order.settle(seq, State.DONE if outcome.failure is None else State.FAILED)
        body = self._bodies.pop(seq, None)
        self._bodies_size -= len(body or b"")
        task = asyncio.create_task(self._record(seq, outcome, target, also))
        self._recording[seq] = task
        if entry.begun_again >= QUARANTINED_AFTER:
            self.services.gate.close_until(task)
        return task

    async def _record(
        self,
        seq: int,
        outcome: Outcome,
        target: str | None,
        also: Callable[[Connection], object] | None,
    ) -> None:
        now = self.services.clock.now()

        def work(connection: Connection) -> None:
            journal.settle(
                connection, self.services.segments, self.key, seq, outcome, now=now, target=target
            )
            if self.ended is not None:  # perhaps that is what the outcome tells
                journal.note_end(connection, self.key, self.ended)
            if also is not None:
                also(connection)

        try:
            await self.write_patiently(work)
        except Exception as error:  # a defect: whoever waits is told, also of this one
            self._unrecorded = True
            self.broke("an outcome could not be recorded", error)
            assert self.ended is not None
            outcome, ended = Outcome(outcome.kind, failure=self.ended), self.ended
            with suppress(Exception):  # the run's end records what is unsettled then
                await self.patiently(lambda: self.note_end(ended))
                await self.write_patiently(
                    lambda c: journal.settle(
                        c, self.services.segments, self.key, seq, outcome, now=now
                    )
                )
        failpoints.reach("outcome.recorded")
        self._recent.add(seq, outcome)
        self._recording.pop(seq, None)
        event = self._waiting.pop(seq, None)
        if event is not None:
            event.set()

    async def write_patiently(self, work: Callable[[Connection], object]) -> None:
        """A catalog write that has to happen: tried until the catalog takes it."""
        await self.patiently(lambda: self.services.catalog.write(work))

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """`patiently`, with this run's log."""
        return await patiently(call, self.log)

    async def read_patiently(self, work: Callable[[Connection], T]) -> T:
        """A catalog read that has to succeed: tried until the catalog can be read."""
        return await self.patiently(lambda: self.services.catalog.read(work))

    async def persistently(self, call: Callable[[], Awaitable[T]]) -> T:
        """`persistently`, with this run's log."""
        return await persistently(call, self.log)

    async def recorded(self) -> bool:
        """Wait until every outcome so far is durable.

        False when one could not be recorded: nothing that comes after it may be.
        """
        if self._recording:
            await asyncio.wait(list(self._recording.values()))
        return not self._unrecorded

    # --- For the driver ----------------------------------------------------------------------

    async def body(self, seq: int) -> bytes:
        """An operation's body, from memory or from the journal. Raises JournalDamaged."""
        body = self._bodies.get(seq)
        if body is not None:
            return body
        return await self.read_patiently(
            lambda c: journal.body(c, self.services.segments, self.key, seq)
        )

    async def skip(self, seq: int) -> None:
        """Give up a number that never came, durably, so that those after it can go on.

        Raises Unavailable when the journal does not take that now.
        """
        async with self._submitting:
            now = time.monotonic()
            match self.order.next(now):
                case Gap(missing, due) if missing == seq and due <= now:
                    pass
                case _:  # it came at the last moment, or would have if it could have been taken
                    return
            entry = Entry(seq, MISSING, None, State.SKIPPED)
            await self._journal(entry, self._enters(entry))
            self.log.warning("number skipped: it never came", seq=seq)

    async def forget_skipped(self, seqs: Iterable[int]) -> None:
        """The journal has removed these skipped numbers: their requests come no more."""
        async with self._submitting.lock:  # unless one does at this moment
            self.order.forget_skipped(seqs)

    # --- Life --------------------------------------------------------------------------------

    def start(self, drive: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin to execute what comes up."""
        self._driver = asyncio.create_task(drive(), name=f"run {self.key}")

    def broke(self, what: str, error: BaseException) -> None:
        """End the run because of a defect of ours, so that nobody waits for it."""
        self.log.error(what, exc_info=error)
        self.broken = True
        self.end(
            Failure(
                journal.DEFECT,
                "the server met a defect while it executed this run; its log has the details. "
                "The run's checkpoints are not affected, and what it has done is kept as one",
                "server",
            )
        )
        self.wake.set()

    def creation_failed(self, failure: Failure) -> None:
        """End the run because its first operation failed."""
        self.end(Failure("creation_failed", f"the run was not created: {failure.message}"))

    async def note_end(self, reason: Failure) -> None:
        """Note durably that the run is about to end: from then on whoever asks may be told.

        And which operation is finished first, if it ends after that. Raises CatalogUnavailable.
        """
        if self._noted is None:
            await self.services.catalog.write(self.end_note(reason))
            self._noted = reason
            failpoints.reach("end.noted")

    def end_note(self, reason: Failure) -> Callable[[Connection], None]:
        """What `note_end` would write now, for a transaction with what is the cause of the end."""
        under_way, after = self.order.under_way, -1
        if under_way is not None and reason.code in _AFTER_WHAT_HAS_BEGUN:
            after = under_way
        return lambda connection: journal.note_end(connection, self.key, reason, after)

    def end_was_noted(self, reason: Failure, after: int) -> None:
        """Take up a run that was about to end, `after` that number, when its server died.

        Nothing new is begun.
        """
        self._noted = reason
        self.begun_to = after
        self.closing = self.ending = True
        self.broken = reason.code == journal.DEFECT
        if reason.code not in _AFTER_WHAT_HAS_BEGUN:
            self.end(reason)

    async def finish(self, reason: Failure) -> bool:
        """End the run after what has begun; operations that are pending fail with `reason`.

        False when the server stops before that: its next start ends the run. That it is about to
        end must be noted by then.
        """
        self.closing = self.ending = True
        self.wake.set()
        if self._driver is not None:
            await asyncio.wait([self._driver])
            if self._driver.cancelled():
                return False
        self.end(reason)
        async with self._submitting.lock:  # what is being journaled is settled, too
            pass
        await self.recorded()
        return True

    def end(self, reason: Failure) -> None:
        """Take no more operations; those that are pending fail with `reason`."""
        if self.ended is None:
            self.ended = reason
        self.fail_pending(self.ended)

    def fail_pending(self, failure: Failure) -> None:
        """Settle all that is unsettled as failed."""
        for entry in self.order.unsettled:
            self.settle(entry.seq, Outcome(entry.kind, failure=failure))

    async def stop(self, timeout: float) -> None:
        """Stop executing, without ending the run: a later start of the server goes on with it.

        The operation under way may finish within `timeout` seconds.
        """
        self.closing = True
        self.wake.set()
        if self._driver is not None:
            await asyncio.wait([self._driver], timeout=timeout)
            self._driver.cancel()
            await asyncio.wait([self._driver])
        if self._recording:  # what is not recorded is executed again
            await asyncio.wait(list(self._recording.values()), timeout=timeout)


async def persistently(call: Callable[[], Awaitable[T]], log: structlog.BoundLogger = _log) -> T:
    """Something that needs the storage: tried again for a while when that fails.

    It may be full for a moment. And `patiently`, where it writes to the catalog.
    """
    again = pauses(within=STORAGE_WAITED_FOR)
    while True:
        try:
            return await patiently(call, log)
        except RunError as error:
            pause = next(again, None)
            if error.reason != "unavailable" or pause is None:
                raise
            log.warning("the storage is tried again", error=error.message)
        await asyncio.sleep(pause)


async def _digest(body: bytes, like: str | None) -> str:
    if len(body) < _HASHED_AT_ONCE:
        return journal.digest(body, like)
    return await asyncio.to_thread(journal.digest, body, like)


async def patiently(call: Callable[[], Awaitable[T]], log: structlog.BoundLogger = _log) -> T:
    """Something that has to happen and writes to the catalog: tried until that takes it."""
    again = pauses(0.05)
    while True:
        try:
            return await call()
        except CatalogUnavailable as error:
            log.warning("catalog unavailable, trying again", error=str(error))
        await asyncio.sleep(next(again))
