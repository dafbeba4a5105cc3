"""Bodies and results of operations: small ones in the catalog, large ones in segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from holdfast.catalog.statements import Statement
from holdfast.catalog.tables import contents
from holdfast.runs.segments import JournalDamaged, Place, Segments

Part = Literal["body", "result"]


class Address(NamedTuple):
    """An operation."""

    run_id: str
    generation: int
    seq: int


SPARSE = 4
"""A closed segment of which less than one part in so many is still referred to is rewritten."""

_THIS = (
    (contents.c.run_id == sa.bindparam("run"))
    & (contents.c.generation == sa.bindparam("life"))
    & (contents.c.seq == sa.bindparam("number"))
    & (contents.c.part == sa.bindparam("which"))
)
_ADD = Statement(
    contents.insert(),
    *("run_id", "generation", "seq", "part", "size", "segment", "start", "data"),
)
_GET = sa.select(contents.c.data, contents.c.size, contents.c.segment, contents.c.start).where(
    _THIS
)
_REMOVE = contents.delete().where(_THIS)


def put(
    connection: Connection,
    segments: Segments,
    address: Address,
    part: Part,
    data: bytes,
) -> None:
    """Keep a body or result."""
    place = segments.append(data) if segments.takes(len(data)) else None
    _ADD.execute(
        connection,
        {
            "run_id": address.run_id,
            "generation": address.generation,
            "seq": address.seq,
            "part": part,
            "size": len(data),
            "segment": None if place is None else place.segment,
            "start": None if place is None else place.start,
            "data": data if place is None else None,
        },
    )


def get(connection: Connection, segments: Segments, address: Address, part: Part) -> bytes | None:
    """What was put, None when it is not kept any more. Raises JournalDamaged, naming the file."""
    tried = None
    while True:
        row = connection.execute(_GET, _this(address, part)).one_or_none()
        if row is None:
            return None
        if row.segment is None:
            data: bytes = row.data
            return data
        place = Place(row.segment, row.start)
        try:
            return segments.read(place, row.size)
        except FileNotFoundError:
            if place == tried:
                raise JournalDamaged(segments.path(place), "is missing") from None
        # It was moved or removed meanwhile; what is there now takes another look.
        tried = place
        connection.rollback()


def remove(connection: Connection, addresses: Iterable[Address], part: Part) -> None:
    """Keep these no longer."""
    connection.execute(_REMOVE, [_this(address, part) for address in addresses])


def unreferenced(connection: Connection, segments: Segments) -> list[str]:
    """Closed segments that no row refers to, to be removed once this transaction is durable.

    To be called in the catalog's writer, where no record is without its row. Moves the rest out of
    a segment that is nearly unreferenced, so that one long-lived record does not keep it.
    """
    closed = segments.closed()
    if not closed:
        return []
    kept: Counter[str] = Counter()
    found = (contents.c.segment, sa.func.sum(contents.c.size))
    for segment, size in connection.execute(
        sa.select(*found).where(contents.c.segment.is_not(None)).group_by(contents.c.segment)
    ):
        kept[segment] = size
    for name, size in closed.items():
        if 0 < kept[name] * SPARSE < size and _move(connection, segments, name):
            break
    return [name for name in closed if not kept[name]]


def _move(connection: Connection, segments: Segments, name: str) -> bool:
    """Copy what is referred to in a segment to the one that is written now.

    Whether there was anything: what is damaged stays where it is.
    """
    moved = False
    for row in connection.execute(sa.select(contents).where(contents.c.segment == name)).all():
        try:
            data = segments.read(Place(name, row.start), row.size)
        except (JournalDamaged, FileNotFoundError):
            continue  # told to whoever asks for it
        place = segments.append(data)
        connection.execute(
            contents.update().where(_THIS).values(segment=place.segment, start=place.start),
            _this(Address(row.run_id, row.generation, row.seq), row.part),
        )
        moved = True
    return moved


def _this(address: Address, part: Part) -> dict[str, Any]:
    return {
        "run": address.run_id,
        "life": address.generation,
        "number": address.seq,
        "which": part,
    }
