"""Samplers and their requests: unordered, kept in memory, gone with the process.

A sampling request changes nothing, so a client that loses one sends it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import sqlalchemy as sa
import structlog

from holdfast.catalog import Catalog, CatalogUnavailable
from holdfast.catalog.tables import samplers
from holdfast.engine.interface import OPTIMIZER_STATE, EngineError, WorkerDied
from holdfast.runs import journal
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.clock import ServingClock
from holdfast.runs.engines import Engines, Host, NotLoaded
from holdfast.runs.errors import RunError, Unavailable, not_found, storage_failed
from holdfast.runs.journal import Failure, Outcome
from holdfast.runs.run import persistently
from holdfast.runs.stopping import Stopping
from holdfast.store import Blob, NameKey

MOST_WAITING = 40_000
"""Requests without an answer, at a time: of all owners together ..."""
MOST_WAITING_BYTES = 2 << 30
"""... and their bytes. Of either an owner may have as much as is left to others: alone, half."""
MOST_KEPT = 256 << 20
"""Bytes of answers that are kept; a client that has lost one sends its request again."""
KEPT_AFTER_READ = 600.0
"""Seconds for which an answer can be read again."""
NEWEST_KEPT = 100
"""A session's samplers of one run's weights that stay however little they are used ..."""
UNUSED_KEPT = 6 * 3600.0
"""... as do older ones that were used within so many seconds."""
_RELEASED_AT_ONCE = 500
_ATTEMPTS = 3
_BASE_MODEL_WAITED_FOR = 600.0
"""Seconds for which a request waits for a base model that cannot be loaded again."""
_BASE_MODEL_PAUSE = 5.0
_LOADING_WAITED_FOR = 30.0
"""Seconds: clients give up a request after a minute."""

_log = structlog.get_logger("holdfast.samplers")


@dataclass(frozen=True, slots=True)
class Sampler:
    """A base model, alone or with an adapter's weights."""

    id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None
    manifest: str | None
    created: float
    run_id: str | None = None
    """Whose weights they are."""
    released: float | None = None
    """When its weights were let go."""


@dataclass(slots=True)
class _Request:
    body_hash: str
    owner: str
    body_size: int
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None
    read: float | None = None
    task: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        """Bytes it is reckoned with, once it has its outcome."""
        result = None if self.outcome is None else self.outcome.result
        return 1024 + len(result or b"")


