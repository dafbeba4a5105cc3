"""A proxy in front of an HTTP server that loses responses to requests that were carried out."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = Callable[[str, str], "int | str | None"]
"""What happens to the response of a request (method, path): None: nothing, "drop": the connection
ends instead, a number: that status is answered instead. "refuse" and "forbid" do not carry the
request out: the connection ends at once, or the credentials are said to be unknown."""

_UNKNOWN_KEY = (
    b"<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id you provided does not "
    b"exist in our records.</Message></Error>"
)


class Proxy:
    """`fault` decides on each request; `requests` are those that came."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.fault: Fault = lambda method, path: None
        self.requests: list[str] = []
        self.url = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        proxy.requests.append(f"{self.command} {self.path}")
        fault = proxy.fault(self.command, self.path)
        if fault == "refuse":
            self._hang_up()
            return
        if fault == "forbid":
            self._answer(403, [("Content-Type", "application/xml")], _UNKNOWN_KEY)
            return
        status, headers, data = self._forward(body)
        if fault == "drop":
            self._hang_up()
        elif isinstance(fault, int):
            self._answer(fault, [], b"")
        else:
            self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.target, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value if self.command == "HEAD" else length
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """A proxy in front of the server at this address."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = Proxy(target)
    server.proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
