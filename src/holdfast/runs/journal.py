"""The journal: a run's operations in the catalog, as plain functions over a connection."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from blake3 import blake3
from sqlalchemy import Connection

from holdfast.catalog.statements import Statement
from holdfast.catalog.tables import contents, operations, runs, sessions, snapshots
from holdfast.runs.bodies import MISSING
from holdfast.runs.contents import Address, Part, get, put
from holdfast.runs.errors import Category
from holdfast.runs.order import Entry, State
from holdfast.runs.segments import JournalDamaged, Segments

DEFECT = "internal_error"
"""The code with which operations fail when their run ends because of a defect of ours."""
ENDS = frozenset({"session_ended", "model_unloaded", DEFECT})
"""Codes with which operations fail that the end of their run overtook."""


@dataclass(frozen=True, slots=True)
class RunKey:
    """A run's identity. The generation tells apart the lives of a model id that was reused."""

    id: str
    generation: int = 0

    def __str__(self) -> str:
        return self.id if self.generation == 0 else f"{self.id}:g{self.generation}"

    def request_id(self, seq: int) -> str:
        return f"{self}:{seq}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an operation failed."""

    code: str
    message: str
    category: Category = "user"

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "category": self.category}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Failure:
        category: Category = "user" if value["category"] == "user" else "server"
        return cls(value["code"], value["message"], category)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an operation: exactly one of `result` and `failure` is there."""

    kind: str
    result: bytes | None = None
    failure: Failure | None = None


_BLAKE3 = "blake3:"


def digest(data: bytes, like: str | None = None) -> str:
    """The hash by which bodies and results are compared, also with one that was recorded: `like`.

    Those recorded by the first versions are of BLAKE2b, which takes five times as long.
    """
    if like is not None and not like.startswith(_BLAKE3):
        return hashlib.blake2b(data, digest_size=32).hexdigest()
    return _BLAKE3 + blake3(data).hexdigest()


# Built once, since building a statement takes longer than executing it.
_THIS_RUN = (runs.c.id == sa.bindparam("run")) & (runs.c.generation == sa.bindparam("life"))
_THIS_ONE = (
    (operations.c.run_id == sa.bindparam("run"))
    & (operations.c.generation == sa.bindparam("life"))
    & (operations.c.seq == sa.bindparam("number"))
)
_ADD = operations.insert()
_ACCEPT = Statement(
    _ADD,
    *("run_id", "generation", "seq", "kind", "state", "body_hash", "accepted", "attempts"),
)
_NOTE_REQUEST = runs.update().where(_THIS_RUN)
_NOTE_END = runs.update().where(_THIS_RUN & runs.c.ending.is_(None))
_CHANGE = operations.update().where(_THIS_ONE)
_DONE = Statement(
    _CHANGE,
    *("run", "life", "number", "state", "settled", "result_hash", "result_size"),
)
_OUTCOME = sa.select(operations.c.kind, operations.c.state, operations.c.error).where(_THIS_ONE)
_HASHES = sa.select(operations.c.body_hash, operations.c.result_hash).where(_THIS_ONE)
_RECORD = sa.select(operations.c.target, operations.c.result_hash, operations.c.error).where(
    _THIS_ONE
)


def _this_run(key: RunKey) -> dict[str, Any]:
    return {"run": key.id, "life": key.generation}


def _this_one(key: RunKey, seq: int) -> dict[str, Any]:
    return {"run": key.id, "life": key.generation, "number": seq}


def _address(key: RunKey, seq: int) -> Address:
    return Address(key.id, key.generation, seq)


def _at(key: RunKey, seq: int) -> sa.ColumnElement[bool]:
    return _of(key) & (operations.c.seq == seq)


def _of(key: RunKey) -> sa.ColumnElement[bool]:
    return (operations.c.run_id == key.id) & (operations.c.generation == key.generation)


def add(
    connection: Connection,
    segments: Segments,
    key: RunKey,
    entry: Entry,
    *,
    now: float,
    body: bytes | None = None,
    failure: Failure | None = None,
    mark_at: int | None = None,
    requested: float | None = None,
) -> None:
    """Journal a number for the first time, or replace a skipped one by its late request.

    `now` is the time of the `ServingClock`; `requested` becomes that of the run's last request.
    """
    if mark_at is not None:  # a skipped number has no body
        connection.execute(operations.delete().where(_at(key, entry.seq)))
    values = {
        "run_id": key.id,
        "generation": key.generation,
        "seq": entry.seq,
        "kind": entry.kind,
        "state": entry.state.value,
        "body_hash": entry.body_hash,
        "accepted": now,
        "attempts": 0,
    }
    if entry.state.settled:
        values |= {
            "error": failure.as_json() if failure else None,
            "mark_at": mark_at,
            "settled": now,
        }
        connection.execute(_ADD, values)
    else:
        _ACCEPT.execute(connection, values)
    if body is not None:
        put(connection, segments, _address(key, entry.seq), "body", body)
    if requested is not None:
        connection.execute(_NOTE_REQUEST, {**_this_run(key), "last_request": requested})


def settle(
    connection: Connection,
    segments: Segments,
    key: RunKey,
    seq: int,
    outcome: Outcome,
    *,
    now: float,
    target: str | None = None,
) -> None:
    """Record an outcome. A load's `target` is the manifest it used, a save's the one it made."""
    if outcome.failure is not None:
        values: dict[str, Any] = {
            "state": State.FAILED.value,
            "error": outcome.failure.as_json(),
            "settled": now,
        }
        connection.execute(_CHANGE, {**_this_one(key, seq), **values})
    else:
        assert outcome.result is not None
        put(connection, segments, _address(key, seq), "result", outcome.result)
        _DONE.execute(
            connection,
            {
                **_this_one(key, seq),
                "state": State.DONE.value,
                "settled": now,
                "result_hash": digest(outcome.result),
                "result_size": len(outcome.result),
            },
        )
    if target is not None:
        set_target(connection, key, seq, target)


def note_end(connection: Connection, key: RunKey, reason: Failure, after: int = -1) -> None:
    """Note why a run is about to end, and after which number, unless that is noted already.

    In the transaction in which the first outcome or answer becomes durable that tells somebody of
    the end, or before: what was told stays true, whenever the server dies.
    """
    ending = {**reason.as_json(), "after": after}
    connection.execute(_NOTE_END, {**_this_run(key), "ending": ending})


def settle_rest(connection: Connection, key: RunKey, failure: Failure, *, now: float) -> None:
    """Fail what has no outcome still: the run has ended."""
    connection.execute(
        operations.update()
        .where(_of(key) & operations.c.settled.is_(None))
        .values(state=State.FAILED.value, error=failure.as_json(), settled=now)
    )


def set_target(connection: Connection, key: RunKey, seq: int, manifest: str) -> None:
    """Fix what a load reads before it reads it, so that a replay reads the same."""
    connection.execute(_CHANGE, {**_this_one(key, seq), "target": manifest})


def count_attempt(connection: Connection, key: RunKey, seq: int) -> int:
    """Count a worker's death while this operation ran; how many there were."""
    connection.execute(
        operations.update().where(_at(key, seq)).values(attempts=operations.c.attempts + 1)
    )
    return connection.scalar(sa.select(operations.c.attempts).where(_at(key, seq))) or 0


