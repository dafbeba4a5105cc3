"""doctor: what is wrong is found, and what can be repaired is."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from holdfast.catalog import Catalog
from holdfast.catalog.tables import runs
from holdfast.runs import journal
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.index import Checkpoint
from holdfast.runs.journal import Outcome, RunKey
from holdfast.runs.order import Entry
from holdfast.runs.segments import LARGE, Segments
from holdfast.server.data_dir import exclusive
from holdfast.store import Store, open_store
from tests.cli.samples import adapter_files, add_checkpoint, fails, holdfast
from tests.store.samples import OPTIMIZER, WEIGHTS
from tests.support.s3 import S3Server


def examined(*args: str, status: int) -> dict[str, Any]:
    result = holdfast("doctor", "--json", *args)
    assert result.exit_code == status, result.output
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def codes(document: dict[str, Any]) -> list[str]:
    return sorted(problem["code"] for problem in document["problems"])


def listed(data_dir: Path, store: Store, owner: str = "local") -> list[Checkpoint]:
    catalog = Catalog.open_file(data_dir / "catalog.db")
    try:
        return asyncio.run(Checkpoints(store, catalog).page(owner))[0]
    finally:
        catalog.close()


def test_an_empty_store_is_well(data_dir: Path) -> None:
    document = examined(status=0)
    assert document["ok"] is True
    assert document["problems"] == []
    assert "all is well" in holdfast("doctor").stderr


def test_looking_makes_nothing(data_dir: Path, store: Store, tmp_path: Path, s3: S3Server) -> None:
    add_checkpoint(store)
    assert codes(examined(status=1)) == ["not_in_catalog", "run_not_in_catalog"]
    assert [path.name for path in data_dir.iterdir()] == ["store"]
    new, url = tmp_path / "new", f"s3://{s3.bucket()}/x"
    where = f"--data-dir={new}"
    with open_store(url) as shared:
        add_checkpoint(shared)
    found = examined(where, f"--store={url}", status=1)
    assert codes(found) == ["not_in_catalog", "run_not_in_catalog"]
    for repair in ([], ["--repair"]):
        assert "there is no store" in fails("doctor", where, f"--store={url}/none", *repair)
    assert not new.exists()
    examined(where, f"--store={url}", "--repair", status=0)
    assert {path.name for path in new.iterdir()} >= {"catalog.db", "store-url"}


def test_a_catalog_that_was_lost_is_rebuilt(data_dir: Path, store: Store) -> None:
    manifest = add_checkpoint(store, user_metadata={"a": "b"})
    sampler = add_checkpoint(
        store, adapter_files(), name="s", kind="sampler", optimizer=None, run="other:train:1"
    )
    before = examined(status=1)
    assert codes(before) == ["not_in_catalog", "not_in_catalog", *["run_not_in_catalog"] * 2]
    assert "--repair" in holdfast("doctor").stderr
    after = examined("--repair", status=0)
    assert after["repaired"] == {"listed": 2, "removed": 0, "named": []}
    assert examined(status=0)["problems"] == []
    rows = {row.name: row for row in listed(data_dir, store)}
    assert rows.keys() == {manifest.name, sampler.name}
    assert rows["final"].user_metadata == {"a": "b"}
    # What only the training checkpoint has.
    assert rows["final"].own_size == manifest.files["optimizer.safetensors"].size
    assert rows["s"].own_size == 0


def test_rows_without_a_checkpoint_go(data_dir: Path, store: Store) -> None:
    manifest = add_checkpoint(store)
    examined("--repair", status=0)
    assert manifest.key is not None
    store.delete_name(manifest.key)
    assert codes(examined(status=1)) == ["not_in_store"]
    assert examined("--repair", status=0)["repaired"]["removed"] == 1
    assert listed(data_dir, store) == []


def test_the_state_of_a_lost_run_can_be_resumed(data_dir: Path, store: Store) -> None:
    add_checkpoint(store, name=None, seq=5, step=1)
    newest = add_checkpoint(store, name=None, seq=9, step=3)
    before = examined(status=1)
    assert codes(before) == ["run_lost"]
    assert "position 9" in before["problems"][0]["message"]
    after = examined("--repair", status=0)
    path = f"tinker://{newest.run}/weights/auto.9"
    assert after["repaired"]["named"] == [path]
    assert list(store.unnamed()) == []
    (row,) = listed(data_dir, store)
    assert (row.name, row.step) == ("auto.9", 3)
    assert holdfast("checkpoint", "verify", path).exit_code == 0


def test_the_newest_intact_state_of_a_lost_run_is_the_one_that_is_kept(
    data_dir: Path, store: Store
) -> None:
    intact = add_checkpoint(store, {**adapter_files(), OPTIMIZER: b"older"}, name=None, seq=10)
    newest = add_checkpoint(store, {**adapter_files(), OPTIMIZER: b"newer"}, name=None, seq=20)
    blob = data_dir / "store" / "blobs" / newest.files[OPTIMIZER].hash
    blob.write_bytes(b"newe?")
    assert codes(examined(status=1)) == ["corrupt_blob", "run_lost"]
    named = examined("--repair", status=1)["repaired"]["named"]
    assert named == [f"tinker://{intact.run}/weights/auto.10"]
    assert holdfast("checkpoint", "verify", *named).exit_code == 0


def test_a_lost_run_without_an_intact_state_keeps_what_it_has(data_dir: Path, store: Store) -> None:
    damaged = add_checkpoint(store, name=None, seq=10)
    blob = data_dir / "store" / "blobs" / damaged.files[OPTIMIZER].hash
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert codes(examined(status=1)) == ["corrupt_blob"]
    examined("--repair", status=1)
    assert [id for id, _ in store.unnamed()] == [damaged.id]


def test_what_a_lost_run_sampled_from_is_let_go(data_dir: Path, store: Store) -> None:
    add_checkpoint(store, name=None, seq=9)
    add_checkpoint(store, adapter_files(), name=None, kind="sampler", optimizer=None, seq=8)
    examined("--repair", status=0)
    assert list(store.unnamed()) == []


def test_a_state_of_a_lost_run_outlives_a_start_of_the_server(data_dir: Path, store: Store) -> None:
    """A start lists the run by its checkpoint; the state after that is still the only one."""
    add_checkpoint(store, name="saved", seq=5)
    newest = add_checkpoint(store, name=None, seq=9)
    catalog = Catalog.open_file(data_dir / "catalog.db")
    checkpoints = Checkpoints(store, catalog)
    assert asyncio.run(checkpoints.reconcile()) == (1, 0)
    assert asyncio.run(checkpoints.discard_orphans()) == 0
    catalog.close()
    assert codes(examined(status=1)) == ["run_lost"]
    named = examined("--repair", status=0)["repaired"]["named"]
    assert named == [f"tinker://{newest.run}/weights/auto.9"]


def test_a_recovery_point_of_a_known_run_stays(data_dir: Path, store: Store) -> None:
    add_checkpoint(store)
    examined("--repair", status=0)  # which lists the run
    with sqlite3.connect(data_dir / "catalog.db") as connection:
        connection.execute("UPDATE runs SET state = 'unloaded'")
    connection.close()
    kept = add_checkpoint(store, name=None, seq=11)
    assert examined("--repair", status=0)["repaired"] is None
    assert [id for id, _ in store.unnamed()] == [kept.id]


def test_a_live_run_without_its_recovery_point_is_named(data_dir: Path, store: Store) -> None:
    manifest = add_checkpoint(store)
    examined("--repair", status=0)
    with sqlite3.connect(data_dir / "catalog.db") as connection:
        connection.execute("UPDATE runs SET state = 'live'")
        connection.execute(
            "INSERT INTO snapshots VALUES (?, 0, 3, ?, 1.0)", (manifest.run, "0" * 64)
        )
    connection.close()
    document = examined(status=1)
    assert codes(document) == ["recovery_point_missing"]
    assert manifest.run in document["problems"][0]["message"]
    assert examined("--repair", status=1)["repaired"] is None  # nothing can bring it back


@pytest.mark.parametrize("what", ["blob", "manifest", "name"])
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_damage_is_named_and_does_not_keep_the_rest(
    data_dir: Path, store: Store, what: str, how: str
) -> None:
    bad = add_checkpoint(store, name="bad")
    good = add_checkpoint(store, {WEIGHTS: b"x"}, name="good", kind="sampler", optimizer=None)
    root = data_dir / "store"
    path = {
        "blob": root / "blobs" / bad.files[WEIGHTS].hash,
        "manifest": root / "manifests" / bad.id,
        "name": next(p for p in (root / "names").iterdir() if p.name.endswith("bad")),
    }[what]
    data = path.read_bytes()
    path.unlink()
    if how == "flip":
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    document = examined("--repair", status=0 if (what, how) == ("name", "remove") else 1)
    if (what, how) == ("name", "remove"):  # as good as deleted
        assert document["orphans"]["manifests"] == 1
    else:
        expected = f"corrupt_{what}" if how == "flip" else f"missing_{what}"
        assert expected in codes(document)
        shown = " ".join(problem["message"] for problem in document["problems"])
        assert path.name in shown
    assert "good" in [row.name for row in listed(data_dir, store)]
    assert good.key is not None


@pytest.mark.parametrize("part", ["body", "result"])
@pytest.mark.parametrize("size", [100, LARGE + 1])
def test_damage_to_the_journal_is_named(data_dir: Path, store: Store, part: str, size: int) -> None:
    catalog, segments = Catalog.open_file(data_dir / "catalog.db"), Segments(data_dir / "segments")
    key, content = RunKey("session:train:0"), b"x" * size
    entry = Entry(1, "forward_backward", journal.digest(content))
    with catalog._engine.begin() as connection:
        connection.execute(
            runs.insert().values(
                id=key.id,
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
        journal.add(connection, segments, key, entry, now=1.0, body=content)
        journal.settle(connection, segments, key, 1, Outcome(entry.kind, result=content), now=2.0)
        segments.sync()
    catalog.close()
    segments.close()
    assert examined(status=0)["ok"]
    with sqlite3.connect(data_dir / "catalog.db") as database:
        ((segment, start),) = database.execute(
            "SELECT segment, start FROM contents WHERE part = ?", (part,)
        )
        if segment is None:
            changed = b"x" * (size - 1) + b"y"
            database.execute("UPDATE contents SET data = ? WHERE part = ?", (changed, part))
    database.close()
    if segment is not None:
        file = data_dir / "segments" / segment
        data = bytearray(file.read_bytes())
        data[start + 40 + size // 2] ^= 1
        file.write_bytes(data)
    (problem,) = examined("--repair", status=1)["problems"]
    assert problem["code"] == "journal_damaged"
    where = f"the {part} of request {key}:1" if segment is None else str(file)
    assert where in problem["message"]


def test_a_damaged_manifest_is_told_once_with_its_checkpoint(data_dir: Path, store: Store) -> None:
    manifest = add_checkpoint(store)
    path = data_dir / "store" / "manifests" / manifest.id
    path.write_bytes(path.read_bytes()[:-1])
    add_checkpoint(store, name="whole")
    found = [p for p in examined(status=1)["problems"] if p["code"] == "corrupt_manifest"]
    (problem,) = found
    assert f"checkpoint {manifest.key}" in problem["message"]
    assert str(path) in problem["message"]
    assert "delete the checkpoint" in problem["message"]


def test_what_is_left_over_is_counted(data_dir: Path, store: Store) -> None:
    manifest = add_checkpoint(store)
    examined("--repair", status=0)
    store.put_blob([b"nothing refers to this"])
    assert examined(status=0)["orphans"] == {"manifests": 0, "blobs": 1, "bytes": 22}
    assert manifest.key is not None
    store.delete_name(manifest.key)
    examined("--repair", status=0)
    left = examined(status=0)["orphans"]
    assert left == {"manifests": 1, "blobs": 4, "bytes": manifest.size + 22}


def test_no_repair_beside_a_server(data_dir: Path, store: Store) -> None:
    add_checkpoint(store)
    with exclusive(data_dir):
        assert "another server uses" in fails("doctor", "--repair")
        assert holdfast("doctor").exit_code == 1  # looking is allowed
    assert listed(data_dir, store) == []


@pytest.mark.parametrize("command", [["doctor"], ["doctor", "--repair"], ["key", "list"]])
@pytest.mark.parametrize("kept", [4096, 0])
def test_a_damaged_catalog_is_told_with_what_to_do_which_helps(
    data_dir: Path, store: Store, command: list[str], kept: int
) -> None:
    add_checkpoint(store)
    examined("--repair", status=0)
    catalog = data_dir / "catalog.db"
    data = catalog.read_bytes()
    catalog.write_bytes(data[:kept] + b"\xff" * (len(data) - kept))
    message = fails(*command, f"--data-dir={data_dir}")
    assert f"{catalog}: " in message and "it is damaged: move it away" in message
    assert "-wal and -shm" in message and "holdfast doctor --repair" in message
    for file in data_dir.glob("catalog.db*"):
        file.unlink()
    repaired = examined("--repair", status=0)
    assert repaired["repaired"]["listed"] == 1
