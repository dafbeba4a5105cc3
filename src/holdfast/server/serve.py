"""Running a server in this process: its data directory, its socket, its log."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import queue
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

import structlog
import uvicorn
from pydantic.warnings import UnsupportedFieldAttributeWarning

from holdfast.catalog import Catalog, CatalogInUse, CatalogUnavailable
from holdfast.engine.interface import Worker
from holdfast.engine.process import WorkerProcess
from holdfast.runs.doctor import belong_together
from holdfast.runs.engines import StartEngine
from holdfast.runs.service import Runs
from holdfast.server.app import create_app
from holdfast.server.auth import Keys
from holdfast.server.data_dir import (
    CannotUse,
    exclusive,
    location,
    open_catalog,
    remember,
)
from holdfast.server.devices import why_not
from holdfast.server.gathering import GatheringProtocol
from holdfast.server.settings import Settings
from holdfast.store import Store, StoreError, open_store

_HURRIED = 1.0
"""Seconds that a stop takes at most after a second signal."""
_FOR_RUNS = 0.6
"""The part of a stop in which the runs stop ..."""
_FOR_ANSWERS = 0.25
"""... and that for the requests that are under way then."""

_log = structlog.get_logger("holdfast.server")


class CannotServe(CannotUse):
    """The server cannot start with these settings; the message says what to change."""


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises CannotUse before anything was served."""
    _configure_log()
    why = why_not(settings.device)
    if why is not None:
        raise CannotServe(
            f"--device {settings.device} cannot be used: {why}; 'auto' takes what there is"
        )
    with (
        exclusive(settings.data_dir),
        _socket(settings) as listening,
        closing(open_catalog(settings.data_dir, settings.catalog)) as catalog,
    ):
        where = location(settings.data_dir, settings.store)
        is_new = isinstance(where, Path) and not where.exists()
        try:
            store = open_store(where)
        except StoreError as error:
            raise CannotServe(str(error)) from error
        with store:
            try:
                _log.info("started", epoch=_claim(settings, catalog, store, where))
            except CannotServe:
                if is_new:  # or the directory would be taken for one with checkpoints in it
                    shutil.rmtree(where)
                raise
            remember(settings.data_dir, settings.store, catalog)
            app = create_app(settings, catalog, store, _starter(settings, where))
            port = listening.getsockname()[1]
            _announce(settings, catalog, where, port)
            config = uvicorn.Config(
                app,
                http=GatheringProtocol,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, int(_FOR_ANSWERS * settings.stop_within)),
                # Idle connections of clients that poll every half minute stay open.
                timeout_keep_alive=75,
                lifespan="on",
            )
            gc.freeze()  # modules stay: neither collections nor the end need to look at them
            _Server(config, app.state.context.runs, settings.stop_within).run(sockets=[listening])


def _claim(settings: Settings, catalog: Catalog, store: Store, where: str | Path) -> int:
    """Take the catalog, if it is one to serve with; the epoch that this server begins."""
    try:
        if not settings.loopback and not Keys(catalog).required:
            raise CannotServe(
                f"{settings.host} can be reached from other machines, and there is no API key"
                " yet: make one with `holdfast key create`, or listen on 127.0.0.1"
            )
        # A catalog in the data directory is noted there together with its store.
        if not catalog.is_local and not belong_together(store, catalog):
            raise CannotServe(
                f"{where} has none of the checkpoints that the catalog {catalog.address} tells"
                " of: name the --store, or the --data-dir, that it is used with"
            )
        return asyncio.run(catalog.claim(f"process {os.getpid()} on {socket.gethostname()}"))
    except (CatalogUnavailable, CatalogInUse) as error:
        raise CannotServe(str(error)) from error


class _Server(uvicorn.Server):
    """Answers on until the runs have stopped; only then it closes its socket and connections."""

    def __init__(self, config: uvicorn.Config, runs: Runs, stop_within: float) -> None:
        super().__init__(config)
        self._runs = runs
        self._stop_within = stop_within
        self._end = _End(runs, stop_within)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def main_loop(self) -> None:
        serving = asyncio.create_task(super().main_loop())
        await self._runs.stopping.begun.wait()
        try:
            await self._runs.stop(_FOR_RUNS * self._stop_within)
        except Exception:  # the next start recovers what was not kept
            _log.exception("the runs did not stop in good order")
        serving.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the stop. Uvicorn's own answer would be to close the socket at once."""
        self._end.signals.put(sig)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._runs.stopping.begun.set)


class _End:
    """Ends the process when its stop takes too long, whatever holds that up.

    Nothing is lost: what is not recorded by then is recovered as after a crash.
    """

    def __init__(self, runs: Runs, within: float) -> None:
        self._runs = runs
        self._within = within
        # What a signal's handler may do at any moment is to put something here.
        self.signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="end", daemon=True).start()

    def _run(self) -> None:
        self.signals.get()
        at = time.monotonic() + self._within
        with suppress(queue.Empty):
            while True:
                self.signals.get(timeout=max(0.0, at - time.monotonic()))
                at = min(at, time.monotonic() + _HURRIED)
        _log.warning("stopped before everything was kept; the next start recovers the rest")
        self._runs.engines.kill()
        os._exit(0)


def _starter(settings: Settings, store: str | Path) -> StartEngine:
    async def start(name: str) -> Worker:
        source = settings.models[name]
        return await WorkerProcess.start(
            name=name,
            source=source.path,
            store=store,
            tokenizer_id=source.tokenizer,
            device=settings.device,
            threads=settings.threads or None,
            token_budget=settings.token_budget,
        )

    return start


@contextmanager
def _socket(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            wrong_host = isinstance(error, socket.gaierror) or (
                isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL
            )
            remedy = (
                "--host is an address of this machine"
                if wrong_host
                else "choose another --port (0 takes any free one)"
            )
            raise CannotServe(
                f"cannot listen on {settings.host}:{settings.port}: {error}; {remedy}"
            ) from error
        listening.listen(2048)
        yield listening


def _announce(settings: Settings, catalog: Catalog, store: str | Path, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    key = "tml-local" if settings.loopback else "one that `holdfast key create` printed"
    with suppress(OSError):  # as of the log
        print(
            f"Holdfast serves {', '.join(settings.models)} on http://{host}:{port}\n"
            f"  data  {settings.data_dir}\n"
            + ("" if catalog.is_local else f"  runs  {catalog.address}\n")
            + (f"  store {store}\n" if isinstance(store, str) else "")
            + f"  use   TINKER_BASE_URL=http://{host}:{port} TINKER_API_KEY={key}",
            flush=True,
        )


class _Forgiving:
    """The log's file. When its disk is full lines are late or lost, and nothing else fails."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


def _configure_log() -> None:
    # FastAPI silences this warning of its own making where models are built at once; ours are
    # built when they are first used.
    warnings.filterwarnings("ignore", category=UnsupportedFieldAttributeWarning)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if sys.stderr.isatty()
            else structlog.processors.LogfmtRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Forgiving(sys.stderr))),
        cache_logger_on_first_use=True,
    )
