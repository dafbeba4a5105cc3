"""Locks of the store that somebody holds and does not give back: a process that is suspended."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.store import LocalStore, StoreError, Unavailable, files
from tests.store.samples import WEIGHTS, key_of, manifest_of

AT_ONCE = 20.0
"""Seconds, on a busy machine."""


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def store(tmp_path: Path, clock: list[float]) -> LocalStore:
    return LocalStore(tmp_path / "store", monotonic=lambda: clock[0])


@contextmanager
def held(root: Path, lock: str, kind: int) -> Iterator[None]:
    """A lock of the store is held as by another process: by a file that is opened for it."""
    with (root / "store" / lock).open() as file:
        fcntl.flock(file, kind)
        yield


def put(store: LocalStore) -> None:
    store.put_blob([b"weights"])


def name(store: LocalStore) -> None:
    manifest = manifest_of({WEIGHTS: store.put_blob([b"weights"])})
    store.publish(manifest)
    store.set_name(key_of(manifest), manifest.id)


def sweep(store: LocalStore) -> None:
    store.sweep()


WAITS = [
    pytest.param("sweep.lock", fcntl.LOCK_EX, put, id="a blob waits for a sweep"),
    pytest.param("names.lock", fcntl.LOCK_EX, name, id="a name waits for a name"),
    pytest.param("sweep.lock", fcntl.LOCK_SH, sweep, id="a sweep waits for a change"),
]


@pytest.mark.parametrize(("lock", "kind", "use"), WAITS)
def test_a_lock_that_is_not_given_back_is_not_waited_for_without_end(
    store: LocalStore,
    tmp_path: Path,
    clock: list[float],
    lock: str,
    kind: int,
    use: Callable[[LocalStore], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "LOCK_WAITS", 0.1)
    put(store)
    store.sweep()
    clock[0] += 3601.0  # so that the next one removes it
    raised: list[StoreError] = []

    def told() -> None:
        try:
            use(store)
        except StoreError as error:
            raised.append(error)

    waiting = threading.Thread(target=told, daemon=True)
    with held(tmp_path, lock, kind):
        waiting.start()
        waiting.join(AT_ONCE)
        assert not waiting.is_alive()
    (error,) = raised
    assert isinstance(error, Unavailable)
    assert f"{lock} has been locked for 0 s by another process" in str(error)
    use(store)  # now that it was given back


@pytest.mark.parametrize(("lock", "kind", "use"), WAITS)
def test_a_lock_that_is_given_back_in_time_was_only_waited_for(
    store: LocalStore,
    tmp_path: Path,
    clock: list[float],
    lock: str,
    kind: int,
    use: Callable[[LocalStore], None],
) -> None:
    put(store)
    store.sweep()
    clock[0] += 3601.0
    waiting = threading.Thread(target=use, args=(store,), daemon=True)
    with held(tmp_path, lock, kind):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(AT_ONCE)
    assert not waiting.is_alive()
