"""The parent's side of a worker process: `Engine` over two pipes. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.engine import frames
from holdfast.engine.interface import (
    AdamParams,
    BaseModelInfo,
    Captured,
    EngineError,
    RunConfig,
    StateInfo,
    WorkerDied,
)
from holdfast.store.model import Blob

DEFAULT_TOKEN_BUDGET = 2048
DEFAULT_COPY_BUDGET = 2 << 30

_CLOSE_SECONDS = 30.0
DYING_TAKES = 10.0
"""Seconds after which a process that was killed is taken for dead, and so again until it is gone:
it may hang in the kernel with a disk that does not answer, or have left its pipe to a child."""
WRITING_TAKES = 1800.0
"""Seconds after which a captured state that is still being written is given up: a large one goes to
a slow storage, behind others. A worker that does nothing else is ended before, as one that hangs.
"""
_ENVIRONMENT = {
    "OMP_DYNAMIC": "FALSE",
    # A thread that waits for its next piece of work spins for some 100 µs, as long as the gaps
    # within a step are, and sleeps then. OpenMP's own choice is a hundred times as long: with
    # anything else running, those that spin take the processor from those they wait for, and a
    # step takes several times as long.
    "GOMP_SPINCOUNT": "3000",
    "MKL_DYNAMIC": "FALSE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Memory that was freed stays with the process: a step's tensors are of the same sizes
    # as the last step's, and page faults cost more than their arithmetic.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What must be set before the worker imports torch."""