def count_begun_again(connection: Connection, key: RunKey, seq: int, by: int) -> int:
    """Count that this operation is begun as the first after a start; how often it was by now."""
    connection.execute(
        operations.update().where(_at(key, seq)).values(begun_again=operations.c.begun_again + by)
    )
    return connection.scalar(sa.select(operations.c.begun_again).where(_at(key, seq))) or 0


@dataclass(frozen=True, slots=True)
class Record:
    """What replay needs of an operation besides its body."""

    target: str | None
    result_hash: str | None
    failure: Failure | None


def record(connection: Connection, key: RunKey, seq: int) -> Record:
    """Read an operation's record, which must be there."""
    row = connection.execute(_RECORD, _this_one(key, seq)).one()
    return Record(row.target, row.result_hash, Failure.from_json(row.error) if row.error else None)


def body(connection: Connection, segments: Segments, key: RunKey, seq: int) -> bytes:
    """Read an operation's body, which must be kept still. Raises JournalDamaged."""
    found = _content(connection, segments, key, seq, "body")
    assert found is not None, f"the body of {key.request_id(seq)} is gone"
    return found


def _content(
    connection: Connection, segments: Segments, key: RunKey, seq: int, part: Part
) -> bytes | None:
    """A body or result, None when it is not kept any more. Raises JournalDamaged.

    It must have the hash that was recorded with it: a database finds no flipped bit.
    """
    found = get(connection, segments, _address(key, seq), part)
    row = connection.execute(_HASHES, _this_one(key, seq)).one_or_none()
    if found is None or row is None:
        return None
    expected = row.body_hash if part == "body" else row.result_hash
    if digest(found, like=expected) != expected:
        raise JournalDamaged(
            "the catalog", f"is damaged: the {part} of request {key.request_id(seq)} has changed"
        )
    return found


