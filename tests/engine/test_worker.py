"""Inside a worker: frames, and the writing of captured states when the disk fails."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from holdfast.engine import frames, worker
from holdfast.engine.interface import ADAPTER_WEIGHTS, StateInfo
from holdfast.engine.state import HostCopy
from holdfast.engine.worker import Outbox, Writer
from holdfast.store import DiskFull, LocalStore, Store
from holdfast.store.model import Blob
from tests.engine.helpers import run_config


def test_frames_end_cleanly_wherever_the_stream_ends() -> None:
    data = frames.encode({"id": 1, "call": "x", "args": {}}, 3) + b"abc"
    assert frames.read(io.BytesIO(data)) == ({"id": 1, "call": "x", "args": {}}, b"abc")
    for size in range(len(data)):
        assert frames.read(io.BytesIO(data[:size])) is None


class FailingStore(LocalStore):
    """A real store whose first writes find the disk full."""

    failures = 0

    def put_blob(self, parts: Iterable[bytes | memoryview]) -> Blob:
        if self.failures:
            self.failures -= 1
            raise DiskFull("no space left for a blob")
        return super().put_blob(parts)


class Sent(io.RawIOBase):
    """What an outbox has sent."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)

    def headers(self) -> list[dict[str, Any]]:
        stream, found = io.BytesIO(bytes(self.data)), []
        while (frame := frames.read(stream)) is not None:
            found.append(frame[0])
        return found


def copy_of(data: bytes) -> HostCopy:
    return HostCopy(StateInfo(run_config(), 0, 0), {ADAPTER_WEIGHTS: [data]}, len(data))


def write_one(store: Store) -> dict[str, Any]:
    """The answer to one capture."""
    sent = Sent()
    outbox = Outbox(sent)  # type: ignore[arg-type]
    writer = Writer(store, outbox, 100)
    writer.reserve(10)
    writer.write(7, copy_of(b"0123456789"), 10)
    writer.close()
    outbox.close()
    writer.reserve(100)  # The reservation was given back, or this would wait for ever.
    (header,) = sent.headers()
    return header


def test_a_save_waits_for_room_on_the_disk(tmp_path: Path) -> None:
    store = FailingStore(tmp_path / "store")
    store.failures = 2
    header = write_one(store)
    assert (header["id"], header["stage"]) == (7, "written")
    (blob,) = frames.blobs_from(header["result"]).values()
    assert store.read_blob(blob, what="test") == b"0123456789"


def test_a_save_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STORAGE_WAITED_FOR", 0.4)
    store = FailingStore(tmp_path / "store")
    store.failures = 1 << 30
    header = write_one(store)
    assert header["error"] == {
        "code": "disk_full",
        "message": "no space left for a blob",
        "category": "server",
    }
    assert json.dumps(header)


def test_copies_in_flight_stay_within_their_budget(tmp_path: Path) -> None:
    sent = Sent()
    writer = Writer(LocalStore(tmp_path / "store"), Outbox(sent), 100)  # type: ignore[arg-type]
    writer.reserve(1000)  # Larger than the budget: alone.
    passed = threading.Event()

    def second() -> None:
        writer.reserve(60)
        passed.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not passed.wait(0.2)
    writer.release(1000)
    assert passed.wait(5)
    writer.reserve(40)
    begin = time.monotonic()
    threading.Timer(0.2, writer.release, (60,)).start()
    writer.reserve(1)
    assert time.monotonic() - begin >= 0.15
    thread.join()
    writer.close()
