"""Sessions in the catalog, and how long they live without a sign of their client."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from holdfast.catalog import Catalog, CatalogUnavailable
from holdfast.catalog.tables import runs, samplers, sessions
from holdfast.runs import journal
from holdfast.runs.clock import ServingClock
from holdfast.runs.errors import RunError, not_found
from holdfast.runs.stopping import Stopping


@dataclass(frozen=True, slots=True)
class Session:
    """A row of the table. Times are UTC seconds."""

    id: str
    owner: str
    idempotency_key: str | None
    client: str
    sdk_version: str | None
    tags: Sequence[str]
    user_metadata: Mapping[str, str] | None
    project_id: str | None
    display_name: str | None
    created: float
    ended: float | None = None
    end_reason: str | None = None
    end_detail: str | None = None


class Sessions:
    """Opens, keeps alive and ends sessions."""

    def __init__(
        self, catalog: Catalog, clock: ServingClock, stopping: Stopping, *, grace: float
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._stopping = stopping
        self._grace = grace
        self._seen: dict[str, float] = {}

    async def open(self) -> list[Session]:
        """The sessions that have not ended; each has its full grace again."""
        rows = await self._catalog.read(
            lambda c: c.execute(sa.select(sessions).where(sessions.c.ended.is_(None))).all()
        )
        found = [Session(**row._mapping) for row in rows]
        for session in found:
            self.seen(session.id)
        return found

    async def half_ended(self) -> list[Session]:
        """Sessions that ended, but not all they had: the server was killed meanwhile."""
        left = sa.union(
            sa.select(runs.c.session_id).where(runs.c.state == "live"),
            sa.select(samplers.c.session_id),
        )
        rows = await self._catalog.read(
            lambda c: c.execute(
                sa.select(sessions).where(sessions.c.ended.is_not(None) & sessions.c.id.in_(left))
            ).all()
        )
        return [Session(**row._mapping) for row in rows]

    async def create(
        self,
        owner: str,
        *,
        client: str,
        idempotency_key: str | None,
        sdk_version: str | None,
        tags: Sequence[str],
        user_metadata: Mapping[str, str] | None,
        project_id: str | None,
        display_name: str | None,
    ) -> Session:
        """Open a session; the same idempotency key gives the same one again."""
        self._stopping.check()
        new = Session(
            id=uuid.uuid4().hex,
            owner=owner,
            idempotency_key=idempotency_key,
            client=client,
            sdk_version=sdk_version,
            tags=list(tags),
            user_metadata=None if user_metadata is None else dict(user_metadata),
            project_id=project_id,
            display_name=display_name,
            created=time.time(),
        )

        def work(connection: sa.Connection) -> Session:
            if idempotency_key is not None:
                row = connection.execute(
                    sa.select(sessions).where(
                        (sessions.c.idempotency_key == idempotency_key)
                        & (sessions.c.owner == owner)
                    )
                ).first()
                if row is not None:
                    return Session(**row._mapping)
            connection.execute(sessions.insert().values(asdict(new)))
            return new

        session = await self._catalog.write(work)
        self.seen(session.id)
        return session

    def seen(self, session_id: str) -> None:
        """A sign of life: a heartbeat, a submission or a poll."""
        self._seen[session_id] = time.monotonic()

    def forgive(self, seconds: float) -> None:
        """The server was not answering for that long: nobody could give a sign of life."""
        self._seen = {id: seen + seconds for id, seen in self._seen.items()}

    def silent(self) -> list[str]:
        """Sessions without a sign of life for longer than the grace."""
        return [id for id in self._seen if self.is_silent(id)]

    def is_silent(self, session_id: str) -> bool:
        """Whether a session has given no sign of life for longer than the grace."""
        seen = self._seen.get(session_id)
        return seen is not None and time.monotonic() - seen > self._grace

    async def get(self, session_id: str, owner: str) -> Session:
        """Raises RunError when there is none, or it is somebody else's."""
        row = await self._catalog.read(
            lambda c: c.execute(sa.select(sessions).where(sessions.c.id == session_id)).first()
        )
        if row is None or row.owner != owner:
            raise not_found("session", session_id)
        return Session(**row._mapping)

    async def live(self, session_id: str, owner: str) -> Session:
        """`get` for a session that takes requests: RunError when it has ended."""
        try:
            session = await self.get(session_id, owner)
        except CatalogUnavailable:  # its client is there, and we are who does not answer
            if session_id in self._seen:
                self.seen(session_id)
            raise
        if session.ended is not None:
            raise _ended(session_id, session.end_reason)
        self.seen(session_id)
        return session

    def check_open(self, connection: sa.Connection, session_id: str) -> None:
        """Raises RunError when the session has ended: within the write that depends on it."""
        row = connection.execute(sa.select(sessions).where(sessions.c.id == session_id)).one()
        if row.ended is not None:
            raise _ended(session_id, row.end_reason)

    async def end(
        self,
        session_id: str,
        reason: str,
        detail: str | None = None,
        *,
        also: Iterable[Callable[[sa.Connection], None]] = (),
    ) -> bool:
        """Mark a session as ended, durably. False when it had ended before.

        Where it had not, what is `also` to be written is part of the same transaction.
        """

        def work(connection: sa.Connection) -> bool:
            done = connection.execute(
                sessions.update()
                .where((sessions.c.id == session_id) & sessions.c.ended.is_(None))
                .values(ended=time.time(), end_reason=reason, end_detail=detail)
            )
            journal.close_session(connection, session_id, now=self._clock.now())
            if done.rowcount == 0:
                return False
            for write in also:
                write(connection)
            return True

        ended = await self._catalog.write(work)
        self._seen.pop(session_id, None)  # not before: what was refused is tried again
        return ended

    async def list_ids(self, owner: str, *, offset: int, limit: int) -> list[str]:
        """Ids of an owner's sessions, newest first."""
        return await self._catalog.read(
            lambda c: list(
                c.scalars(
                    sa.select(sessions.c.id)
                    .where(sessions.c.owner == owner)
                    .order_by(sessions.c.created.desc())
                    .offset(offset)
                    .limit(limit)
                )
            )
        )

    async def set_project(self, session_id: str, project_id: str) -> None:
        """Put a session into a project."""
        await self._catalog.write(
            lambda c: c.execute(
                sessions.update().where(sessions.c.id == session_id).values(project_id=project_id)
            )
        )

    async def members(self, session_id: str) -> tuple[list[str], list[str]]:
        """Ids of a session's runs and of its samplers."""

        def work(connection: sa.Connection) -> tuple[list[str], list[str]]:
            of_runs = connection.scalars(
                sa.select(runs.c.id)
                .where((runs.c.session_id == session_id) & runs.c.state.not_in(("failed",)))
                .distinct()
                .order_by(runs.c.id)
            )
            of_samplers = connection.scalars(
                sa.select(samplers.c.id).where(
                    (samplers.c.session_id == session_id) & samplers.c.released.is_(None)
                )
            )
            return list(of_runs), list(of_samplers)

        return await self._catalog.read(work)


def _ended(session_id: str, reason: str | None) -> RunError:
    return RunError("session_ended", f"session {session_id!r} has ended ({reason}); open a new one")
