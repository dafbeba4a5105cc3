"""A worker process: one base model, one compute thread, and threads for its pipes and the store.

Run as `python -m holdfast.engine.worker` by `holdfast.engine.process`, which sets the environment
that has to be there before torch is imported. Ends when the parent's pipe closes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from holdfast.engine import frames
from holdfast.engine.interface import AdamParams, EngineError, StateLost
from holdfast.store import Corrupt, Store, StoreError, Unavailable, open_store
from holdfast.store.model import Blob
from holdfast.store.retries import STORAGE_WAITED_FOR, pauses

if TYPE_CHECKING:
    from holdfast.engine.core import Core
    from holdfast.engine.state import HostCopy

_PROGRESS_SECONDS = 0.5
_WRITERS = 2
_WRITER_NICENESS = 15

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a worker is started with; sent as the first frame."""

    name: str
    source: str
    tokenizer_id: str | None
    store: str
    device: str
    threads: int | None
    token_budget: int
    copy_budget: int
    """Bytes of captured states in host memory that are not written yet."""


class Outbox:
    """Sends frames from any thread, in order, without making the sender wait for the reader."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frames: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._frames.put((frames.encode(header, len(payload)), payload))

    def close(self) -> None:
        """Send what is queued, and end."""
        self._frames.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                self._stream.write(frame[0])
                self._stream.write(frame[1])
                self._stream.flush()
            except OSError:
                os._exit(1)  # The parent is gone.


class Writer:
    """Writes captured states to the store beside the training, within a memory budget."""

    def __init__(self, store: Store, outbox: Outbox, budget: int) -> None:
        self._store = store
        self._outbox = outbox
        self._budget = budget
        self._held = 0
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(_WRITERS, "writer", initializer=_be_nice)

    def reserve(self, size: int) -> None:
        """Wait until a copy of `size` bytes fits beside those that are still being written."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._budget)
            self._held += size

    def release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def write(self, call: int, copy: HostCopy, reserved: int) -> None:
        """Write a copy's files as blobs and tell the parent; gives the reservation back."""
        self._pool.submit(self._write, call, copy, reserved)

    def close(self) -> None:
        self._pool.shutdown()

    def _write(self, call: int, copy: HostCopy, reserved: int) -> None:
        header: dict[str, Any] = {"id": call, "stage": "written"}
        try:
            blobs = {name: self._put(parts) for name, parts in copy.files.items()}
            header["result"] = frames.blobs_json(blobs)
        except EngineError as error:
            header["error"] = frames.error_json(error)
        except Exception as error:
            log.exception("writing a captured state failed")
            header["error"] = frames.error_json(_internal("capture", error))
        finally:
            self.release(reserved)
        self._outbox.send(header)

    def _put(self, parts: list[bytes | memoryview]) -> Blob:
        again = pauses(within=STORAGE_WAITED_FOR)
        while True:
            try:
                return self._store.put_blob(parts)
            except Unavailable as error:
                pause = next(again, None)
                if pause is None:
                    raise store_error(error) from error
                log.warning("a save is tried again: %s", error)
                time.sleep(pause)
            except StoreError as error:
                raise store_error(error) from error


class Worker:
    """Answers the parent's calls, one at a time, on the thread that runs it."""

    def __init__(self, core: Core, writer: Writer, outbox: Outbox) -> None:
        self._core = core
        self._writer = writer
        self._outbox = outbox
        self._calls: dict[str, Callable[[dict[str, Any], bytes], Any]] = {
            "create": self._create,
            "restore": self._restore,
            "forward": lambda a, body: core.forward(a["run"], body),
            "forward_backward": lambda a, body: core.forward_backward(a["run"], a["seq"], body),
            "mark_incomplete": lambda a, _: core.mark_incomplete(a["run"], a["seq"], a["message"]),
            "optim_step": lambda a, _: core.optim_step(a["run"], AdamParams(**a["params"])),
            "sample": self._sample,
            "drop": lambda a, _: core.drop(a["run"]),
        }

    def answer(self, header: dict[str, Any], body: bytes) -> None:
        """Execute one call and send its answer. Raises nothing but StateLost, unanswered."""
        call, args = header["id"], header["args"]
        try:
            if header["call"] == "capture":
                self._capture(call, args)
                return
            result = self._calls[header["call"]](args, body)
        except EngineError as error:
            self._outbox.send({"id": call, "error": frames.error_json(error)})
        except StateLost:
            raise
        except Exception as error:
            log.exception("%s failed", header["call"])
            error = _internal(header["call"], error)
            self._outbox.send({"id": call, "error": frames.error_json(error)})
        else:
            if isinstance(result, bytes):
                self._outbox.send({"id": call, "result": None}, result)
            else:
                self._outbox.send({"id": call, "result": result})

    def _create(self, args: dict[str, Any], _: bytes) -> dict[str, Any]:
        config = frames.config_from(args["config"])
        return dataclasses.asdict(self._core.create(args["run"], config))

    def _restore(self, args: dict[str, Any], _: bytes) -> dict[str, Any]:
        state = self._core.restore(
            args["run"],
            frames.config_from(args["config"]),
            frames.blobs_from(args["files"]),
            optimizer=args["optimizer"],
        )
        return dataclasses.asdict(state)

    def _sample(self, args: dict[str, Any], body: bytes) -> bytes:
        adapter = args["adapter"]
        return self._core.sample(None if adapter is None else frames.blobs_from(adapter), body)

    def _capture(self, call: int, args: dict[str, Any]) -> None:
        size = self._core.state_size(args["run"])
        self._writer.reserve(size)
        try:
            copy = self._core.copy_state(args["run"], optimizer=args["optimizer"])
        except BaseException:
            self._writer.release(size)
            raise
        self._outbox.send({"id": call, "result": dataclasses.asdict(copy.info)})
        self._writer.write(call, copy, size)


