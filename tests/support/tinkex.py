"""A client that behaves as the Elixir SDK (tinkex 0.4.0) does: what it sends, and when again.

Submissions go out one after the other, each repeated with the same headers until it is taken;
every future is polled on its own, with pauses of 1, 2, 4 … 30 s that grow with each of its polls.
Answers are read by the shapes that it matches them with, and nothing else.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx2

AGENT = "AsyncTinkex/Elixir 0.15.0"

Json = dict[str, Any]

_SUBMIT_SECONDS = 60.0
_POLL_SECONDS = 45.0
_HEARTBEAT_SECONDS = 10.0
_RETRIES = 10
_RETRIED_400 = 3
_LARGEST_CHUNK = 1024
"""Datums of one request."""
_LARGEST_BODY = 5_000_000
"""Bytes of one request's datums, by an estimate."""

ADAM = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1.0e-12,
    "grad_clip_norm": 0.0,
    "learning_rate": 0.0001,
    "weight_decay": 0.0,
}
"""What an AdamParams is without further words."""


class TinkexError(Exception):
    """An error as it reaches the script. `status` is the HTTP one, if there was any."""

    def __init__(self, message: str, status: int | None = None, category: str | None = None):
        super().__init__(message)
        self.status = status
        self.category = category


class ServiceClient:
    """One session. Closing it sends nothing: the server finds out by the missing heartbeat."""

    def __init__(self, url: str, *, api_key: str = "tml-elixir") -> None:
        self._http = httpx2.Client(
            base_url=f"{url}/api/v1/",
            headers={
                "user-agent": AGENT,
                "x-api-key": api_key,
                "accept": "application/json",
                "accept-encoding": "gzip",
                "content-type": "application/json",
            },
            timeout=httpx2.Timeout(_SUBMIT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=50),
        )
        self._tasks = ThreadPoolExecutor(64, thread_name_prefix="tinkex")
        self._closed = threading.Event()
        self._creating = threading.RLock()
        """Creations of one ServiceClient come one after the other."""
        self.model_seq_id = 0
        """Goes on after a success only."""
        self.creation = ""
        """The request that made the last model. It is never polled."""
        self.session_id: str = self.post(
            "create_session",
            {
                "project_id": None,
                "sdk_version": "0.15.0",
                "tags": ["tinkex-elixir"],
                "type": "create_session",
                "user_metadata": None,
            },
        )["session_id"]
        self._heart = threading.Thread(target=self._beat, name="tinkex-heartbeat")
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(wait=kind is None)

    def close(self, *, wait: bool = True) -> None:
        """Stop everything; polls under way are waited for unless `wait` is false."""
        self._closed.set()
        self._tasks.shutdown(wait=wait, cancel_futures=True)
        self._heart.join()
        self._http.close()

    # ---- clients ----

    def create_lora_training_client(
        self,
        base_model: str,
        *,
        rank: int = 32,
        seed: int | None = None,
        call_timeout: float | None = 5.0,
        **lora: bool,
    ) -> TrainingClient:
        """A new model; TimeoutError when the server takes longer than `call_timeout` seconds.

        The model may not be there yet, and operations are sent all the same.
        """

        def create() -> str:
            answer = self.post(
                "create_model",
                {
                    "base_model": base_model,
                    "lora_config": {
                        "rank": rank,
                        "seed": seed,
                        "train_attn": True,
                        "train_mlp": True,
                        "train_unembed": True,
                        **lora,
                    },
                    "model_seq_id": self.model_seq_id,
                    "session_id": self.session_id,
                    "type": "create_model",
                    "user_metadata": None,
                },
            )
            self.creation = answer["request_id"]
            model_id = answer["model_id"]  # wanted at once
            assert isinstance(model_id, str)
            return model_id

        with self._creating:
            client = TrainingClient(self, self._tasks.submit(create).result(call_timeout))
            self.model_seq_id += 1
        return client

    def create_training_client_from_state(
        self, path: str, *, optimizer: bool = False
    ) -> TrainingClient:
        """The checkpoint's metadata, a model like it, a load as its first operation.

        When the load fails, the model stays, and the next creation has its number again.
        """
        info = self.post("weights_info", {"tinker_path": path})
        flags = {
            name: True if info.get(name) is None else info[name]
            for name in ("train_attn", "train_mlp", "train_unembed")
        }
        assert info["is_lora"] is True
        with self._creating:
            number = self.model_seq_id
            client = self.create_lora_training_client(
                info["base_model"], rank=info.get("lora_rank") or 32, call_timeout=None, **flags
            )
            self.model_seq_id = number
            client.load_state(path, optimizer=optimizer).result()
            self.model_seq_id = number + 1
        return client

    # ---- HTTP ----

    def post(self, path: str, body: Json) -> Json:
        """A request with its retries; the body of the answer. Raises TinkexError.

        408, 409, 429, 5xx and transport errors are repeated, ten times at most.
        """
        key = uuid.uuid4().hex
        content = _encode(body)
        for attempt in itertools.count():
            headers = {"x-idempotency-key": key, "x-stainless-retry-count": str(attempt)}
            last = attempt == _RETRIES
            try:
                answer = self._http.post(path, content=content, headers=headers)
            except httpx2.TransportError as error:
                if last:
                    raise TinkexError(f"{path}: {error!r}") from error
                self.sleep(_backoff(attempt))
                continue
            if answer.status_code < 400:
                found = answer.json() if answer.content else {}
                assert isinstance(found, dict)
                return found
            if last or not _is_retried(answer):
                raise _error(answer)
            self.sleep(_pause_after(answer, attempt))
        raise AssertionError

    def start(self, submitted: Json, kind: str) -> Future[Json]:
        """Poll a future, in a task of its own."""
        return self._tasks.submit(self._await, submitted["request_id"], kind)

    def task(self, work: Callable[[], Json]) -> Future[Json]:
        return self._tasks.submit(work)

    def _await(self, request_id: str, kind: str) -> Json:
        """Poll until there is a result. Raises TinkexError."""
        bad = 0
        for iteration in itertools.count():
            headers = {
                "x-idempotency-key": uuid.uuid4().hex,
                "x-stainless-raw-response": "raw",
                "x-stainless-retry-count": "0",
                "x-tinker-request-iteration": str(iteration),
                "x-tinker-request-type": kind,
            }
            try:
                answer = self._http.post(
                    "retrieve_future",
                    content=_encode({"allow_metadata_only": True, "request_id": request_id}),
                    headers=headers,
                    timeout=_POLL_SECONDS,
                )
            except httpx2.TransportError:
                self.sleep(min(2.0**iteration, 30.0))
                continue
            status = answer.status_code
            if status == 408 or status >= 500:
                continue  # at once, and for ever
            if status == 400 and bad < _RETRIED_400 and not _message(answer):
                bad += 1
                continue
            if status >= 300:
                raise _error(answer)
            body: Json = answer.json() if answer.content else {}
            if body.get("type") == "try_again":
                assert isinstance(body["request_id"], str)
                assert isinstance(body["queue_state"], str)
                self.sleep(_poll_pause(body, iteration))
            elif body.get("status") == "pending":
                self.sleep(_poll_pause(body, iteration))
            elif body.get("status") == "failed":
                failure = body["error"]
                assert isinstance(failure, dict), body
                assert failure["category"] == "user", "it would poll for ever"
                raise TinkexError(failure["message"], category=failure["category"])
            else:
                # Anything else is an error of the client's own, its text lost.
                assert {"type", "status", "loss_fn_output_type"} & body.keys(), body
                return body
        raise AssertionError

    def _beat(self) -> None:
        while not self._closed.wait(_HEARTBEAT_SECONDS):
            try:
                self._http.post(
                    "session_heartbeat",
                    content=_encode({"session_id": self.session_id}),
                    timeout=_HEARTBEAT_SECONDS,
                )
            except httpx2.TransportError:
                pass  # not tried again

    def sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise TinkexError("the client is closed")


