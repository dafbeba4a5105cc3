"""How fast checkpoints are saved durably and loaded verified, beside the bare calls.

Run: python bench/store.py [--dir PATH] [--sizes 1,100,1000] [--pairs 10]

Each pair runs one after the other on the same bytes, in alternating order; the figure is the median
of the per-pair ratios, with the spread from the first to the third quartile. Goals: save at least
0.85 of a plain write and fsync; load at least 0.85 of the slower of a plain read and blake3; a
4 KB state at most 3 times the cost of its fsyncs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from holdfast.store import Blob, LocalStore, LoraConfig, Manifest
from holdfast.store.files import LocalFiles, WriteFile

SAVE_GOAL, LOAD_GOAL, SMALL_GOAL = 0.85, 0.85, 3.0
WRITE_CHUNK = 8 << 20


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_save(path: Path, data: memoryview) -> None:
    """Write the bytes to a new file and fsync it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for start in range(0, len(data), WRITE_CHUNK):
        os.write(fd, data[start : start + WRITE_CHUNK])
    os.fsync(fd)
    os.close(fd)


def plain_load(path: Path, buffer: memoryview) -> None:
    """Read the file into memory that is there already."""
    fd = os.open(path, os.O_RDONLY)
    done = 0
    while done < len(buffer):
        done += os.readv(fd, [buffer[done : done + WRITE_CHUNK]])
    os.close(fd)


def compare_save(root: Path, store: LocalStore, data: memoryview, pairs: int) -> list[float]:
    """Rates of both in GB/s as printed; returns the ratios store / plain."""
    ratios, plain_rates, store_rates = [], [], []
    blob = store.put_blob([data])
    for pair in range(pairs):
        path = root / "plain"

        def plain(path: Path = path) -> None:
            plain_save(path, data)

        def durable() -> None:
            store.put_blob([data])

        times = {}
        for work in (plain, durable) if pair % 2 else (durable, plain):
            # Neither pays for the deletion of an old file or for the other's write-back.
            (root / "store" / "blobs" / blob.hash).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            os.sync()
            times[work] = timed(work)
        ratios.append(times[plain] / times[durable])
        plain_rates.append(len(data) / times[plain] / 1e9)
        store_rates.append(len(data) / times[durable] / 1e9)
    show("save", len(data), store_rates, {"write+fsync": plain_rates}, ratios, SAVE_GOAL)
    store.put_blob([data])
    return ratios


def compare_load(root: Path, store: LocalStore, data: memoryview, pairs: int) -> list[float]:
    """Rates as printed; returns the ratios store / the slower of plain read and blake3."""
    blob = Blob(blake3(data, max_threads=blake3.AUTO).hexdigest(), len(data))
    path = root / "store" / "blobs" / blob.hash
    buffer = memoryview(bytearray(len(data)))
    repeat = max(1, (64 << 20) // len(data))

    def plain() -> None:
        for _ in range(repeat):
            plain_load(path, buffer)

    def hashed() -> None:
        for _ in range(repeat):
            blake3(data, max_threads=blake3.AUTO).digest()

    def verified() -> None:
        for _ in range(repeat):
            store.read_blob_into(blob, buffer, what="bench")

    rates: dict[Callable[[], None], list[float]] = {plain: [], hashed: [], verified: []}
    for work in rates:
        work()
    for pair in range(pairs):
        works = list(rates)
        for work in works if pair % 2 else reversed(works):
            rates[work].append(repeat * len(data) / timed(work) / 1e9)
    ratios = [
        v / min(p, h) for v, p, h in zip(rates[verified], rates[plain], rates[hashed], strict=True)
    ]
    others = {"read": rates[plain], "blake3": rates[hashed]}
    show("load", len(data), rates[verified], others, ratios, LOAD_GOAL)
    return ratios


class TimedFiles(LocalFiles):
    """The real file system, with the time spent in fsync."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0

    def create(self, path: str) -> WriteFile:
        return _TimedWrite(super().create(path), self)

    def sync_dir(self, path: str) -> None:
        self.note(timed(lambda: LocalFiles.sync_dir(self, path)))

    def note(self, seconds: float) -> None:
        self.seconds += seconds
        self.count += 1


class _TimedWrite:
    def __init__(self, file: WriteFile, files: TimedFiles) -> None:
        self._file, self._files = file, files
        self.write, self.close = file.write, file.close

    def sync(self) -> None:
        self._files.note(timed(self._file.sync))


def small_save(root: Path, times: int) -> list[float]:
    """Saves of a 4 KB state under a name; returns total time / time spent in its fsyncs."""
    files = TimedFiles()
    store = LocalStore(root / "small", files=files)
    ratios, totals, syncs = [], [], []
    for i in range(times):
        state = i.to_bytes(8, "little") * 512
        files.seconds, files.count = 0.0, 0
        total = timed(lambda state=state, i=i: save_state(store, state, i))  # type: ignore[misc]
        ratios.append(total / files.seconds)
        totals.append(total * 1e3)
        syncs.append(files.seconds * 1e3)
    middle = statistics.median(ratios)
    print(
        f"4 KB state: {statistics.median(totals):.2f} ms, of which its {files.count} fsyncs "
        f"{statistics.median(syncs):.2f} ms: {middle:.2f} x {spread(ratios)} "
        f"(goal <= {SMALL_GOAL}) {'ok' if middle <= SMALL_GOAL else 'MISSED'}"
    )
    return ratios


def save_state(store: LocalStore, state: bytes, i: int) -> None:
    """What saving a checkpoint of two files comes to."""
    manifest = Manifest(
        kind="training",
        run="bench:0",
        name=f"step-{i}",
        seq=i,
        step=i,
        base_model="bench",
        base_revision="0",
        lora=LoraConfig(8, 0),
        optimizer="adamw",
        owner="bench",
        created=time.time(),
        files={
            "adapter_model.safetensors": store.put_blob([state[:2048]]),
            "optimizer.safetensors": store.put_blob([state[2048:]]),
        },
    )
    key = manifest.key
    assert key is not None
    store.set_name(key, store.publish(manifest))


def spread(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"({low:.2f}-{high:.2f})"


def show(
    what: str,
    size: int,
    rates: list[float],
    others: dict[str, list[float]],
    ratios: list[float],
    goal: float,
) -> None:
    beside = ", ".join(f"{name} {statistics.median(r):.2f}" for name, r in others.items())
    middle = statistics.median(ratios)
    print(
        f"{what} {size / 1e6:6.0f} MB: {statistics.median(rates):.2f} GB/s ({beside}): "
        f"{middle:.2f} x {spread(ratios)} (goal >= {goal}) {'ok' if middle >= goal else 'MISSED'}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Durable save and verified load beside bare I/O")
    parser.add_argument("--dir", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--sizes", default="1,100,1000", help="MB, separated by commas")
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        root = Path(directory)
        store = LocalStore(root / "store")
        missed += statistics.median(small_save(root, 50)) > SMALL_GOAL
        for size in (int(float(text) * 1e6) for text in options.sizes.split(",")):
            data = memoryview(os.urandom(size))
            pairs = max(options.pairs, 20 if size < 10_000_000 else 0)
            missed += statistics.median(compare_save(root, store, data, pairs)) < SAVE_GOAL
            missed += statistics.median(compare_load(root, store, data, pairs)) < LOAD_GOAL
            store = LocalStore(root / "store")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