def store_error(error: StoreError) -> EngineError:
    """The store's refusal or failure as an engine's error, with the same code and message."""
    server = isinstance(error, Corrupt | Unavailable)
    return EngineError(error.code, str(error), "server" if server else "user")


def _internal(what: str, error: Exception) -> EngineError:
    return EngineError("internal", f"The {what} failed inside the engine: {error}", "server")


def _be_nice() -> None:
    """Let the compute thread go first where both want a processor."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)


def _load(settings: Settings, store: Store, progress: Callable[[], None]) -> Core:
    import torch
    import transformers

    from holdfast.engine.base import load_base
    from holdfast.engine.core import Core

    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def read_blob(blob: Blob, what: str) -> bytes:
        try:
            return store.read_blob(blob, what=what)
        except StoreError as error:
            raise store_error(error) from error

    base = load_base(
        settings.name,
        settings.source,
        tokenizer_id=settings.tokenizer_id,
        device=settings.device,
        threads=settings.threads,
        token_budget=settings.token_budget,
    )
    return Core(base, read_blob, settings.token_budget, progress)


def _serve(settings: Settings, calls: queue.SimpleQueue[frames.Frame], outbox: Outbox) -> None:
    """Load the base model, then answer calls until one asks to end."""
    last = time.monotonic()

    def progress() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS:
            last = now
            outbox.send({"progress": True})

    try:
        store = open_store(settings.store)
        store.while_moving(progress)
        core = _load(settings, store, progress)
    except Exception as error:
        if isinstance(error, StoreError):
            error = store_error(error)
        elif not isinstance(error, EngineError):
            log.exception("loading the base model failed")
            error = EngineError(
                "model_not_loadable",
                f"The base model {settings.name!r} cannot be loaded: {error}",
                "server",
            )
        outbox.send({"id": frames.READY_ID, "error": frames.error_json(error)})
        return
    outbox.send({"id": frames.READY_ID, "result": dataclasses.asdict(core.base.info)})
    writer = Writer(store, outbox, settings.copy_budget)
    worker = Worker(core, writer, outbox)
    while True:
        header, body = calls.get()
        if header["call"] == "close":
            break
        worker.answer(header, body)
    writer.close()
    store.close()
    outbox.send({"id": header["id"], "result": None})


def _receive(stream: BinaryIO, calls: queue.SimpleQueue[frames.Frame]) -> None:
    while (frame := frames.read(stream)) is not None:
        calls.put(frame)
    os._exit(0)  # The parent has closed its end, or has died.


def main() -> None:
    """Talk frames over stdin and stdout; whatever else is printed goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act upon.
    incoming = os.fdopen(os.dup(0), "rb", buffering=1 << 20)
    outgoing = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    calls: queue.SimpleQueue[frames.Frame] = queue.SimpleQueue()
    outbox = Outbox(outgoing)
    first = frames.read(incoming)
    if first is None:
        return
    threading.Thread(target=_receive, args=(incoming, calls), name="inbox", daemon=True).start()
    status = 0
    try:
        _serve(Settings(**first[0]), calls, outbox)
    except StateLost:
        log.exception("the worker ends, for another one to bring its runs back")
        status = 1
    outbox.close()
    os._exit(status)


if __name__ == "__main__":
    main()