def identity(connection: Connection, key: RunKey, seq: int) -> tuple[str, str | None] | None:
    """An operation's kind and the hash of its body; None when its row is gone."""
    row = connection.execute(
        sa.select(operations.c.kind, operations.c.body_hash).where(_at(key, seq))
    ).one_or_none()
    return None if row is None else (row.kind, row.body_hash)


def outcome(connection: Connection, segments: Segments, key: RunKey, seq: int) -> Outcome | None:
    """Read a settled operation's outcome; None while it is unsettled, or when its row is gone.

    Damage to a stored result is a failure to read it; the operation has been done all the same.
    """
    row = connection.execute(_OUTCOME, _this_one(key, seq)).one_or_none()
    if row is None or not State(row.state).settled:
        return None
    if row.error is not None:
        return Outcome(row.kind, failure=Failure.from_json(row.error))
    try:
        result = _content(connection, segments, key, seq, "result")
    except JournalDamaged as error:
        message = f"request {key.request_id(seq)} was done, but its result is lost: {error.message}"
        return Outcome(row.kind, failure=Failure(error.code, message, error.category))
    return expired(key, seq) if result is None else Outcome(row.kind, result=result)


class Content(NamedTuple):
    """A body or result that is kept."""

    key: RunKey
    seq: int
    part: Part


def kept(connection: Connection) -> list[Content]:
    """Every body and result that is kept."""
    rows = connection.execute(
        sa.select(contents.c.run_id, contents.c.generation, contents.c.seq, contents.c.part)
    )
    return [Content(RunKey(run, generation), seq, part) for run, generation, seq, part in rows]


def damage(connection: Connection, segments: Segments, content: Content) -> JournalDamaged | None:
    """What is wrong if it is not what was written; None also when it is not kept any more."""
    try:
        _content(connection, segments, *content)
    except JournalDamaged as error:
        return error
    return None


def expired(key: RunKey, seq: int) -> Outcome:
    """The outcome of an operation whose result was handed out and removed since."""
    return Outcome(
        MISSING,
        failure=Failure(
            "result_expired",
            f"the result of request {key.request_id(seq)} was read and has been removed since",
        ),
    )


@dataclass(frozen=True, slots=True)
class Journaled:
    """An operation as a restarted server finds it."""

    entry: Entry
    mark_at: int | None
    accepted: float
    overtaken: bool = False
    """Failed because the run's end, which was not completed, came before its turn."""


@dataclass(slots=True)
class Resumed:
    """A run as a restarted server finds it."""

    floor: int = -1
    """The position up to which nothing is replayed any more: its bodies are gone. That of the older
    recovery point; -1 while there is none older than the run's beginning."""
    position: int = -1
    """That of the newest recovery point."""
    operations: list[Journaled] = field(default_factory=list)
    """Those that matter after the floor, in order. Before it: unsettled ones, skipped ones, and
    late ones whose mark takes effect there."""