class WorkerProcess:
    """One worker; an `holdfast.engine.interface.Engine`.

    Any number of calls may be in flight. Each ends with its answer, with EngineError, or, when
    the process ends first for whatever reason, with WorkerDied.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._waiting: dict[tuple[int, str], asyncio.Future[frames.Frame]] = {}
        self._next_id = frames.READY_ID + 1
        self._died = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready = self._expect(frames.READY_ID)
        self._reader = asyncio.create_task(self._read())
        self.last_progress = time.monotonic()
        """Monotonic time of the last sign of life that the computing gave, or the storage that a
        state is read from or written to; or of the first call after an idle time."""

    @classmethod
    async def start(
        cls,
        *,
        name: str,
        source: str,
        store: str | Path,
        tokenizer_id: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        copy_budget: int = DEFAULT_COPY_BUDGET,
    ) -> WorkerProcess:
        """Start a worker for the base model `source` (a directory or a hub id), called `name`.

        Returns before the model is loaded; calls may be made at once, `ready` waits for it.
        `threads` defaults to what suits the model; `copy_budget` bounds the bytes
        of captured states that wait to be written.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "holdfast.engine.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            limit=1 << 20,
        )
        worker = cls(process)
        settings = {
            "name": name,
            "source": source,
            "tokenizer_id": tokenizer_id,
            "store": str(store),
            "device": device,
            "threads": threads,
            "token_budget": token_budget,
            "copy_budget": copy_budget,
        }
        worker._write(frames.encode(settings, 0))
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def in_flight(self) -> int:
        """Calls that wait for their answer."""
        return len(self._waiting)

    @property
    def dead(self) -> bool:
        return self._died.is_set()

    @property
    def resident_memory(self) -> int | None:
        """Bytes of memory that the process occupies; None where the system does not tell."""
        if self.dead:
            return None
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):  # there is no such file system, or just no process
            return None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def wait_died(self) -> int:
        """Wait until the process has ended; its exit status, negative for a signal."""
        await self._died.wait()
        return self._status

    @property
    def _status(self) -> int:
        found = self._process.returncode
        return -signal.SIGKILL if found is None else found  # it was killed, and is not gone yet

    def kill(self) -> None:
        """End the process at once. Idempotent. May be called from any thread."""
        if self._process.returncode is None:
            # Not Process.kill: it may reap the child, and asyncio then misses its status.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._give_up_later)

    def _give_up_later(self) -> None:
        self._loop.call_later(DYING_TAKES, self._stdout.feed_eof)

    async def ready(self) -> BaseModelInfo:
        """Wait for the base model. Raises EngineError when it cannot be loaded, or WorkerDied."""
        header, _ = await asyncio.shield(self._ready)
        return frames.info_from(_result(header))

    async def create(self, run: str, config: RunConfig) -> StateInfo:
        result, _ = await self._call("create", run=run, config=dataclasses.asdict(config))
        return frames.state_from(result)

    async def restore(
        self, run: str, config: RunConfig, files: Mapping[str, Blob], *, optimizer: bool
    ) -> StateInfo:
        result, _ = await self._call(
            "restore",
            run=run,
            config=dataclasses.asdict(config),
            files=frames.blobs_json(files),
            optimizer=optimizer,
        )
        return frames.state_from(result)

    async def forward(self, run: str, seq: int, batch: bytes) -> bytes:
        _, payload = await self._call("forward", batch, run=run, seq=seq)
        return payload

    async def forward_backward(self, run: str, seq: int, batch: bytes) -> bytes:
        _, payload = await self._call("forward_backward", batch, run=run, seq=seq)
        return payload

    async def mark_incomplete(self, run: str, seq: int, message: str) -> None:
        await self._call("mark_incomplete", run=run, seq=seq, message=message)

    async def optim_step(self, run: str, params: AdamParams) -> dict[str, float]:
        result, _ = await self._call("optim_step", run=run, params=dataclasses.asdict(params))
        return dict(result)

    async def capture(self, run: str, *, optimizer: bool = True) -> RunningCapture:
        call = self._next_id
        written = self._expect(call, "written")
        try:
            result, _ = await self._call("capture", run=run, optimizer=optimizer)
        except BaseException:
            self._waiting.pop((call, "written"), None)
            raise
        return RunningCapture(frames.state_from(result), written)

    async def sample(self, adapter: Mapping[str, Blob] | None, request: bytes) -> bytes:
        files = None if adapter is None else frames.blobs_json(adapter)
        _, payload = await self._call("sample", request, adapter=files)
        return payload

    async def drop(self, run: str) -> None:
        await self._call("drop", run=run)

    async def close(self) -> None:
        """End the worker after what it has been sent, saves included. Idempotent."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._call("close")
                await self._process.wait()
        except (TimeoutError, WorkerDied):
            pass
        finally:
            self.kill()
            await self._reader

    def _expect(self, call: int, stage: str = "") -> asyncio.Future[frames.Frame]:
        future: asyncio.Future[frames.Frame] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_seen)
        self._waiting[call, stage] = future
        return future

    async def _call(self, name: str, payload: bytes = b"", /, **args: Any) -> tuple[Any, bytes]:
        # No await before the write: calls are executed in the order in which they are made.
        if self._died.is_set():
            raise self._death()
        if not self._waiting:
            self.last_progress = time.monotonic()
        call = self._next_id
        self._next_id += 1
        answer = self._expect(call)
        try:
            self._write(frames.encode({"id": call, "call": name, "args": args}, len(payload)))
            self._write(payload)
            try:
                await self._stdin.drain()
            except ConnectionError:
                pass  # The reader notices the end of the process, and answers.
            header, body = await answer
        finally:
            self._waiting.pop((call, ""), None)
        return _result(header), body

    def _write(self, data: bytes) -> None:
        # A loop may refuse, by RuntimeError, a pipe whose other end is closed. The reader is
        # about to notice the end of the process, and answers.
        if not self._stdin.is_closing():
            self._stdin.write(data)

    async def _read(self) -> None:
        """Hand answers to those who wait, until the process ends or is taken for dead."""
        try:
            while (frame := await frames.read_async(self._stdout)) is not None:
                self.last_progress = time.monotonic()
                header, _ = frame
                if "id" in header:
                    future = self._waiting.pop((header["id"], header.get("stage", "")), None)
                    if future is not None and not future.done():
                        future.set_result(frame)
        finally:
            self.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DYING_TAKES):
                    await self._process.wait()
            self._died.set()
            if not self._stdin.is_closing():
                self._stdin.transport.abort()  # who waits for room in a pipe need not, either
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._death())
            self._waiting.clear()

    def _death(self) -> WorkerDied:
        return WorkerDied(f"the engine worker ended with status {self._status}")


class RunningCapture:
    """A captured state whose files are being written; a `holdfast.engine.interface.Capture`."""

    def __init__(self, state: StateInfo, written: asyncio.Future[frames.Frame]) -> None:
        self.state = state
        self._written = written
        self._given_up_at = asyncio.get_running_loop().time() + WRITING_TAKES

    async def written(self) -> Captured:
        """Wait until every blob is durable. Raises EngineError (disk full, …) or WorkerDied."""
        left = self._given_up_at - asyncio.get_running_loop().time()
        await asyncio.wait([self._written], timeout=max(0.0, left))
        if not self._written.done():
            raise EngineError(
                "io_failed",
                f"the storage has not taken a copied state within {WRITING_TAKES:.0f} s: look "
                "whether its disk or its server answers, and save again",
                "server",
            )
        header, _ = self._written.result()
        return Captured(self.state, frames.blobs_from(_result(header)))


def _result(header: Mapping[str, Any]) -> Any:
    if "error" in header:
        raise EngineError(**header["error"])
    return header["result"]


def _seen(future: asyncio.Future[frames.Frame]) -> None:
    """An answer that nobody waits for any more is no reason for a message."""
    if not future.cancelled():
        future.exception()