class TrainingClient:
    """A model's operations, each with a number of its own, from 1 on, and sent in that order."""

    def __init__(self, service: ServiceClient, model_id: str) -> None:
        self.service = service
        self.model_id = model_id
        self.numbers = itertools.count(1)
        self.largest_body = _LARGEST_BODY
        self._sending = threading.Lock()

    def forward_backward(self, data: Sequence[Json], loss_fn: str) -> Future[Json]:
        return self._batch("forward_backward", "ForwardBackward", data, loss_fn)

    def forward(self, data: Sequence[Json], loss_fn: str) -> Future[Json]:
        return self._batch("forward", "Forward", data, loss_fn)

    def optim_step(self, **adam: float) -> Future[Json]:
        return self.send("optim_step", "OptimStep", {"adam_params": {**ADAM, **adam}})

    def save_state(self, name: str) -> Future[Json]:
        body = {"path": name, "ttl_seconds": None, "type": "save_weights"}
        return self.send("save_weights", "SaveWeights", body)

    def save_weights_for_sampler(self, name: str) -> Future[Json]:
        body = {
            "path": name,
            "sampling_session_seq_id": None,
            "ttl_seconds": None,
            "type": "save_weights_for_sampler",
        }
        return self.send("save_weights_for_sampler", "SaveWeightsForSampler", body)

    def load_state(self, path: str, *, optimizer: bool = False) -> Future[Json]:
        body = {"optimizer": optimizer, "path": path, "type": "load_weights"}
        return self.send("load_weights", "LoadWeights", body)

    def send(self, path: str, kind: str, body: Json) -> Future[Json]:
        """Submit, then poll in a task. What is refused uses its number up all the same."""
        with self._sending:
            return self.service.start(self._submit(path, body), kind)

    def _submit(self, path: str, body: Json) -> Json:
        numbered = {**body, "model_id": self.model_id, "seq_id": next(self.numbers)}
        return self.service.post(path, numbered)

    def _batch(self, path: str, kind: str, data: Sequence[Json], loss_fn: str) -> Future[Json]:
        with self._sending:
            parts = [
                self.service.start(
                    self._submit(path, {f"{path}_input": {"data": part, "loss_fn": loss_fn}}), kind
                )
                for part in chunks(data, self.largest_body)
            ]
        if len(parts) == 1:
            return parts[0]
        return self.service.task(lambda: _combined([part.result() for part in parts]))


