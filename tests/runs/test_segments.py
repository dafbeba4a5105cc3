"""Segment files: what is read back, what damage and a full disk leave, what is removed."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, CatalogUnavailable, SyncFailed
from holdfast.catalog.tables import contents as rows
from holdfast.catalog.tables import runs
from holdfast.runs import contents, journal, segments
from holdfast.runs.contents import Address
from holdfast.runs.journal import RunKey
from holdfast.runs.order import Entry
from holdfast.runs.segments import LARGE, JournalDamaged, Place, Segments
from holdfast.server.data_dir import segments_of
from tests.store.crash import Disk, Process

KEY = RunKey("session:train:0")
SMALL, BIG = b"s" * LARGE, b"b" * (LARGE + 1)


def add_run(connection: sa.Connection) -> None:
    connection.execute(
        runs.insert().values(
            id=KEY.id,
            generation=0,
            session_id="session",
            owner="local",
            created=1.0,
            last_request=1.0,
            state="live",
            body_hash="",
            corrupted=False,
        )
    )


def add(connection: sa.Connection, segments: Segments, seq: int, body: bytes) -> None:
    entry = Entry(seq, "forward_backward", journal.digest(body))
    journal.add(connection, segments, KEY, entry, now=1.0, body=body)


def test_records_are_read_back_by_another_process(tmp_path: Path) -> None:
    written = Segments(tmp_path / "segments")
    places = {data: written.append(data) for data in (b"", b"first", b"second" * 1000)}
    written.sync()
    written.append(b"torn by a crash, and never referred to")
    later = Segments(tmp_path / "segments")
    for data, place in places.items():
        assert later.read(place, len(data)) == data
    place = later.append(b"third")
    assert place.segment not in {p.segment for p in places.values()}
    assert sorted(Segments(tmp_path / "segments").closed()) == sorted(
        {place.segment, places[b""].segment}
    )
    written.close()
    later.close()


def test_every_flipped_byte_is_told_with_the_file(tmp_path: Path) -> None:
    written = Segments(tmp_path / "segments")
    place = written.append(b"content")
    written.sync()
    written.close()
    path = tmp_path / "segments" / place.segment
    honest = path.read_bytes()
    unused = range(12, 16)
    for at in range(len(honest)):
        path.write_bytes(honest[:at] + bytes([honest[at] ^ 1]) + honest[at + 1 :])
        if at in unused:
            assert written.read(place, 7) == b"content"
            continue
        with pytest.raises(JournalDamaged, match=str(path)):
            written.read(place, 7)
    for length in range(len(honest)):
        path.write_bytes(honest[:length])
        with pytest.raises(JournalDamaged, match=str(path)):
            written.read(place, 7)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        written.read(place, 7)


def test_a_segment_of_a_newer_version_is_not_guessed_at(tmp_path: Path) -> None:
    written = Segments(tmp_path / "segments")
    place = written.append(b"content")
    written.sync()
    written.close()
    path = tmp_path / "segments" / place.segment
    honest = path.read_bytes()
    path.write_bytes(honest[:8] + b"\2" + honest[9:])
    with pytest.raises(JournalDamaged, match=r"version 2; this Holdfast reads 1"):
        written.read(place, 7)


def test_large_bodies_are_in_segments_and_small_ones_in_the_database(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    files = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection)
        add(connection, files, 0, SMALL)
        add(connection, files, 1, BIG)
        files.sync()
        found = connection.execute(sa.select(rows.c.data, rows.c.size).order_by(rows.c.seq)).all()
        assert [tuple(row) for row in found] == [(SMALL, LARGE), (None, LARGE + 1)]
        assert [journal.body(connection, files, KEY, seq) for seq in (0, 1)] == [SMALL, BIG]
    files.close()
    catalog.close()


@pytest.mark.parametrize("open_catalog", ["PostgreSQL"], indirect=True)
@pytest.mark.parametrize("size", [0, 1, LARGE + 1, 3 << 20])
def test_all_is_in_a_database_that_is_elsewhere(
    catalog: Catalog, tmp_path: Path, size: int
) -> None:
    """Whatever its bytes are: the next server may be on another machine."""
    files = segments_of(tmp_path, catalog)
    content = random.Random(size).randbytes(size)
    with catalog._engine.begin() as connection:
        add_run(connection)
        add(connection, files, 1 << 40, content)
        files.sync()
    with catalog._engine.begin() as connection:
        assert journal.body(connection, files, KEY, 1 << 40) == content
        assert connection.scalars(sa.select(rows.c.segment)).all() == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_segment_is_told_with_its_file(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    files = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection)
        add(connection, files, 0, BIG)
        files.sync()
    files.close()
    (path,) = (tmp_path / "segments").iterdir()
    path.unlink()
    with (
        catalog._engine.connect() as connection,
        pytest.raises(JournalDamaged, match=f"{path} is missing"),
    ):
        journal.body(connection, files, KEY, 0)
    catalog.close()


@pytest.mark.anyio
async def test_a_full_disk_refuses_a_large_body_and_nothing_else(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    process = Process(Disk())
    files = Segments("/segments", process)
    catalog.before_commit(files.sync)
    await catalog.write(add_run)
    await catalog.write(lambda c: add(c, files, 0, BIG))
    process.full = True
    answers = await asyncio.gather(
        catalog.write(lambda c: add(c, files, 1, BIG)),
        catalog.write(lambda c: add(c, files, 2, SMALL)),
        return_exceptions=True,
    )
    assert isinstance(answers[0], CatalogUnavailable) and answers[1] is None
    process.full = False
    await catalog.write(lambda c: add(c, files, 3, BIG))
    with catalog._engine.connect() as connection:
        found = connection.scalars(sa.select(rows.c.seq).order_by(rows.c.seq)).all()
        assert found == [0, 2, 3]
        assert [len(journal.body(connection, files, KEY, n)) for n in found] == [
            LARGE + 1,
            LARGE,
            LARGE + 1,
        ]
    catalog.close()


@pytest.mark.parametrize("nth", [0, 1])
def test_a_failed_sync_is_no_ordinary_failure(nth: int) -> None:
    """Of the file, and of its directory."""
    process = Process(Disk())
    files = Segments("/segments", process)
    files.append(b"first")
    process.fail = {process.calls + nth: errno.EIO}
    with pytest.raises(SyncFailed, match=r"segments/.*: Input/output error"):
        files.sync()
    assert process.log[-1].split()[0] == ("sync", "sync_dir")[nth]


def remove_unreferenced(catalog: Catalog, files: Segments) -> list[str]:
    with catalog._engine.begin() as connection:
        gone = contents.unreferenced(connection, files)
        files.sync()
    files.remove(gone)
    return gone


def test_segments_go_when_nothing_refers_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "FULL", 3 * LARGE)
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    files = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection)
        for seq in range(8):  # three to a segment
            add(connection, files, seq, BIG + b"%d" % seq)
        files.sync()
    assert remove_unreferenced(catalog, files) == []
    with catalog._engine.begin() as connection:
        contents.remove(connection, [Address(KEY.id, 0, seq) for seq in (0, 1, 2, 3)], "body")
    (gone,) = remove_unreferenced(catalog, files)
    assert not (tmp_path / "segments" / gone).exists()
    assert len(files.closed()) == 1  # and the one that is written
    with catalog._engine.connect() as connection:
        assert all(journal.body(connection, files, KEY, n) == BIG + b"%d" % n for n in range(4, 8))
    files.close()
    catalog.close()


def nearly_unreferenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> tuple[Catalog, Segments]:
    """So many closed segments of ten bodies each, of which the last one alone is still kept."""
    monkeypatch.setattr(segments, "FULL", 10 * LARGE)
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    files = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection)
        for seq in range(10 * count):
            add(connection, files, seq, BIG + b"%d" % seq)
        files.sync()
        ends = [seq for seq in range(10 * count) if seq % 10 != 9]
        contents.remove(connection, [Address(KEY.id, 0, seq) for seq in ends], "body")
    return catalog, files


def test_what_is_left_in_a_segment_does_not_keep_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, files = nearly_unreferenced(tmp_path, monkeypatch, 1)
    (old,) = files.closed()
    assert remove_unreferenced(catalog, files) == []  # moved, but not yet durably
    assert remove_unreferenced(catalog, files) == [old]
    with catalog._engine.connect() as connection:
        assert journal.body(connection, files, KEY, 9) == BIG + b"9"
    files.close()
    catalog.close()


def test_what_is_damaged_in_one_segment_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, files = nearly_unreferenced(tmp_path, monkeypatch, 2)
    first, second = files.closed()  # in the order in which they are looked at
    for row in catalog.read_now(lambda c: c.execute(sa.select(rows)).all()):
        if row.segment == first:
            path = tmp_path / "segments" / first
            honest = path.read_bytes()
            path.write_bytes(honest[: row.start + 40] + b"?" + honest[row.start + 41 :])
    assert remove_unreferenced(catalog, files) == []
    assert remove_unreferenced(catalog, files) == [second]
    files.close()
    catalog.close()


def test_a_reader_finds_what_was_moved_while_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    files = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection)
        add(connection, files, 0, BIG)
        files.sync()
    honest = Segments.read

    def read(self: Segments, place: Place, size: int) -> bytes:
        monkeypatch.setattr(Segments, "read", honest)
        files._give_up()
        with catalog._engine.begin() as connection:
            contents._move(connection, files, place.segment)
            files.sync()
        files.remove([place.segment])
        return honest(self, place, size)

    monkeypatch.setattr(Segments, "read", read)
    with catalog._engine.connect() as connection:
        assert journal.body(connection, files, KEY, 0) == BIG
    files.close()
    catalog.close()