class _Waiting:
    """Requests without an answer: how many there are, and their bytes, by owner."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._sizes: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def has_room(self, owner: str, size: int) -> bool:
        """Whether another one of that owner would leave the others as much as the owner has.

        So neither one owner nor a few of them can have all there is.
        """
        left = MOST_WAITING - self._counts.total()
        left_bytes = MOST_WAITING_BYTES - self._sizes.total()
        return self._counts[owner] < left and self._sizes[owner] + size <= left_bytes

    def add(self, owner: str, size: int) -> None:
        self._counts[owner] += 1
        self._sizes[owner] += size

    def remove(self, owner: str, size: int) -> None:
        self._counts[owner] -= 1
        self._sizes[owner] -= size
        if not self._counts[owner]:
            del self._counts[owner], self._sizes[owner]


class Samplers:
    """Creates samplers and executes their requests, one at a time per sampler.

    So a sampler takes turns at its worker as a run does, however many requests it has.
    """

    def __init__(
        self,
        catalog: Catalog,
        checkpoints: Checkpoints,
        engines: Engines,
        stopping: Stopping,
        clock: ServingClock,
    ) -> None:
        self._catalog = catalog
        self._checkpoints = checkpoints
        self._engines = engines
        self._stopping = stopping
        self._clock = clock
        self._started: float | None = None
        """When this server first looked for what is unused."""
        self._used: dict[str, float] = {}
        """When samplers were created or asked for, as far as that was within `UNUSED_KEPT`."""
        self._releasing: frozenset[str] = frozenset()
        """Those that were let go the last time."""
        self._requests: dict[tuple[str, int], _Request] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Held while a request of that sampler has, or waits for, its turn at the worker."""
        self._waiting = _Waiting()
        self._forget_at = 1024
        """Answers in memory from which on those that can go are looked for."""

    async def create(
        self,
        session_id: str,
        owner: str,
        base_model: str,
        seq_id: int | None,
        *,
        manifest: str | None = None,
        model_path: str | None = None,
        run_id: str | None = None,
    ) -> Sampler:
        """Record a sampler. `manifest` is an unnamed one of a run's weights, which lives with it.

        Clients number samplers per session, some of them from several counters at once: the same
        number with the same content is the same sampler, with another content another one.
        """
        stem = f"{session_id}:sample:{0 if seq_id is None else seq_id}"

        def work(connection: sa.Connection) -> Sampler:
            copy = 0
            while True:
                id = stem if copy == 0 else f"{stem}.{copy}"
                new = Sampler(
                    id,
                    session_id,
                    owner,
                    base_model,
                    model_path,
                    manifest,
                    time.time(),
                    run_id,
                )
                row = connection.execute(sa.select(samplers).where(samplers.c.id == id)).first()
                if row is None:
                    connection.execute(samplers.insert().values(dataclasses.asdict(new)))
                    return new
                old = Sampler(**row._mapping)
                if dataclasses.replace(new, created=old.created) == old:
                    return old
                copy += 1

        sampler = await self._catalog.write(work)
        self._used[sampler.id] = self._clock.now()
        return sampler

    async def create_from_path(
        self, session_id: str, owner: str, seq_id: int, key: NameKey, base_model: str | None
    ) -> Sampler:
        """A sampler of a checkpoint's weights as they are now, whatever becomes of its name."""
        self._stopping.check()
        manifest_id, manifest = await self._checkpoints.resolve(key, [owner])
        if base_model is not None and base_model != manifest.base_model:
            raise RunError(
                "incompatible_checkpoint",
                f"'tinker://{key}' was trained on base model {manifest.base_model!r}, "
                f"not {base_model!r}",
            )
        host = self._engines[manifest.base_model]
        try:
            async with asyncio.timeout(_LOADING_WAITED_FOR):
                _, info, _ = await host.engine()
        except (TimeoutError, NotLoaded):
            raise Unavailable(
                "base_model_loading", f"base model {host.name!r} is being loaded; try again"
            ) from None
        except EngineError as error:
            raise RunError(error.code, error.message, category=error.category) from error
        if manifest.base_revision != info.revision:
            raise RunError(
                "base_revision_mismatch",
                f"'tinker://{key}' was trained on another version of base model "
                f"{manifest.base_model!r}",
            )
        fixed = dataclasses.replace(
            manifest,
            kind="sampler",
            name=None,
            owner=owner,
            optimizer=None,
            public=False,
            expires=None,
            user_metadata=None,
            parent=manifest_id,
            # A manifest of its own: it goes with this session, whoever else samples the path.
            request_id=f"{session_id}:sample:{seq_id}",
            files={n: blob for n, blob in manifest.files.items() if n != OPTIMIZER_STATE},
        )
        return await self.create(
            session_id,
            owner,
            manifest.base_model,
            seq_id,
            manifest=await self._checkpoints.publish(fixed),
            model_path=f"tinker://{key}",
            run_id=key.run,
        )

    async def create_from_base(
        self, session_id: str, owner: str, seq_id: int, base_model: str
    ) -> Sampler:
        """A sampler of a base model as it is."""
        self._stopping.check()
        self._engines[base_model]
        return await self.create(session_id, owner, base_model, seq_id)

    async def get(self, sampler_id: str, owner: str) -> Sampler:
        """Raises RunError when the sampler does not exist or belongs to somebody else."""
        row = await self._catalog.read(
            lambda c: c.execute(sa.select(samplers).where(samplers.c.id == sampler_id)).first()
        )
        if row is None or row.owner != owner:
            raise not_found("sampler", sampler_id)
        sampler = Sampler(**row._mapping)
        if sampler.released is not None or sampler_id in self._releasing:
            raise RunError(
                "sampler_released",
                f"sampler {sampler_id!r} is gone: nobody used it for {UNUSED_KEPT / 3600:.0f} hours"
                f", and this session made {NEWEST_KEPT} newer ones of the run's weights; save "
                "weights that are to be sampled later under a name, and make a sampler of its path",
                reason="not_found",
            )
        self._used[sampler_id] = self._clock.now()
        return sampler

    async def of_session(self, session_id: str) -> list[Sampler]:
        rows = await self._catalog.read(
            lambda c: c.execute(
                sa.select(samplers).where(samplers.c.session_id == session_id)
            ).all()
        )
        return [Sampler(**row._mapping) for row in rows]

    def submit(self, sampler: Sampler, seq_id: int, asked: bytes, body: bytes) -> str:
        """Take a request; the same number is the same request when it `asked` for the same.

        `body` is what is executed: with the seed that was drawn when none was asked for.
        """
        self._stopping.check()
        key = (sampler.id, seq_id)
        body_hash = journal.digest(asked)
        known = self._requests.get(key)
        if known is None:
            if len(self._requests) - len(self._waiting) > self._forget_at:
                self._forget()
                self._forget_at = max(1024, 2 * (len(self._requests) - len(self._waiting)))
            if not self._waiting.has_room(sampler.owner, len(body)):
                raise Unavailable(
                    "too_many_samples",
                    "too many of your sampling requests are waiting; send this one again later",
                )
            request = _Request(body_hash, sampler.owner, len(body))
            self._waiting.add(request.owner, request.body_size)
            request.task = asyncio.create_task(self._execute(sampler, body, request))
            self._requests[key] = request
        elif known.body_hash != body_hash:
            raise RunError(
                "sequence_conflict",
                f"number {seq_id} of sampler {sampler.id!r} was used for another request",
            )
        return f"{sampler.id}:{seq_id}"

    async def outcome(self, sampler_id: str, seq_id: int, timeout: float) -> Outcome | None:
        """A request's outcome, waited for at most `timeout` seconds; None while it is not there.

        Raises RunError of reason "gone" for a request that is not known (any more).
        """
        request = self._requests.get((sampler_id, seq_id))
        if request is None:
            raise RunError(
                "sample_lost",
                f"sampling request {sampler_id}:{seq_id} is not known here: the server was "
                "restarted, or its answer was read a while ago; send it again",
                reason="gone",
                category="server",
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await request.done.wait()
        return request.outcome

    def delivered(self, sampler_id: str, seq_id: int) -> None:
        request = self._requests.get((sampler_id, seq_id))
        if request is not None and request.read is None:
            request.read = time.monotonic()

    def cancel(self, sampler_id: str, seq_id: int) -> None:
        """Drop a request that nobody waits for. Idempotent."""
        request = self._requests.pop((sampler_id, seq_id), None)
        if request is not None and request.outcome is None and request.task is not None:
            request.task.cancel()
            self._waiting.remove(request.owner, request.body_size)

    async def release_unused(self) -> None:
        """Let go of the weights of old samplers that nobody uses any more.

        A training that samples makes one with each step, and comes back to the newest few. Their
        rows stay until the session ends: no other sampler may get the id of one that is gone.
        """
        newer = sa.func.row_number().over(
            partition_by=(samplers.c.session_id, samplers.c.run_id),
            order_by=(samplers.c.created.desc(), samplers.c.id),
        )
        ranked = (
            sa.select(samplers.c.id, samplers.c.manifest, newer.label("number"))
            .where(samplers.c.manifest.is_not(None) & samplers.c.run_id.is_not(None))
            .subquery()
        )
        rows = await self._catalog.read(
            lambda c: c.execute(sa.select(ranked).where(ranked.c.number > NEWEST_KEPT)).all()
        )
        now = self._clock.now()
        if self._started is None:
            self._started = now
        since = now - UNUSED_KEPT
        self._used = {id: used for id, used in self._used.items() if used > since}
        if not rows or self._started > since:  # the server before may have been asked for them
            return
        busy = {key[0] for key, request in self._requests.items() if request.outcome is None}
        old = [row for row in rows if row.id not in self._used and row.id not in busy]
        old = old[:_RELEASED_AT_ONCE]
        releasing = self._releasing = frozenset(row.id for row in old)
        if not releasing:
            return
        try:
            await self._catalog.write(
                lambda c: c.execute(
                    samplers.update()
                    .where(samplers.c.id.in_(releasing))
                    .values(manifest=None, released=time.time())
                )
            )
        except CatalogUnavailable:
            self._releasing = frozenset()
            raise
        _log.info("samplers released", samplers=len(releasing))
        with suppress(RunError):  # the next start finds what is left
            await self._checkpoints.discard([row.manifest for row in old])

    async def end_session(self, session_id: str) -> None:
        """Let the session's samplers go."""
        ended = await self.of_session(session_id)
        for sampler in ended:
            for key in [k for k in self._requests if k[0] == sampler.id]:
                self.cancel(*key)
        await self._catalog.write(
            lambda c: c.execute(samplers.delete().where(samplers.c.session_id == session_id))
        )
        with suppress(RunError):  # the next start finds what is left
            await self._checkpoints.discard([s.manifest for s in ended if s.manifest is not None])

    async def close(self) -> None:
        tasks = [r.task for r in self._requests.values() if r.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _execute(self, sampler: Sampler, body: bytes, request: _Request) -> None:
        try:
            result = await self._sample(sampler, body)
            request.outcome = Outcome("sample", result=result)
        except (EngineError, RunError) as error:
            failure = Failure(error.code, error.message, error.category)
            request.outcome = Outcome("sample", failure=failure)
        except Exception:
            _log.exception("a sampling request met a defect", sampler=sampler.id)
            failure = Failure(
                "internal_error", "the server met a defect; its log has the details", "server"
            )
            request.outcome = Outcome("sample", failure=failure)
        self._waiting.remove(request.owner, request.body_size)
        request.done.set()

    async def _sample(self, sampler: Sampler, body: bytes) -> bytes:
        files, manifest = None, sampler.manifest
        if manifest is not None:
            files = (await persistently(lambda: self._checkpoints.manifest(manifest), _log)).files
        host = self._engines[sampler.base_model]
        deaths = 0
        async with self._turns.setdefault(sampler.id, asyncio.Lock()):
            while deaths < _ATTEMPTS:
                # The worker that is there when its turn comes: a death before is none of its.
                try:
                    return await persistently(lambda: _compute(host, files, body), _log)
                except WorkerDied:
                    deaths += 1
                except NotLoaded as error:
                    if time.monotonic() - error.since > _BASE_MODEL_WAITED_FOR:
                        raise
                    await asyncio.sleep(_BASE_MODEL_PAUSE)
        raise RunError(
            "operation_kills_worker",
            f"the worker died {_ATTEMPTS} times while it executed this sampling request",
            category="server",
        )

    def _forget(self) -> None:
        """Let answers go: long after they were read, or the oldest when they are too many."""
        now = time.monotonic()
        finished = [(k, r) for k, r in self._requests.items() if r.outcome is not None]
        size = sum(r.size for _, r in finished)
        for key, request in finished:
            old = request.read is not None and now - request.read > KEPT_AFTER_READ
            if old or size > MOST_KEPT:
                size -= request.size
                del self._requests[key]


async def _compute(host: Host, files: Mapping[str, Blob] | None, body: bytes) -> bytes:
    """Raises Unavailable when the storage fails."""
    try:
        async with host.computing() as (engine, _):
            return await engine.sample(files, body)
    except EngineError as error:
        if not storage_failed(error):
            raise
        raise Unavailable(error.code, error.message) from error
