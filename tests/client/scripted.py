"""A server on a real socket that keeps the protocol's rules, except where a test tells it not to.

It trains nothing: an operation is applied by noting its number and kind. So a test sees exactly
what a client sent, in which order, and whether anything was applied twice.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from holdfast.protocol.batches import BatchRequest, BatchResult
from holdfast.protocol.tensors import Tensor

PREFIX = "/api/v1/"
TRAINING = (
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
)


@dataclass
class Request:
    method: str
    path: str
    """Without the prefix, with the query."""
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Reply:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    @classmethod
    def json(cls, body: object, status: int = 200, **headers: str) -> Reply:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(body).encode(), {"content-type": "application/json", **extra})


class Reset(Exception):
    """Close the connection with a TCP reset."""


@dataclass
class Fault:
    """What happens to one request instead of, before or after the right thing."""

    reply: Reply | None = None
    """Answered without applying anything."""
    apply: bool = True
    delay: float = 0.0
    """Seconds between applying and answering."""
    cut: str = ""
    """"reset": nothing is answered; "body": the body breaks off; "json": it ends early, whole."""


REFUSED_CONNECTION_RESET = Fault(apply=False, cut="reset")
LOST_ANSWER = Fault(cut="reset")
BROKEN_BODY = Fault(cut="body")
SHORT_JSON = Fault(cut="json")


def status(code: int, body: object | None = None, **headers: str) -> Fault:
    return Fault(
        reply=Reply.json({"detail": f"HTTP {code}"} if body is None else body, code, **headers)
    )


@dataclass
class Model:
    alive: bool = True
    applied: list[tuple[int, str]] = field(default_factory=list)
    """(seq_id, kind), in the order in which they were applied."""
    ready_at: float = 0.0


class ScriptedServer:
    """Start it as a context manager; `faults[path]` are used up one by one."""

    def __init__(self, *, op_seconds: float = 0.0, hold: float = 2.0, config: Any = None) -> None:
        self.op_seconds = op_seconds
        self.hold = hold
        self.config = {"create_by_load": True} if config is None else config
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.results: dict[str, Callable[[Request, int], Reply]] = {}
        """Other results than the usual ones, by path."""
        self.requests: list[Request] = []
        self.models: dict[str, Model] = {}
        self.connections = 0
        self.peak_connections = 0
        self._operations: dict[tuple[str, int], str] = {}
        self._futures: dict[str, tuple[float, Callable[[], Reply]]] = {}
        self._sessions = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Listen, on the same port as before."""

        async def listen() -> None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, backlog=512
            )
            self.port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(5)

    def down(self) -> None:
        """Refuse connections and reset those that are open."""

        async def stop() -> None:
            assert self._server is not None
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(5)

    def sent(self, path: str) -> list[Request]:
        """The requests of a path, in the order of their arrival."""
        return [request for request in self.requests if request.path.split("?")[0] == path]

    @property
    def alive(self) -> list[str]:
        """Ids of the models that have not been unloaded."""
        return [name for name, model in self.models.items() if model.alive]

    # ---- HTTP ----

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.peak_connections = max(self.peak_connections, self.connections)
        try:
            while (request := await _read(reader)) is not None:
                self.requests.append(request)
                await self._answer(request, writer)
        except (Reset, ConnectionError, asyncio.IncompleteReadError):
            _reset(writer)
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self.connections -= 1
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        path = request.path.split("?")[0]
        fault = self.faults[path].popleft() if self.faults[path] else Fault()
        if fault.reply is not None:
            reply = fault.reply
        elif fault.apply:
            reply = await self._handle(path, request)
        else:
            reply = Reply()
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.cut == "reset":
            raise Reset
        body = reply.body
        if fault.cut == "json":
            body = body[: len(body) // 2]
        lines = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if fault.cut == "body":
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            await asyncio.sleep(0.02)
            raise Reset
        writer.write(head + body)
        await writer.drain()

    # ---- the protocol ----

    async def _handle(self, path: str, request: Request) -> Reply:
        if path in self.results and path not in TRAINING:
            return self.results[path](request, 0)
        if path == "client/config":
            return Reply.json(self.config)
        if path == "create_session":
            self._sessions += 1
            return Reply.json({"session_id": f"S{self._sessions}", "type": "create_session"})
        if path == "retrieve_future":
            return await self._retrieve(request)
        if path == "create_model" or (path == "load_weights" and "session_id" in request.json()):
            return self._create(path, request)
        if path == "get_info":
            model_id = request.json()["model_id"]
            return Reply.json(
                {
                    "model_id": model_id,
                    "model_data": {"model_name": "tiny"},
                    "lora_rank": 8,
                    "is_lora": True,
                    "type": "get_info",
                }
            )
        if path == "unload_model":
            model_id = request.json()["model_id"]
            if model_id not in self.models:
                return Reply.json({"detail": "no such model"}, 404)
            self.models[model_id].alive = False
            return Reply.json({"model_id": model_id, "type": "unload_model"})
        if path in TRAINING:
            return self._submit(path, request)
        if path == "asample":
            return self._sample(request)
        if path == "create_sampling_session":
            return Reply.json({"sampling_session_id": "S1:sample:0"})
        return Reply.json({"type": path})

    def _create(self, path: str, request: Request) -> Reply:
        body = request.json()
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        request_id = f"{model_id}:0"
        if model_id not in self.models:
            self.models[model_id] = Model()
            usual = Reply.json({"model_id": model_id, "type": path})
            made = self.results.get(path)
            self._futures[request_id] = (0.0, lambda: made(request, 0) if made else usual)
        return Reply.json({"request_id": request_id, "model_id": model_id})

    def _submit(self, path: str, request: Request) -> Reply:
        if request.headers.get("content-type") == "application/x-protobuf":
            batch = BatchRequest.from_protobuf(request.body)
            model_id, seq = batch.model_id, batch.seq_id
            kind = "forward" if batch.forward_only else path
        else:
            body = request.json()
            model_id, seq, kind = body["model_id"], body["seq_id"], path
        model = self.models[model_id]
        request_id = f"{model_id}:{seq}"
        if (model_id, seq) not in self._operations:
            self._operations[model_id, seq] = request_id
            model.applied.append((seq, kind))
            now = self._loop.time()
            model.ready_at = max(model.ready_at, now) + self.op_seconds
            made = self.results.get(path)
            self._futures[request_id] = (
                model.ready_at,
                lambda: made(request, seq) if made else _result(kind, request),
            )
        return Reply.json({"request_id": request_id, "model_id": model_id})

    def _sample(self, request: Request) -> Reply:
        body = request.json()
        request_id = f"{body['sampling_session_id']}:{body['seq_id']}"
        result = {
            "type": "sample",
            "sequences": [{"tokens": [1, 2], "logprobs": [-1.0, -2.0], "stop_reason": "stop"}],
        }
        made = self.results.get("sample")
        self._futures[request_id] = (0.0, lambda: made(request, 0) if made else Reply.json(result))
        return Reply.json({"request_id": request_id, "sample_sequence_ids": ["q0"]})

    async def _retrieve(self, request: Request) -> Reply:
        request_id = request.json()["request_id"]
        if request_id not in self._futures:
            return Reply.json({"detail": "unknown future"}, 404)
        ready_at, result = self._futures[request_id]
        wait = ready_at - self._loop.time()
        if wait > self.hold:
            await asyncio.sleep(self.hold)
            return Reply.json(
                {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            )
        if wait > 0:
            await asyncio.sleep(wait)
        return result()


def _result(kind: str, request: Request) -> Reply:
    if kind in ("forward", "forward_backward"):
        batch = BatchRequest.from_protobuf(request.body)
        outputs = [
            {"logprobs": Tensor.of([-1.0] * datum.loss_fn_inputs["target_tokens"].size, "float32")}
            for datum in batch.data
        ]
        data = BatchResult(outputs, {"loss:sum": float(len(outputs))}).to_protobuf()
        return Reply(200, data, {"content-type": "application/x-protobuf"})
    body = request.json()
    if kind == "save_weights":
        return Reply.json(
            {"path": f"tinker://{body['model_id']}/weights/{body['path']}", "type": kind}
        )
    if kind == "save_weights_for_sampler":
        return Reply.json({"sampling_session_id": "S1:sample:0", "type": kind})
    return Reply.json({"type": kind})


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name:
            headers[name.lower()] = value
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, target.removeprefix(PREFIX), headers, body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Abort with RST, as a crashed peer or a broken network does."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
