"""A run driven by plain HTTP, for what no well-behaved client would send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx2
import numpy as np

from tests.support.server import ServerProcess

PYTHON = "AsyncTinker/Python 0.38.0"
ELIXIR = "AsyncTinkex/Elixir 0.15.0"

TIMEOUT = 100.0


class RawRun:
    """A session with one model, and its operations as JSON. Numbers are given by the caller."""

    def __init__(self, server: ServerProcess, http: httpx2.Client, *, rank: int = 4) -> None:
        self.http = http
        self.session_id: str = self.ok("create_session", {"tags": [], "sdk_version": "0"})[
            "session_id"
        ]
        self.model_id: str = self.create(rank=rank)["model_id"]
        self._server = server

    @classmethod
    @contextmanager
    def open(cls, server: ServerProcess, *, agent: str = PYTHON, rank: int = 4) -> Iterator[Self]:
        """A run that looks as if a client with that user agent had made it."""
        with http_client(server, agent=agent) as http:
            run = cls(server, http, rank=rank)
            yield run
            http.post(f"sessions/{run.session_id}/finish", json={"reason": {"type": "success"}})

    def create(self, *, rank: int = 4, model_seq_id: int = 0, **changes: Any) -> dict[str, Any]:
        body = {
            "session_id": self.session_id,
            "model_seq_id": model_seq_id,
            "base_model": "small-llama",
            "lora_config": {"rank": rank, "seed": 1},
            **changes,
        }
        return self.ok("create_model", body)

    def ok(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that must be taken."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert isinstance(found, dict)
        return found

    def refused(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """The answer to a request that must be refused for good, in the form of all refusals."""
        return assert_refused(self.http.post(path, json=body))

    def forward_backward(self, seq: int, seed: int = 1, **changes: Any) -> str:
        """Submit; the request id."""
        return self.submitted("forward_backward", self.batch(seq, seed, **changes))

    def optim_step(self, seq: int, learning_rate: float = 1e-2) -> str:
        return self.submitted(
            "optim_step",
            {
                "model_id": self.model_id,
                "seq_id": seq,
                "adam_params": {"learning_rate": learning_rate},
            },
        )

    def save(self, seq: int, name: str = "end") -> str:
        """Save; the hash of the adapter's weights."""
        request_id = self.submitted(
            "save_weights", {"model_id": self.model_id, "seq_id": seq, "path": name}
        )
        path = self.result(request_id)["path"]
        return self._server.manifest(path).files["adapter_model.safetensors"].hash

    def batch(self, seq: int, seed: int = 1, *, data: list[Any] | None = None) -> dict[str, Any]:
        """The body of a forward_backward in JSON."""
        if data is None:
            data = [json_datum(seed), json_datum(seed + 100)]
        return {
            "model_id": self.model_id,
            "seq_id": seq,
            "forward_backward_input": {"data": data, "loss_fn": "cross_entropy"},
        }

    def submitted(self, path: str, body: dict[str, Any]) -> str:
        request_id = self.ok(path, body)["request_id"]
        assert isinstance(request_id, str)
        return request_id

    def poll(self, request_id: str, **headers: str) -> httpx2.Response:
        """One poll, held by the server for as long as it likes."""
        return self.http.post(
            "retrieve_future",
            json={"request_id": request_id, "allow_metadata_only": True},
            headers=headers,
        )

    def answer(self, request_id: str) -> dict[str, Any]:
        """The final answer for a future."""
        while True:
            answer = self.poll(request_id)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert isinstance(found, dict)
            if found.get("type") != "try_again":
                return found

    def result(self, request_id: str) -> dict[str, Any]:
        """The result of a future that must succeed."""
        found = self.answer(request_id)
        assert "error" not in found, found
        return found

    def failure(self, request_id: str) -> str:
        """The message of a future that must fail, to a Python client."""
        found = self.answer(request_id)
        assert isinstance(found.get("error"), str), found
        assert "Traceback" not in found["error"]
        return str(found["error"])


@contextmanager
def http_client(server: ServerProcess, *, agent: str = PYTHON) -> Iterator[httpx2.Client]:
    """A client for paths under /api/v1/."""
    headers = {"user-agent": agent, "x-api-key": "tml-test"}
    with httpx2.Client(
        base_url=f"{server.url}/api/v1/", headers=headers, timeout=TIMEOUT
    ) as client:
        yield client


def assert_refused(answer: httpx2.Response) -> httpx2.Response:
    """A definite refusal: a status that no client repeats, and what each client reads of it."""
    assert answer.status_code in (400, 401, 403, 404, 413, 422), answer.text
    body = answer.json()
    assert body["detail"] == body["message"] == body["error"]
    assert body["category"] == "user"
    assert body["code"]
    assert "Traceback" not in answer.text
    return answer


def json_datum(seed: int, length: int = 20) -> dict[str, Any]:
    """A datum as the Elixir client writes it: flat tensors without a shape."""
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(3, 250, length + 1)]
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64"},
            "weights": {"data": [1.0] * length, "dtype": "float32"},
        },
    }
