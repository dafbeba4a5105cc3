"""The network passes everything on, and loses the answers to submissions that were carried out."""

from __future__ import annotations

import http.client
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.faults.network import Network
from tests.support.server import ServerProcess


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, and takes note of it."""

    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def echoing(directory: Path) -> Iterator[tuple[Network, list[str]]]:
    """A network before a server, and the paths that the server was asked for."""
    server = ServerProcess(directory)
    Echo.seen = []
    with ThreadingHTTPServer(("127.0.0.1", server.port), Echo) as echo:
        thread = threading.Thread(target=echo.serve_forever, args=(0.02,))
        thread.start()
        try:
            with Network(server) as network:
                yield network, Echo.seen
        finally:
            echo.shutdown()
            thread.join()


def post(network: Network, path: str, body: bytes = b"x") -> bytes:
    request = urllib.request.Request(f"{network.url}/api/v1{path}", body, method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
        assert isinstance(content, bytes)
        return content


def test_everything_passes(tmp_path: Path) -> None:
    with echoing(tmp_path) as (network, _):
        large = bytes(range(256)) * 20_000
        assert post(network, "/forward_backward", large) == large


def test_answers_to_submissions_are_lost(tmp_path: Path) -> None:
    with echoing(tmp_path) as (network, seen):
        network.lose(2)
        assert post(network, "/retrieve_future") == b"x"
        for _ in range(2):
            with pytest.raises(http.client.RemoteDisconnected):
                post(network, "/optim_step")
        assert post(network, "/optim_step") == b"x"
        assert network.lost == 2
        assert seen.count("/api/v1/optim_step") == 3


def test_without_a_server_connections_end(tmp_path: Path) -> None:
    with Network(ServerProcess(tmp_path)) as network, pytest.raises(OSError):
        post(network, "/optim_step")
