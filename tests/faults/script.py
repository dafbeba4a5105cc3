"""The script that is disturbed: tenants that accumulate, save, load and resume, unaware.

It does what a user would do, without retries and without handling errors, through the official SDK,
through Holdfast's own client, and through one that behaves as the Elixir one does. What it saw is
returned, so that a disturbed run can be compared with an undisturbed one to the last bit.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import tinker
from tinker import types

import holdfast
from tests.faults.server import BASE_MODEL
from tests.support import tinkex
from tests.support.sdk import API_KEY, batch
from tests.support.server import ServerProcess

WAIT = 400.0
"""Seconds for any one answer: far above what a restart takes, so that a hang fails the test."""

LARGE_RESULT = 13
"""The step whose result has more than 64 KB."""

Client = Literal["sdk", "elixir", "own"]
CLIENTS: tuple[Client, ...] = ("sdk", "sdk", "elixir", "own")
"""What the tenants use, one after the other."""

T = TypeVar("T")
C = TypeVar("C")


class Watcher(Protocol):
    """Whoever looks on while the script runs."""

    def progress(self, tenant: int) -> None:
        """That tenant made a step."""
        ...

    def finished(self, tenant: int) -> None:
        """That tenant is at its end."""
        ...

    def check(self) -> None:
        """Raises what keeps the script from ever getting further."""
        ...


class Nobody:
    """Looks on at an undisturbed script."""

    def progress(self, tenant: int) -> None: ...

    def finished(self, tenant: int) -> None: ...

    def check(self) -> None: ...


@dataclass(slots=True)
class Seen:
    """All that a tenant's script can see."""

    losses: list[float] = field(default_factory=list)
    logprobs: list[str] = field(default_factory=list)
    """The bytes of each row, in hexadecimal digits."""
    steps: list[float] = field(default_factory=list)
    """The step numbers that optim_step answered."""
    blobs: dict[str, str] = field(default_factory=dict)
    """Files of the checkpoints saved on the way, with the hashes of their bytes."""

    def note(self, loss: float, logprobs: Sequence[Any]) -> None:
        self.losses.append(loss)
        self.logprobs.extend(np.asarray(row, dtype=np.float32).tobytes().hex() for row in logprobs)


