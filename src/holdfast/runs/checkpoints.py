"""Named checkpoints: published to the store, listed from the catalog's index of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import sqlalchemy as sa
import structlog

from holdfast import failpoints
from holdfast.catalog import Catalog, CatalogUnavailable
from holdfast.catalog.tables import checkpoints, runs
from holdfast.runs import index, stored
from holdfast.runs.errors import Category, Reason, RunError, Unavailable, not_found, stopping
from holdfast.runs.index import Checkpoint, Differences
from holdfast.store import (
    Corrupt,
    Manifest,
    Missing,
    NameKey,
    NameTaken,
    Store,
    StoreError,
    SweepReport,
)
from holdfast.store import Unavailable as StoreUnavailable
from holdfast.threads import Closed, Threads

T = TypeVar("T")
P = ParamSpec("P")

STORE_TAKES = 120.0
"""Seconds for which what looks for, makes or changes a checkpoint is waited for: longer than a lock
of the store is. Nothing else ends a call of a disk that does not answer."""

_THREADS = 16
"""Calls of the store at a time."""

_log = structlog.get_logger("holdfast.checkpoints")

_RECONCILED_AT_ONCE = 64

SHORTEST_TTL = 3600
"""Seconds: one hour."""
LONGEST_TTL = 10 * 366 * 24 * 3600
"""Seconds: ten years."""


def check_ttl(seconds: int | None) -> None:
    """Raises RunError unless `seconds` is None or within an hour and ten years."""
    if seconds is not None and not SHORTEST_TTL <= seconds <= LONGEST_TTL:
        raise RunError(
            "invalid_ttl",
            f"ttl_seconds is {seconds}; it must be between {SHORTEST_TTL} (one hour) and "
            f"{LONGEST_TTL} (ten years), or null for no expiry",
        )


def _limited(
    method: Callable[Concatenate[Checkpoints, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Checkpoints, P], Coroutine[Any, Any, T]]:
    """Have a call waited for `STORE_TAKES` at most. Raises RunError, reason "unavailable".

    When its caller is told so, or goes away, it is given up if it has changed nothing yet. Else it
    goes on by itself, with the locks that it holds, to its end: name and row change together, and
    before whatever comes after it.
    """

    @wraps(method)
    async def limited(self: Checkpoints, /, *args: P.args, **kwargs: P.kwargs) -> T:
        working = asyncio.create_task(method(self, *args, **kwargs))
        # Told to whoever waits for it then, perhaps nobody.
        working.add_done_callback(lambda task: task.cancelled() or task.exception())
        working.add_done_callback(self._changing_calls.discard)
        try:
            async with asyncio.timeout(STORE_TAKES):
                return await asyncio.shield(working)
        except TimeoutError:
            raise Unavailable(
                "store_unavailable",
                f"the checkpoint store has not answered for {STORE_TAKES:.0f} s; what it was asked "
                "for may still be done: look whether its disk or its server answers, and try again",
            ) from None
        finally:
            if working not in self._changing_calls:
                working.cancel()

    return limited


class Checkpoints:
    """Saves, resolves, lists and changes checkpoints on behalf of an owner.

    The store is the truth, and knows of no epoch. A server asks for the catalog's before each
    change (`Store.before_change`), and ends when another one has taken over. One that was suspended
    between the question and the change makes this one change when it comes back, and no other,
    since the row that follows is refused. It does no harm:

    - A manifest without a name is an orphan, since no row refers to it: the next start discards it.
    - A name moves only if it is as it was before the question, hence before anything that the new
      server did to it. If that comes to the same save, whose submission is in the journal, it finds
      the checkpoint made by the same request and settles the save with it, or replaces it by its
      own: the state at the same place in the same order, the same bytes. A name that it has not
      asked for (a copy, a changed expiry) is what the client asked of the old server and was not
      told; the client asks again, or the next start lists what there is.
    - A name that is deleted was to be deleted; the client asks the new server again. Only a name
      that was saved anew between that and the old server's return would go with it, and only in an
      object storage: on a disk the old server holds the names' lock meanwhile.
    """

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self.store = store
        self._catalog = catalog
        self._threads = Threads("store", _THREADS)
        """Not those of everything else: a disk that does not answer keeps the threads that ask."""
        self._locks: WeakValueDictionary[NameKey, asyncio.Lock] = WeakValueDictionary()
        self._changing_calls: set[asyncio.Task[Any]] = set()
        """Those that may have changed something, and have not come to their end."""
        self._published: set[str] = set()
        """Unnamed manifests of this process, which it has not discarded."""
        self._discarding = asyncio.Lock()
        """Held while an orphan is discarded, so that it is not published meanwhile."""
        self._creating: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Call the store no more. It is not closed, and a call that hangs is not waited for."""
        self._threads.close()

    def creating(self, run_id: str) -> asyncio.Lock:
        """Held while the run of that id comes into being, which may take as long as the store."""
        return self._creating.setdefault(run_id, asyncio.Lock())

    @_limited
    async def resolve(self, key: NameKey, readers: Sequence[str]) -> tuple[str, Manifest]:
        """The manifest that a name points to, with its id.

        `readers` are the owners on whose behalf it is read. Raises RunError when the checkpoint
        does not exist, has expired, or belongs to somebody else and is not public.
        """
        manifest_id = await self._call(self.store.resolve, key)
        if manifest_id is None:
            raise _no_checkpoint(key)
        manifest = await self.manifest(manifest_id)
        if manifest.owner not in readers and not manifest.public:
            raise _no_checkpoint(key)
        if manifest.expires is not None and manifest.expires <= time.time():
            raise _no_checkpoint(key, "; it has expired")
        return manifest_id, manifest

    @_limited
    async def manifest(self, manifest_id: str) -> Manifest:
        """Read a manifest by its id, verified."""
        return await self._call(self.store.read_manifest, manifest_id)

    @_limited
    async def publish(self, manifest: Manifest, *, replace: bool = False) -> str:
        """Publish a manifest, durably, and give it its name if it has one; returns its id.

        An unnamed manifest is a recovery point, kept until `discard`. A name that is taken raises
        RunError, unless `replace`, or the same request took it before a crash.
        """
        if manifest.key is None:
            async with self._discarding:
                self._published.add(manifest.id)
        manifest_id = await self._call(self.store.publish, manifest)
        failpoints.reach("publish.manifest")
        key = manifest.key
        if key is None:
            return manifest_id
        async with self._changing(key):
            try:
                await self._change(self._name, key, manifest_id, replace)
            except NameTaken as taken:
                earlier = await self._call(self.store.resolve, key)
                if earlier is None or not await self._same_request(earlier, manifest):
                    raise RunError(
                        "checkpoint_exists",
                        f"checkpoint {key.name!r} of run {key.run!r} exists already; save under "
                        "another name, or with overwrite=True",
                        reason="conflict",
                    ) from taken
                manifest_id = earlier
                manifest = await self.manifest(manifest_id)
            failpoints.reach("publish.named")
            await self._catalog.write(lambda c: index.put(c, key, manifest_id, manifest))
        return manifest_id

    @_limited
    async def made_by(self, key: NameKey, request_id: str) -> str | None:
        """The manifest under a name if that request made it: its save was done before a crash.

        One that is damaged is nobody's: whoever saves under its name may replace it.
        """
        try:
            manifest_id = await self._call(self.store.resolve, key)
            if manifest_id is None:
                return None
            made = (await self.manifest(manifest_id)).request_id == request_id
        except RunError as error:
            if error.reason == "unavailable":
                raise
            return None
        return manifest_id if made else None

    @_limited
    async def discard(self, manifest_ids: Sequence[str]) -> None:
        """Let go of unnamed manifests."""
        for manifest_id in manifest_ids:
            await self._change(self.store.discard, manifest_id)
            self._published.discard(manifest_id)

    async def discard_unused(self, manifest_ids: Iterable[str]) -> None:
        """Let go of those unnamed manifests that no row refers to."""
        used = await self._catalog.read(index.referred_to)
        await self.discard([id for id in manifest_ids if id not in used])

    @_limited
    async def delete(self, key: NameKey, owner: str) -> None:
        """Delete a name: hidden at once, its bytes go with the next sweeps.

        One whose name or manifest is damaged too: as long as that is there, nothing is swept.
        """
        async with self._changing(key):
            try:
                await self._owned(key, owner)
            except RunError:
                if not await self._is_remnant(key, owner):
                    raise
            await self._change(self.store.delete_name, key)
            await self._catalog.write(lambda c: index.remove(c, [key]))

    async def set_ttl(self, key: NameKey, owner: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now, or never."""
        check_ttl(ttl_seconds)
        expires = None if ttl_seconds is None else time.time() + ttl_seconds
        await self._amend(key, owner, expires=expires)

    async def set_public(self, key: NameKey, owner: str, public: bool) -> None:
        """Make a checkpoint readable by everybody, or by its owner alone again."""
        await self._amend(key, owner, public=public)

    async def page(
        self, owner: str, *, run_id: str | None = None, offset: int = 0, limit: int | None = None
    ) -> tuple[list[Checkpoint], int]:
        """An owner's checkpoints, newest first, and how many there are in all."""
        where = (checkpoints.c.owner == owner) & index.alive()
        if run_id is not None:
            where &= checkpoints.c.run_id == run_id

        def query(connection: sa.Connection) -> tuple[list[Checkpoint], int]:
            total = connection.scalar(
                sa.select(sa.func.count()).select_from(checkpoints).where(where)
            )
            rows = connection.execute(
                index.select_with_own_size()
                .where(where)
                .order_by(checkpoints.c.created.desc(), checkpoints.c.name)
                .offset(offset)
                .limit(limit)
            )
            return [Checkpoint(**row._mapping) for row in rows], total or 0

        return await self._catalog.read(query)

    async def own_size(self, key: NameKey) -> int:
        """Bytes of the blobs that no other checkpoint has."""
        return await self._catalog.read(
            lambda c: (
                c.scalar(
                    sa.select(index.own_size_of()).select_from(checkpoints).where(index.row_of(key))
                )
                or 0
            )
        )

    async def newest(self, run_ids: Sequence[str], kind: str) -> dict[str, Checkpoint]:
        """The last checkpoint of that kind in its order, for each run that has one."""

        def query(connection: sa.Connection) -> dict[str, Checkpoint]:
            rows = connection.execute(
                index.select_with_own_size()
                .where(
                    checkpoints.c.run_id.in_(run_ids) & (checkpoints.c.kind == kind) & index.alive()
                )
                .order_by(*index.IN_A_RUN)
            )
            return {row.run_id: Checkpoint(**row._mapping) for row in rows}

        return await self._catalog.read(query)

    async def newest_intact(self, run_id: str) -> NameKey | None:
        """The newest checkpoint of a run to continue from whose every byte is as it was written."""

        def query(connection: sa.Connection) -> list[NameKey]:
            rows = connection.execute(
                sa.select(checkpoints)
                .where((checkpoints.c.run_id == run_id) & (checkpoints.c.kind == "weights"))
                .where(index.alive())
                .order_by(*(column.desc() for column in index.IN_A_RUN))
            )
            return [NameKey(row.run_id, row.kind, row.name) for row in rows]

        for key in await self._catalog.read(query):
            with suppress(RunError):
                manifest_id = await self._call(self.store.resolve, key)
                if manifest_id is None:
                    continue
                if (await self._call(self.store.verify, manifest_id)).ok:
                    return key
        return None

    async def intact(self, manifest_id: str) -> bool:
        """Whether every byte of a manifest and its blobs is as it was written."""
        try:
            return (await self._call(self.store.verify, manifest_id)).ok
        except RunError as error:
            if error.reason == "unavailable":
                raise
            return False

    async def sweep(self) -> SweepReport:
        """Sweep the store, and take what has expired out of the index."""
        report = await self._call(self.store.sweep)
        for key in report.names:
            async with self._changing(key):
                if await self._call(self.store.resolve, key) is None:  # not saved again meanwhile
                    await self._catalog.write(partial(index.remove, keys=[key]))
        return report

    async def differences(self) -> Differences:
        """Compare the index with the store, which is the truth.

        A name that is changed meanwhile differs for as long as its row is not: until that is
        written, or for this look only.
        """
        named = dict(await self._call(lambda: list(self.store.names(on_damage=_log_damage))))
        return await self._catalog.read(partial(index.compare, named=named))

    async def reconcile(self) -> tuple[int, int]:
        """Make the index agree with the store; how many rows were added or changed, and removed.

        A checkpoint whose manifest is damaged is left out. A run that only the store knows is
        listed again, as one that holds checkpoints.
        """
        found = await self.differences()
        keys = [*found.unlisted, *found.gone, *found.unpositioned]
        done: list[bool | None] = []
        for at in range(0, len(keys), _RECONCILED_AT_ONCE):
            some = keys[at : at + _RECONCILED_AT_ONCE]
            done += await asyncio.gather(*(self._reconcile(key) for key in some))
        for manifest_id in found.without_run.values():
            try:
                manifest = await self._in_thread(self.store.read_manifest, manifest_id)
            except StoreError as error:
                _log_damage(error)
            else:
                async with self.creating(manifest.run):
                    await self._catalog.write(partial(stored.insert_missing, manifest=manifest))
        return done.count(True), done.count(False)

    async def _reconcile(self, key: NameKey) -> bool | None:
        """Make a row agree with its name as it is now: saves and deletions go on meanwhile.

        Whether the row is there now; None when that of a damaged one was left as it is.
        """
        async with self._changing(key):
            try:
                manifest_id = await self._in_thread(self.store.resolve, key)
                if manifest_id is None:
                    await self._catalog.write(lambda c: index.remove(c, [key]))
                    return False
                manifest = await self._in_thread(self.store.read_manifest, manifest_id)
            except StoreError as error:
                _log_damage(error)
                return None
            await self._catalog.write(lambda c: index.put(c, key, manifest_id, manifest))
            return True

    async def discard_orphans(self) -> int:
        """Let go of unnamed manifests that nothing refers to; how many there were.

        They are published before the row that refers to them, and a crash may come in between. What
        this process has published since its start is left alone. So are those of runs that the
        catalog does not know, since it may be the catalog that was lost: `holdfast doctor` gives
        them a name.
        """
        used = await self._catalog.read(index.referred_to)
        found = await self._call(lambda: list(self.store.unnamed(on_damage=_log_damage)))
        known = await self._catalog.read(stored.trained)
        orphans = [id for id, manifest in found if id not in used and manifest.run in known]
        discarded = 0
        for manifest_id in orphans:
            async with self._discarding:
                if manifest_id not in self._published:
                    # Without a limit: nobody waits for it, and the lock is held until it is done.
                    await self._call(self.store.discard, manifest_id)
                    discarded += 1
        return discarded

    @_limited
    async def _amend(self, key: NameKey, owner: str, /, **changes: Any) -> None:
        async with self._changing(key):
            await self._owned(key, owner)
            manifest_id = await self._change(lambda: self.store.amend(key, **changes))
            manifest = await self.manifest(manifest_id)
            await self._catalog.write(lambda c: index.put(c, key, manifest_id, manifest))

    def _changing(self, key: NameKey) -> asyncio.Lock:
        """Held while a name and its row are changed: together, or the row may be of another one."""
        return self._locks.setdefault(key, asyncio.Lock())

    async def _is_remnant(self, key: NameKey, owner: str) -> bool:
        """Whether an owner's name is damaged, or its deletion was interrupted by the catalog."""
        listed = sa.select(checkpoints.c.name).where(
            index.row_of(key) & (checkpoints.c.owner == owner)
        )
        of_run = sa.select(runs.c.id).where((runs.c.id == key.run) & (runs.c.owner == owner))

        is_listed, is_of_run = await self._catalog.read(
            lambda c: [c.execute(query).first() is not None for query in (listed, of_run)]
        )
        try:
            manifest_id = await self._call(self.store.resolve, key)
            if manifest_id is None:
                return is_listed
            await self.manifest(manifest_id)
        except RunError as error:
            return error.reason == "damaged" and (is_listed or is_of_run)
        return False

    async def _owned(self, key: NameKey, owner: str) -> None:
        _, manifest = await self.resolve(key, [owner])
        if manifest.owner != owner:
            raise RunError(
                "not_the_owner",
                f"checkpoint {key.name!r} of run {key.run!r} is public but belongs to another "
                "owner, who alone can change it",
                reason="forbidden",
            )

    async def _same_request(self, manifest_id: str, manifest: Manifest) -> bool:
        earlier = await self.manifest(manifest_id)
        return manifest.request_id is not None and earlier.request_id == manifest.request_id

    def _name(self, key: NameKey, manifest_id: str, replace: bool) -> None:
        self.store.set_name(key, manifest_id, replace=replace)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._threads.run(call, *args)
        except Closed as closed:
            raise stopping() from closed

    async def _change(self, call: Callable[..., T], *args: Any) -> T:
        """`_call` by which what it is part of is not given up any more: see `_limited`.

        Publishing a manifest is none: what has no name and no row is nobody's.
        """
        working = asyncio.current_task()
        assert working is not None
        self._changing_calls.add(working)
        return await self._call(call, *args)

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._in_thread(call, *args)
        except NameTaken:
            raise
        except StoreUnavailable as error:
            raise Unavailable(error.code, str(error)) from error
        except StoreError as error:
            reason, category = _MEANING[next(kind for kind in _MEANING if isinstance(error, kind))]
            raise RunError(error.code, str(error), reason=reason, category=category) from error
        except CatalogUnavailable as error:  # which the store asks for the epoch
            raise Unavailable("catalog_unavailable", str(error)) from error


_MEANING: dict[type[StoreError], tuple[Reason, Category]] = {
    Corrupt: ("damaged", "server"),
    Missing: ("not_found", "user"),
    StoreError: ("invalid", "user"),
}
"""What the store's errors are to a caller; the first that fits."""


def _log_damage(error: StoreError) -> None:
    _log.error("damage in the store", error=str(error))


def _no_checkpoint(key: NameKey, hint: str = "") -> RunError:
    return not_found("checkpoint", f"tinker://{key.run}/{key.kind}/{key.name}", hint)