def live_runs(connection: Connection) -> dict[RunKey, Resumed]:
    """Every run that has not ended: in two queries, however many there are."""
    mine = (snapshots.c.run_id == runs.c.id) & (snapshots.c.generation == runs.c.generation)
    begins = sa.exists().where(
        (contents.c.run_id == runs.c.id)
        & (contents.c.generation == runs.c.generation)
        & (contents.c.seq == 0)
        & (contents.c.part == "body")
    )
    oldest = sa.select(sa.func.min(snapshots.c.seq)).where(mine).scalar_subquery()
    newest = sa.select(sa.func.max(snapshots.c.seq)).where(mine).scalar_subquery()
    live = (
        sa.select(
            runs.c.id,
            runs.c.generation,
            sa.case((begins, -1), else_=sa.func.coalesce(oldest, -1)).label("floor"),
            sa.func.coalesce(newest, -1).label("position"),
        )
        .where(runs.c.state == "live")
        .cte("live")
    )
    found = {
        RunKey(row.id, row.generation): Resumed(row.floor, row.position)
        for row in connection.execute(sa.select(live))
    }
    final = [State.DONE.value, State.FAILED.value]
    size = (
        sa.select(contents.c.size)
        .where(
            (contents.c.run_id == operations.c.run_id)
            & (contents.c.generation == operations.c.generation)
            & (contents.c.seq == operations.c.seq)
            & (contents.c.part == "body")
        )
        .scalar_subquery()
    )
    rows = connection.execute(
        sa.select(
            operations.c.run_id,
            operations.c.generation,
            operations.c.seq,
            operations.c.kind,
            operations.c.body_hash,
            operations.c.state,
            operations.c.mark_at,
            operations.c.accepted,
            operations.c.attempts,
            operations.c.begun_again,
            sa.case((operations.c.settled.is_(None), size), else_=0).label("size"),
            sa.case((operations.c.state == State.FAILED.value, operations.c.error)),
        )
        .join(
            live,
            (operations.c.run_id == live.c.id) & (operations.c.generation == live.c.generation),
        )
        .where(
            (operations.c.seq > live.c.floor)
            | operations.c.state.not_in(final)
            | (operations.c.mark_at >= live.c.floor)
        )
        .order_by(operations.c.run_id, operations.c.generation, operations.c.seq)
    )
    for row in rows:
        error = row[-1]
        found[RunKey(row.run_id, row.generation)].operations.append(
            Journaled(
                Entry(
                    row.seq,
                    row.kind,
                    row.body_hash,
                    State(row.state),
                    size=row.size or 0,
                    attempts=row.attempts,
                    begun_again=row.begun_again,
                    late=row.mark_at is not None,
                ),
                row.mark_at,
                row.accepted,
                overtaken=error is not None and error["code"] in ENDS,
            )
        )
    return found