def chunks(data: Sequence[Json], largest: int = _LARGEST_BODY) -> Iterator[list[Json]]:
    """The requests of a batch. A first datum that is too large alone leaves an empty one before."""
    part: list[Json] = []
    size = 0
    for datum in data:
        estimate = _size(datum)
        if len(part) >= _LARGEST_CHUNK or size + estimate > largest:
            yield part
            part, size = [], 0
        part.append(datum)
        size += estimate
    yield part


def datum(tokens: Sequence[int], targets: Sequence[int], weights: Sequence[float]) -> Json:
    """Flat lists without shapes."""
    return {
        "loss_fn_inputs": {
            "target_tokens": {"data": list(targets), "dtype": "int64"},
            "weights": {"data": list(weights), "dtype": "float32"},
        },
        "model_input": {"chunks": [{"tokens": list(tokens), "type": "encoded_text"}]},
    }


def _combined(parts: Sequence[Json]) -> Json:
    """The one result of several requests: outputs in their order, sums added up."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, value in part["metrics"].items():
            if name.endswith(":sum"):
                totals[name] = totals.get(name, 0.0) + value
    outputs = [output for part in parts for output in part["loss_fn_outputs"]]
    return {**parts[0], "metrics": totals, "loss_fn_outputs": outputs}


def _size(datum: Json) -> int:
    tensors = sum(10 * len(tensor["data"]) for tensor in datum["loss_fn_inputs"].values())
    return tensors + sum(10 * len(chunk["tokens"]) for chunk in datum["model_input"]["chunks"])


def _encode(body: Json) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _is_retried(answer: httpx2.Response) -> bool:
    told = answer.headers.get("x-should-retry")
    if told in ("true", "false"):
        return bool(told == "true")
    return answer.status_code in (408, 409, 429) or answer.status_code >= 500


def _pause_after(answer: httpx2.Response, attempt: int) -> float:
    if answer.status_code != 429:
        return _backoff(attempt)  # whatever Retry-After says
    milliseconds = answer.headers.get("retry-after-ms", "")
    if milliseconds.isdigit():
        return int(milliseconds) / 1000
    seconds = answer.headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else 1.0


def _backoff(attempt: int) -> float:
    return min(0.5 * 2.0**attempt, 10.0) * random.uniform(0.75, 1.0)


def _poll_pause(body: Json, iteration: int) -> float:
    wanted = body.get("retry_after_ms")
    if isinstance(wanted, int):
        return wanted / 1000
    if str(body.get("queue_state")).startswith("paused_"):
        return 1.0
    return float(min(2.0**iteration, 30.0))


def _message(answer: httpx2.Response) -> str | None:
    """What the client reads of an error; `detail` is not looked at."""
    body = answer.json()
    assert isinstance(body, dict), "it would crash"
    return body.get("message") or body.get("error")


def _error(answer: httpx2.Response) -> TinkexError:
    body = answer.json()
    status = answer.status_code
    category = str(body.get("category") or ("user" if status < 500 else "server")).lower()
    return TinkexError(_message(answer) or f"HTTP {status}", status, category)
