"""Copies of checkpoints, and checkpoints that come from outside: each in a run of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import runs
from holdfast.runs import bodies, journal, stored
from holdfast.runs.checkpoints import Checkpoints, check_ttl
from holdfast.runs.errors import RunError
from holdfast.runs.sessions import Session, Sessions
from holdfast.runs.stopping import Stopping
from holdfast.store import Manifest, NameKey


@dataclass(frozen=True, slots=True)
class Destination:
    """A number within a living session. Without one, a copy gets a session of its own."""

    session: Session
    model_seq_id: int


class Copies:
    """Copies checkpoints under new names: a manifest over the same blobs, no bytes are moved."""

    def __init__(
        self,
        catalog: Catalog,
        checkpoints: Checkpoints,
        sessions: Sessions,
        stopping: Stopping,
    ) -> None:
        self._catalog = catalog
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._stopping = stopping

    async def copy(
        self,
        source: NameKey,
        owner: str,
        readers: Sequence[str],
        *,
        destination: Destination | None = None,
        project_id: str | None = None,
        ttl_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> NameKey:
        """Copy a checkpoint into a run of its own, which belongs to `owner`; the copy's name.

        It keeps kind, name, step and user metadata, is not public, and never expires without
        `ttl_seconds`. The same idempotency key gives the same copy. Raises RunError when the
        source cannot be read by any of `readers`, or the destination is taken.
        """
        self._stopping.check()
        check_ttl(ttl_seconds)
        manifest_id, manifest = await self._checkpoints.resolve(source, readers)
        if destination is None:
            key = None if idempotency_key is None else f"copy {idempotency_key}"
            session = await self._session(source, owner, project_id, key)
            run_id = f"{session.id}:train:0"
        else:
            run_id = f"{destination.session.id}:train:{destination.model_seq_id}"
        asked = bodies.encode_json({"copy": str(source), "ttl": ttl_seconds, "project": project_id})
        now = time.time()
        copied = dataclasses.replace(
            manifest,
            run=run_id,
            owner=owner,
            parent=manifest_id,
            created=now,
            expires=None if ttl_seconds is None else now + ttl_seconds,
            public=False,
            request_id=f"{run_id}:copy",
        )
        # Not left without its run's row, or its lock, when whoever has asked goes away.
        await asyncio.shield(self._create(copied, asked, idempotency_key))
        return NameKey(run_id, source.kind, source.name)

    async def _create(self, copied: Manifest, asked: bytes, idempotency_key: str | None) -> None:
        async with self._checkpoints.creating(copied.run):
            if await self._is_there(copied.run, asked, idempotency_key):
                return
            await self._checkpoints.publish(copied)
            await self._catalog.write(
                lambda c: stored.insert(
                    c, copied, body_hash=journal.digest(asked), idempotency_key=idempotency_key
                )
            )

    async def _session(
        self, source: NameKey, owner: str, project_id: str | None, idempotency_key: str | None
    ) -> Session:
        session = await self._sessions.create(
            owner,
            client="other",
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            sdk_version=None,
            tags=[],
            user_metadata=None,
            project_id=project_id,
            display_name=f"copy of tinker://{source}",
        )
        await self._sessions.end(session.id, "success")
        return session

    async def _is_there(self, run_id: str, asked: bytes, idempotency_key: str | None) -> bool:
        row = await self._catalog.read(
            lambda c: c.execute(
                sa.select(runs.c.body_hash, runs.c.idempotency_key).where(
                    (runs.c.id == run_id) & runs.c.state.not_in(("failed", "replaced"))
                )
            ).first()
        )
        if row is None:
            return False
        same_key = idempotency_key is not None and row.idempotency_key == idempotency_key
        same_body = journal.digest(asked, like=row.body_hash) == row.body_hash
        if same_body and (same_key or row.idempotency_key is None):
            return True
        raise RunError(
            "model_exists",
            f"run {run_id!r} exists and was made by another request; a copy needs another "
            "model_seq_id",
        )


async def adopt(checkpoints: Checkpoints, catalog: Catalog, manifest: Manifest) -> None:
    """Publish a checkpoint that came from outside, under a run of its own."""
    await checkpoints.publish(manifest)
    await catalog.write(lambda c: stored.insert(c, manifest))