def set_config(
    connection: Connection, key: RunKey, config: Mapping[str, Any], *, parent: str
) -> None:
    """Record what a creating load found in its checkpoint."""
    connection.execute(
        runs.update()
        .where((runs.c.id == key.id) & (runs.c.generation == key.generation))
        .values(base_model=config["base_model"], config=dict(config), parent=parent)
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """What a new recovery point leaves behind."""

    floor: int
    """The older of the two positions that are kept: nothing up to it is replayed any more."""
    obsolete: list[str]
    """Manifests of recovery points that are no longer needed."""


def add_snapshot(
    connection: Connection, key: RunKey, seq: int, manifest: str, *, now: float
) -> Kept:
    """Record a recovery point. The two newest are kept; bodies that only older ones need go."""
    mine = (snapshots.c.run_id == key.id) & (snapshots.c.generation == key.generation)
    before = recovery_points(connection, key)
    connection.execute(snapshots.delete().where(mine & (snapshots.c.seq == seq)))
    connection.execute(
        snapshots.insert().values(
            run_id=key.id, generation=key.generation, seq=seq, manifest=manifest, created=now
        )
    )
    kept = recovery_points(connection, key)[:2]
    floor = kept[-1][0] if len(kept) == 2 else -1
    connection.execute(snapshots.delete().where(mine & (snapshots.c.seq < floor)))
    unsettled = sa.select(operations.c.seq).where(_of(key) & operations.c.settled.is_(None))
    connection.execute(
        contents.delete().where(
            _bodies(key) & (contents.c.seq <= floor) & contents.c.seq.not_in(unsettled)
        )
    )
    used = {manifest for _, manifest in kept}
    return Kept(floor, [manifest for _, manifest in before if manifest not in used])


def recovery_points(connection: Connection, key: RunKey) -> list[tuple[int, str]]:
    """(position, manifest) of the run's snapshots, newest first."""
    rows = connection.execute(
        sa.select(snapshots.c.seq, snapshots.c.manifest)
        .where((snapshots.c.run_id == key.id) & (snapshots.c.generation == key.generation))
        .order_by(snapshots.c.seq.desc())
    )
    return [(row.seq, row.manifest) for row in rows]


def note_refusal(connection: Connection, key: RunKey, refused_to: int) -> None:
    """Note up to which number a refusal explains that one is missing."""
    connection.execute(
        runs.update()
        .where((runs.c.id == key.id) & (runs.c.generation == key.generation))
        .values(refused_to=refused_to)
    )


def note_recovery(
    connection: Connection, key: RunKey, *, replayed: int, diverged: Sequence[int]
) -> None:
    """Count a recovery, and the replayed operations that gave other results."""
    values: dict[str, Any] = {
        "recoveries": runs.c.recoveries + 1,
        "replayed": runs.c.replayed + replayed,
    }
    if diverged:
        values |= {
            "divergences": runs.c.divergences + len(diverged),
            "diverged_at": min(diverged),
        }
    connection.execute(
        runs.update()
        .where((runs.c.id == key.id) & (runs.c.generation == key.generation))
        .values(values)
    )


def newest_snapshots(
    connection: Connection, keys: Sequence[RunKey]
) -> dict[RunKey, tuple[int, float]]:
    """(position, UTC seconds) of the newest snapshot, for each run that has one."""
    rows = connection.execute(
        sa.select(snapshots.c.run_id, snapshots.c.generation, snapshots.c.seq, snapshots.c.created)
        .where(snapshots.c.run_id.in_([key.id for key in keys]))
        .order_by(snapshots.c.seq)
    )
    return {RunKey(r.run_id, r.generation): (r.seq, r.created) for r in rows}


def drop_snapshots(connection: Connection, key: RunKey, seqs: Iterable[int]) -> None:
    """Forget recovery points that cannot be read, so that they displace none that can."""
    mine = (snapshots.c.run_id == key.id) & (snapshots.c.generation == key.generation)
    connection.execute(snapshots.delete().where(mine & snapshots.c.seq.in_(list(seqs))))


def mark_read(connection: Connection, key: RunKey, seqs: Iterable[int], *, now: float) -> None:
    """Note that results were handed out: from then on they are kept for a while only."""
    connection.execute(
        operations.update()
        .where(_of(key) & operations.c.seq.in_(list(seqs)) & operations.c.read.is_(None))
        .values(read=now)
    )


def keep_what_was_read(connection: Connection, *, now: float) -> None:
    """A server starts: what was read is kept for the full time again, as nobody could ask.

    So are numbers that were refused or skipped.
    """
    connection.execute(operations.update().where(operations.c.read.is_not(None)).values(read=now))
    no_body = operations.c.body_hash.is_(None) & operations.c.settled.is_not(None)
    connection.execute(operations.update().where(no_body).values(settled=now))


def close(connection: Connection, key: RunKey, *, now: float) -> None:
    """A run has ended and will not be replayed: its bodies and recovery points go.

    Outcomes stay as long as the session lives, and a while longer, as if they had been handed out
    when it ended.
    """
    mine = (snapshots.c.run_id == key.id) & (snapshots.c.generation == key.generation)
    connection.execute(snapshots.delete().where(mine))
    connection.execute(contents.delete().where(_bodies(key)))
    ended = sa.select(runs.c.session_id).where(
        (runs.c.id == key.id)
        & (runs.c.generation == key.generation)
        & (runs.c.session_id == sessions.c.id)
        & sessions.c.ended.is_not(None)
    )
    connection.execute(
        operations.update()
        .where(_of(key) & operations.c.read.is_(None) & sa.exists(ended))
        .values(read=now)
    )


def close_session(connection: Connection, session_id: str, *, now: float) -> None:
    """A session has ended: nobody is expected to ask for the outcomes of its ended runs."""
    # By the runs, which are few: not by a look at every operation.
    mine = sa.select(runs.c.id, runs.c.generation).where(
        (runs.c.session_id == session_id) & runs.c.state.not_in(("live", "lost"))
    )
    key = sa.tuple_(operations.c.run_id, operations.c.generation)
    connection.execute(
        operations.update().where(key.in_(mine) & operations.c.read.is_(None)).values(read=now)
    )


def _bodies(key: RunKey) -> sa.ColumnElement[bool]:
    return (
        (contents.c.run_id == key.id)
        & (contents.c.generation == key.generation)
        & (contents.c.part == "body")
    )