class Tenant(ABC, Generic[C]):
    """One tenant's training, deterministic in its seed, whatever client it uses."""

    def __init__(
        self, service: Any, server: ServerProcess, seed: int, steps: int, watcher: Watcher
    ) -> None:
        self.service = service
        self._server = server
        self._steps = steps
        self._watcher = watcher
        self.seed = seed
        self.seen = Seen()

    @abstractmethod
    def create(self) -> C: ...

    @abstractmethod
    def resume(self, path: str) -> C: ...

    @abstractmethod
    def forward_backward(self, client: C, step: int) -> Any: ...

    @abstractmethod
    def note(self, result: Any) -> None:
        """What a forward_backward answered."""

    @abstractmethod
    def optim_step(self, client: C) -> Any: ...

    @abstractmethod
    def step_number(self, result: Any) -> float: ...

    @abstractmethod
    def save(self, client: C, name: str, *, overwrite: bool) -> str:
        """The path of the checkpoint."""

    @abstractmethod
    def load(self, client: C, path: str) -> None: ...

    def peculiarities(self, client: C) -> None:
        """What only this client does."""

    def leave(self, client: C) -> None:
        """What it does with a client that it needs no longer."""

    def run(self) -> Seen:
        """Train to the end; whatever goes wrong is raised."""
        client = self.create()
        half = self._steps // 2
        for step in range(half):
            self._step(client, step)
            if step % 5 == 4:
                self._save(client, "latest", overwrite=True)
            if step % 11 == 10:
                self._save(client, f"step-{step}")
        path = self._save(client, "half")
        self._step(client, 1_000)  # thrown away by the load
        self.load(client, path)
        self.peculiarities(client)
        for step in range(half, half + half // 2):
            self._step(client, step)
        # Gradients that are not applied yet are part of the state.
        self.note(self.result(self.forward_backward(client, 2_000)))
        path = self._save(client, "unfinished")
        self.leave(client)
        client = self.resume(path)
        for step in range(half + half // 2, self._steps):
            self._step(client, step)
        self._save(client, "end")
        self._watcher.finished(self.seed)
        return self.seen

    def result(self, future: Any) -> Any:
        """Wait as a user does; but no longer than there is something to wait for."""
        end = time.monotonic() + WAIT
        while True:
            self._watcher.check()
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if _done(future) or time.monotonic() > end:
                    raise

    def data(self, step: int) -> list[types.Datum]:
        return batch(10_000 * self.seed + step, _lengths(step))

    def _step(self, client: C, step: int) -> None:
        pending = [self.forward_backward(client, step)]
        if step % 3 == 0:
            pending.append(self.forward_backward(client, step + 500))
        update = self.optim_step(client)
        for future in pending:
            self.note(self.result(future))
        self.seen.steps.append(self.step_number(self.result(update)))
        self._watcher.progress(self.seed)

    def _save(self, client: C, name: str, *, overwrite: bool = False) -> str:
        path = self.save(client, name, overwrite=overwrite)
        for file, blob in self._server.manifest(path).files.items():
            self.seen.blobs[f"{name}@{len(self.seen.steps)}/{file}"] = blob.hash
        return path


class SdkTenant(Tenant[tinker.TrainingClient]):
    """Through the official SDK."""

    def create(self) -> tinker.TrainingClient:
        made = self.service.create_lora_training_client(
            base_model=BASE_MODEL, rank=4 + self.seed, seed=self.seed
        )
        client: tinker.TrainingClient = self.result(made)
        return client

    def resume(self, path: str) -> tinker.TrainingClient:
        made = self.service.create_training_client_from_state_with_optimizer(path)
        client: tinker.TrainingClient = self.result(made)
        return client

    def forward_backward(self, client: tinker.TrainingClient, step: int) -> Any:
        return client.forward_backward(self.data(step), "cross_entropy")

    def note(self, result: types.ForwardBackwardOutput) -> None:
        rows = [output["logprobs"].data for output in result.loss_fn_outputs]
        self.seen.note(result.metrics["loss:sum"], rows)

    def optim_step(self, client: tinker.TrainingClient) -> Any:
        return client.optim_step(types.AdamParams(learning_rate=1e-3, weight_decay=0.1))

    def step_number(self, result: types.OptimStepResponse) -> float:
        assert result.metrics is not None
        return result.metrics["step"]

    def save(self, client: tinker.TrainingClient, name: str, *, overwrite: bool) -> str:
        path: str = self.result(client.save_state(name, overwrite=overwrite)).path
        return path

    def load(self, client: tinker.TrainingClient, path: str) -> None:
        self.result(client.load_state_with_optimizer(path))


class ElixirTenant(Tenant[tinkex.TrainingClient]):
    """Through a client that behaves as the Elixir one does."""

    def create(self) -> tinkex.TrainingClient:
        client: tinkex.TrainingClient = self.service.create_lora_training_client(
            BASE_MODEL, rank=4 + self.seed, seed=self.seed, call_timeout=None
        )
        return client

    def resume(self, path: str) -> tinkex.TrainingClient:
        client: tinkex.TrainingClient = self.service.create_training_client_from_state(
            path, optimizer=True
        )
        return client

    def forward_backward(self, client: tinkex.TrainingClient, step: int) -> Any:
        return client.forward_backward([_json(datum) for datum in self.data(step)], "cross_entropy")

    def note(self, result: tinkex.Json) -> None:
        rows = [output["logprobs"]["data"] for output in result["loss_fn_outputs"]]
        self.seen.note(result["metrics"]["loss:sum"], rows)

    def optim_step(self, client: tinkex.TrainingClient) -> Any:
        return client.optim_step(learning_rate=1e-3, weight_decay=0.1)

    def step_number(self, result: tinkex.Json) -> float:
        assert result["type"] == "optim_step"
        step: float = result["metrics"]["step"]
        return step

    def save(self, client: tinkex.TrainingClient, name: str, *, overwrite: bool) -> str:
        # It cannot ask for a name to be overwritten.
        name = f"{name}-{len(self.seen.steps)}" if overwrite else name
        path: str = self.result(client.save_state(name))["path"]
        return path

    def load(self, client: tinkex.TrainingClient, path: str) -> None:
        assert self.result(client.load_state(path, optimizer=True))["type"] == "load_weights"

    def peculiarities(self, client: tinkex.TrainingClient) -> None:
        """A batch whose first datum is too large for a request; then a number that never comes.

        From here on its batches differ from those of the official SDK.
        """
        client.largest_body = 1
        self._step(client, 3_000)
        if self._steps >= 60:  # it costs the lease of a gap
            next(client.numbers)


class OwnTenant(Tenant[holdfast.TrainingClient]):
    """Through Holdfast's own client."""

    def create(self) -> holdfast.TrainingClient:
        made = self.service.create_lora_training_client(
            BASE_MODEL, rank=4 + self.seed, seed=self.seed
        )
        client: holdfast.TrainingClient = self.result(made)
        return client

    def resume(self, path: str) -> holdfast.TrainingClient:
        made = self.service.create_training_client_from_state_with_optimizer(path)
        client: holdfast.TrainingClient = self.result(made)
        return client

    def leave(self, client: holdfast.TrainingClient) -> None:
        self.result(client.unload())

    def forward_backward(self, client: holdfast.TrainingClient, step: int) -> Any:
        return client.forward_backward([_own(datum) for datum in self.data(step)], "cross_entropy")

    def note(self, result: holdfast.ForwardBackwardOutput) -> None:
        rows = [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]
        self.seen.note(result.metrics["loss:sum"], rows)

    def optim_step(self, client: holdfast.TrainingClient) -> Any:
        return client.optim_step(holdfast.AdamParams(learning_rate=1e-3, weight_decay=0.1))

    def step_number(self, result: holdfast.types.OptimStepResponse) -> float:
        assert result.metrics is not None
        return result.metrics["step"]

    def save(self, client: holdfast.TrainingClient, name: str, *, overwrite: bool) -> str:
        path: str = self.result(client.save_state(name, overwrite=overwrite)).path
        return path

    def load(self, client: holdfast.TrainingClient, path: str) -> None:
        self.result(client.load_state_with_optimizer(path))


def _lengths(step: int) -> Sequence[int]:
    """Mostly small batches. Some are so large that their bodies, or their results too, are kept in
    files of their own."""
    if step == LARGE_RESULT:
        return (200,) * 90
    return (200,) * 30 if step % 20 == 7 else (12, 20)


_TENANTS: dict[Client, type[Tenant[Any]]] = {
    "sdk": SdkTenant,
    "elixir": ElixirTenant,
    "own": OwnTenant,
}


def run_script(
    server: ServerProcess,
    steps: int,
    watcher: Watcher,
    clients: Sequence[Client] = CLIENTS,
    *,
    url: str | None = None,
) -> list[Seen]:
    """All tenants side by side; what each of them saw. They use the server at `url`, or its own.

    Tenants of one kind share a session. The first error of any of them is raised at once.
    """
    url = url or server.url
    with ExitStack() as stack:
        services: dict[Client, Any] = {}
        if "sdk" in clients:
            services["sdk"] = stack.enter_context(_sdk(url))
        if "elixir" in clients:
            services["elixir"] = stack.enter_context(tinkex.ServiceClient(url))
        if "own" in clients:
            own = holdfast.ServiceClient(base_url=url, api_key=API_KEY)
            services["own"] = stack.enter_context(own)
        tenants = [
            _TENANTS[client](services[client], server, number, steps, watcher)
            for number, client in enumerate(clients, start=1)
        ]
        running = [_in_thread(tenant) for tenant in tenants]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [tenant.seen for tenant in tenants]


@contextmanager
def _sdk(url: str) -> Iterator[tinker.ServiceClient]:
    service = tinker.ServiceClient(base_url=url, api_key=API_KEY)
    try:
        yield service
    except BaseException:
        # An orderly end would wait some minutes for a server that may not be there.
        service.holder.close()
        raise
    with service:
        pass


def _in_thread(tenant: Tenant[Any]) -> Future[Seen]:
    """Not in a pool, whose end would wait for tenants that nobody asks for any more."""
    future: Future[Seen] = Future()

    def run() -> None:
        try:
            future.set_result(tenant.run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"tenant {tenant.seed}", daemon=True).start()
    return future


def _done(future: Any) -> bool:
    done = future if isinstance(future, Future | holdfast.Future) else future.future()
    return bool(done.done())


def _own(datum: types.Datum) -> holdfast.Datum:
    inputs = datum.loss_fn_inputs
    return holdfast.Datum(
        holdfast.ModelInput.from_ints(datum.model_input.to_ints()),
        {name: inputs[name].tolist() for name in ("target_tokens", "weights")},
    )


def _json(datum: types.Datum) -> tinkex.Json:
    inputs = datum.loss_fn_inputs
    return tinkex.datum(
        datum.model_input.to_ints(), inputs["target_tokens"].tolist(), inputs["weights"].tolist()
    )
