"""Searching sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from holdfast.catalog.tables import checkpoint_files, checkpoints, runs, sessions
from holdfast.runs.sessions import Session

DEFAULT_PROJECT = "default"
"""The project of sessions that were given none."""


@dataclass(frozen=True, slots=True)
class Query:
    """What sessions are looked for. Fields that are None match all."""

    owner: str
    session_id: str | None = None
    """With `display_name`: those that match either."""
    display_name: str | None = None
    """Words that all occur in it, whatever their case."""
    project_ids: Sequence[str] | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    """All of these pairs."""
    end_reasons: Sequence[str | None] | None = None
    """How it ended, None: it has not."""
    after: tuple[float, str] | None = None
    """Creation time and id of the last one on the page before."""
    limit: int = 50


@dataclass(frozen=True, slots=True)
class Found:
    """A session and what its runs have saved."""

    session: Session
    checkpoints: int
    size: int
    """Bytes of the checkpoints' blobs, each counted once."""


def search(connection: sa.Connection, query: Query) -> tuple[list[Found], bool]:
    """A page of sessions, newest first, and whether there are more."""
    rows = connection.execute(
        sa.select(sessions)
        .where(*_conditions(connection, query))
        .order_by(sessions.c.created.desc(), sessions.c.id.desc())
    )
    found: list[Session] = []
    for row in rows:
        session = Session(**row._mapping)
        if query.user_metadata.items() <= (session.user_metadata or {}).items():
            found.append(session)
        if len(found) > query.limit:
            break
    rows.close()
    page = [Found(session, *_saved(connection, session.id)) for session in found[: query.limit]]
    return page, len(found) > query.limit


def _conditions(connection: sa.Connection, query: Query) -> list[sa.ColumnElement[bool]]:
    table = sessions.c
    conditions = [table.owner == query.owner]
    either: list[sa.ColumnElement[bool]] = []
    if query.session_id is not None:
        either.append(table.id == query.session_id)
    if query.display_name is not None:
        words = query.display_name.lower().split()
        name = sa.func.lower(sa.func.coalesce(table.display_name, ""))
        either.append(sa.and_(*(name.contains(word, autoescape=True) for word in words)))
    if either:
        conditions.append(sa.or_(*either))
    if query.project_ids is not None:
        project = sa.func.coalesce(table.project_id, DEFAULT_PROJECT)
        conditions.append(project.in_(query.project_ids))
    if query.end_reasons is not None:
        ended = [reason for reason in query.end_reasons if reason is not None]
        states = [table.end_reason.in_(ended)]
        if None in query.end_reasons:
            states.append(table.ended.is_(None))
        conditions.append(sa.or_(*states))
    if query.after is not None:
        created, last_id = query.after
        # The exact time: what clients send back has been rounded.
        exact = connection.scalar(sa.select(table.created).where(table.id == last_id))
        created = created if exact is None else exact
        conditions.append(
            (table.created < created) | ((table.created == created) & (table.id < last_id))
        )
    return conditions


def _saved(connection: sa.Connection, session_id: str) -> tuple[int, int]:
    mine = sa.select(runs.c.id).where(runs.c.session_id == session_id)
    count = connection.scalar(
        sa.select(sa.func.count()).select_from(checkpoints).where(checkpoints.c.run_id.in_(mine))
    )
    blobs = (
        sa.select(checkpoint_files.c.hash, checkpoint_files.c.size)
        .where(checkpoint_files.c.run_id.in_(mine))
        .distinct()
        .subquery()
    )
    size = connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(blobs.c.size), 0)))
    return count or 0, int(size or 0)
