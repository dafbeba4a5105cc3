"""Real processes on one store: saving beside each other and beside sweeps, and killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from holdfast.store import (
    Corrupt,
    LocalStore,
    Manifest,
    NameTaken,
    ObjectStore,
    Store,
    open_store,
)
from tests.store.samples import OPTIMIZER, WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

CONTEXT = multiprocessing.get_context("spawn")
KEY = key_of(manifest_of({}))


def state(seed: int) -> tuple[bytes, bytes]:
    generator = random.Random(seed)
    return generator.randbytes(200_000), generator.randbytes(300_000)


def save(store: Store, seq: int, name: str | None = "final") -> Manifest:
    weights, optimizer = state(seq)
    files = {WEIGHTS: store.put_blob([weights]), OPTIMIZER: store.put_blob([optimizer])}
    manifest = manifest_of(files, seq=seq, name=name)
    store.publish(manifest)
    if name is not None:
        store.set_name(key_of(manifest), manifest.id, replace=True)
    return manifest


def load(store: Store, manifest: Manifest) -> None:
    read = tuple(store.read_blob(manifest.files[n], what=n) for n in (WEIGHTS, OPTIMIZER))
    assert read == state(manifest.seq)


def _overwrite_for_ever(location: str, first: int, pipe: Connection) -> None:
    store = open_store(location)
    for seq in range(first, first + 10_000):
        save(store, seq)
        pipe.send(seq)


def start(location: str, first: int) -> tuple[SpawnProcess, Connection]:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_overwrite_for_ever, args=(location, first, theirs))
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.parametrize(("kind", "attempts"), [("local disk", 8), ("S3 server", 4)])
def test_a_saver_that_is_killed_at_any_time_loses_nothing_acknowledged(
    kind: str, attempts: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """kill -9 during overwrites of one name: it is the last acknowledged one or the next."""
    location = str(tmp_path / "store")
    if kind == "S3 server":
        location = f"s3://{request.getfixturevalue('s3').bucket()}/store"
    store = open_store(location)
    waits = random.Random(3)
    for attempt in range(attempts):
        process, pipe = start(location, attempt * 10_000)
        acknowledged = pipe.recv()
        time.sleep(waits.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                acknowledged = pipe.recv()
        except EOFError:
            pass
        found = store.resolve(KEY)
        assert found is not None
        manifest = store.read_manifest(found)
        assert manifest.seq in (acknowledged, acknowledged + 1)
        load(store, manifest)
    assert store.verify().ok
    store.close()


def test_saves_loads_and_sweeps_of_several_processes_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    clock = [0.0]
    sweeper = LocalStore(root, monotonic=lambda: clock[0])
    savers = [start(str(root), first) for first in (0, 50_000)]
    removed = loads = 0
    try:
        for _, pipe in savers:
            pipe.recv()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            # A minute of server time passes between two sweeps, whatever the clock says.
            clock[0] += 61.0
            report = sweeper.sweep()
            assert report.damaged == ()
            removed += report.blobs
            found = sweeper.resolve(KEY)
            assert found is not None
            with sweeper.pin(found) as manifest:
                sweeper.sweep()
                load(sweeper, manifest)
                loads += 1
        assert all(process.is_alive() for process, _ in savers), "a save failed"
    finally:
        for process, _ in savers:
            process.kill()
            process.join()
    assert removed > 0
    assert loads > 0
    for _ in range(4):
        clock[0] += 3600.0
        sweeper.sweep()
    assert sweeper.verify().ok


@pytest.fixture(params=["local disk", "object storage"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Store]]:
    """Eight processes' ways to a store, for threads that use one each."""
    storage = Storage()
    opened: list[Store] = [
        LocalStore(tmp_path / "store")
        if request.param == "local disk"
        else ObjectStore(MemoryObjects(storage))
        for _ in range(8)
    ]
    yield opened
    for store in opened:
        store.close()


def test_of_many_that_take_a_name_at_once_one_gets_it(stores: list[Store]) -> None:

    def take(i: int) -> str | None:
        manifest = manifest_of({}, seq=i)
        stores[i].publish(manifest)
        try:
            stores[i].set_name(KEY, manifest.id)
        except NameTaken as taken:
            assert stores[i].resolve(KEY) == taken.existing
            return None
        return manifest.id

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            winners = [winner for winner in pool.map(take, range(8)) if winner is not None]
        assert winners == [stores[0].resolve(KEY)]
        stores[0].delete_name(KEY)


def test_changes_of_one_checkpoint_at_once_are_all_kept(stores: list[Store]) -> None:
    save(stores[0], 1)
    changes: list[dict[str, object]] = [
        {"public": True},
        {"expires": 4e9},
        {"user_metadata": {"a": "b"}},
        {"owner": "other"},
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: stores[i].amend(KEY, **changes[i]), range(4)))
    found = stores[0].resolve(KEY)
    assert found is not None
    manifest = stores[0].read_manifest(found)
    for change in changes:
        for field, value in change.items():
            assert getattr(manifest, field) == value


def test_threads_put_the_same_blob_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    with ThreadPoolExecutor(8) as pool:
        blobs = set(pool.map(lambda _: store.put_blob([b"x" * 100_000]), range(32)))
    (blob,) = blobs
    assert store.read_blob(blob, what="x") == b"x" * 100_000
    assert [path.name for path in (tmp_path / "store" / "blobs").iterdir()] == [blob.hash]
    (tmp_path / "store" / "blobs" / blob.hash).write_bytes(b"y")
    with pytest.raises(Corrupt):
        store.read_blob(blob, what="x")
