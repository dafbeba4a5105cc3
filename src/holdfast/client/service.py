"""The way in: one session at one server, and the clients made from it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from holdfast.client.futures import ClientFuture, Future
from holdfast.client.http import RetryConfig, Server
from holdfast.client.polling import poll
from holdfast.client.rest import RestClient
from holdfast.client.runtime import runtime
from holdfast.client.sampling import SamplingClient, open_sampler
from holdfast.client.session import Session
from holdfast.client.training import TrainingClient, unload_model, warn_of_pending
from holdfast.client.types import (
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    OptimizerConfig,
    WeightsInfoResponse,
)
from holdfast.protocol.bodies import Body, check_body
from holdfast.protocol.checkpoints import LoadWeightsRequest
from holdfast.protocol.errors import AwaitTimeoutError, HoldfastError, RequestError
from holdfast.protocol.futures import FutureHandle
from holdfast.protocol.sessions import SessionEnd
from holdfast.protocol.training import CreateModelRequest, CreateModelResponse, GetInfoRequest

log = logging.getLogger("holdfast.client")

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"
_UNLOAD_SECONDS = 10.0


class ServiceClient:
    """One session at a server. Nothing is sent before the first use.

    The address is `base_url`, else `HOLDFAST_BASE_URL`, else `TINKER_BASE_URL`, else this
    machine; the key is `api_key`, else `HOLDFAST_API_KEY`, else `TINKER_API_KEY`. Close it, or use
    it in a `with` block: that waits for the operations that were called, ends the session and frees
    its models. A block that ends with an error gives up what is still waiting, and ends soon, also
    when the server is gone.

    >>> with ServiceClient() as service:  # doctest: +SKIP
    ...     client = service.create_lora_training_client("holdfast-tiny", rank=8).result()
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        retry_config: RetryConfig | None = None,
    ) -> None:
        server = connect(base_url, api_key, default_headers_overrides, retry_config)
        tags = os.environ.get("TINKER_TAGS", "")
        self._runtime = server.runtime
        self._session = Session(
            server,
            tags=[tag.strip() for tag in tags.split(",") if tag.strip()],
            user_metadata=user_metadata,
            project_id=project_id or os.environ.get("TINKER_PROJECT_ID"),
            display_name=display_name,
        )

    # ---- training clients ----

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """Start training a new LoRA adapter of a base model.

        >>> client = service.create_lora_training_client("holdfast-tiny", rank=8).result()
        ... # doctest: +SKIP
        """
        if not (train_mlp or train_attn or train_unembed):
            raise RequestError("nothing to train: train_mlp, train_attn and train_unembed are off")
        lora = {
            "rank": rank,
            "seed": seed,
            "train_mlp": train_mlp,
            "train_attn": train_attn,
            "train_unembed": train_unembed,
        }
        fields = {
            "base_model": base_model,
            "lora_config": lora,
            "optimizer_config": optimizer,
            "user_metadata": user_metadata,
        }
        check_body(CreateModelRequest, {**fields, "session_id": "-", "model_seq_id": 0})

        async def work() -> TrainingClient:
            making = _Making(self._session)
            return await making.guarded(lambda: making.create(fields), None)

        return ClientFuture(work(), self._runtime)

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClient:
        """As `create_lora_training_client`."""
        return await self.create_lora_training_client(
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            user_metadata,
            optimizer,
        )

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        await_timeout: float | None = None,
    ) -> ClientFuture[TrainingClient]:
        """Start a new run from a checkpoint's weights, with a cold optimizer.

        The LoRA configuration is the checkpoint's. When any step fails, times out (after
        `await_timeout` seconds) or is cancelled, what was made at the server is unloaded before
        the error is given.

        >>> path = "tinker://RUN/weights/epoch-1"
        >>> client = service.create_training_client_from_state(path).result()  # doctest: +SKIP
        """
        return self._from_state(
            path,
            base_model,
            user_metadata,
            weights_access_token,
            optimizer,
            await_timeout,
            with_optimizer=False,
        )

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        await_timeout: float | None = None,
    ) -> TrainingClient:
        """As `create_training_client_from_state`."""
        return await self.create_training_client_from_state(
            path,
            base_model,
            user_metadata,
            weights_access_token,
            optimizer,
            await_timeout=await_timeout,
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> ClientFuture[TrainingClient]:
        """Go on exactly where a checkpoint was saved: weights, optimizer, accumulated gradients.

        Fails when the checkpoint has no optimizer state. Otherwise as
        `create_training_client_from_state`.

        >>> path = "tinker://RUN/weights/epoch-1"
        >>> client = service.create_training_client_from_state_with_optimizer(path).result()
        ... # doctest: +SKIP
        """
        return self._from_state(
            path,
            base_model,
            user_metadata,
            weights_access_token,
            None,
            await_timeout,
            with_optimizer=True,
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> TrainingClient:
        """As `create_training_client_from_state_with_optimizer`."""
        return await self.create_training_client_from_state_with_optimizer(
            path, base_model, user_metadata, weights_access_token, await_timeout=await_timeout
        )

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        token: str | None,
        optimizer: OptimizerConfig | None,
        await_timeout: float | None,
        *,
        with_optimizer: bool,
    ) -> ClientFuture[TrainingClient]:
        load = {
            "path": path,
            "optimizer": with_optimizer,
            "base_model": base_model,
            "user_metadata": user_metadata,
            "optimizer_config": optimizer,
            "weights_access_token": token,
        }
        check_body(LoadWeightsRequest, {**load, "session_id": "-", "model_seq_id": 0})

        async def work() -> TrainingClient:
            making = _Making(self._session)

            async def make() -> TrainingClient:
                await self._session.id()
                if self._session.config.create_by_load:
                    return await making.create_by_load(load)
                return await making.create_and_load(load)

            return await making.guarded(make, await_timeout)

        return ClientFuture(work(), self._runtime)

    # ---- other clients ----

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> ClientFuture[SamplingClient]:
        """Sample from a saved checkpoint, or from a base model.

        >>> sampler = service.create_sampling_client(base_model="holdfast-tiny").result()
        ... # doctest: +SKIP
        """
        if (model_path is None) == (base_model is None):
            raise RequestError("give model_path or base_model, one of them")
        return ClientFuture(
            open_sampler(
                self._session, model_path=model_path, base_model=base_model, retry=retry_config
            ),
            self._runtime,
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> SamplingClient:
        """As `create_sampling_client`."""
        return await self.create_sampling_client(model_path, base_model, retry_config)

    def create_rest_client(self) -> RestClient:
        """Look at runs, checkpoints and sessions, and manage them.

        >>> service.create_rest_client().list_training_runs().result()  # doctest: +SKIP
        """
        return RestClient._of(self._session.server)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that the server has.

        >>> [m.model_name for m in service.get_server_capabilities().supported_models]
        ... # doctest: +SKIP
        """
        return self._capabilities().result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """As `get_server_capabilities`."""
        return await self._capabilities()

    def _capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        async def work() -> GetServerCapabilitiesResponse:
            answer = await self._session.server.call("GET", "get_server_capabilities")
            return answer.read(GetServerCapabilitiesResponse)

        return self._future(work())

    # ---- the session's end ----

    def close(self, status: SessionEnd = "success", detail: str | None = None) -> Future[None]:
        """End the session; the server frees its models. Idempotent, and never fails.

        After "success" the operations called before are waited for, as long as their futures would
        be; else they are given up. Telling the server is tried for some seconds: a session that
        could not be ended ends there by itself after some time without a sign of life.

        >>> service.close().result()  # doctest: +SKIP
        """
        return self._future(self._session.close(status, detail))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(*_end(kind)).result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close(*_end(kind))

    def _future(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return Future(work, self._runtime)


def connect(
    base_url: str | None,
    api_key: str | None,
    headers: Mapping[str, str] | None = None,
    retry: RetryConfig | None = None,
) -> Server:
    """The server that arguments and environment name. Raises RequestError for a wrong address."""
    env = os.environ
    url = base_url or env.get("HOLDFAST_BASE_URL") or env.get("TINKER_BASE_URL") or DEFAULT_URL
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"base_url {url!r:.200}: http://HOST:PORT or https://HOST is expected")
    if parts.path.rstrip("/").endswith("/api/v1"):
        raise RequestError(f"base_url {url!r:.200}: leave out /api/v1, which the client adds")
    key = api_key or env.get("HOLDFAST_API_KEY") or env.get("TINKER_API_KEY") or "tml-local"
    if not key.isascii() or not key.isprintable():
        raise RequestError("the API key has characters that cannot be sent")
    return Server(runtime(), url, {"x-api-key": key, **(headers or {})}, retry or RetryConfig())


class _Making:
    """A training client in the making, and what has to go when it fails."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._model_id: str | None = None
        self._client: TrainingClient | None = None

    async def guarded(
        self, make: Callable[[], Awaitable[TrainingClient]], await_timeout: float | None
    ) -> TrainingClient:
        """Make the client; when that fails in any way, unload what was made, then raise."""
        limit = asyncio.timeout(await_timeout)
        try:
            async with limit:
                return await make()
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(self._unmake()))
            if isinstance(error, TimeoutError) and limit.expired():
                raise AwaitTimeoutError(
                    f"the training client was not ready after {await_timeout} s; what was made of"
                    " it at the server has been unloaded"
                ) from None
            raise

    async def _unmake(self) -> None:
        if self._client is not None:
            self._client._closed = True
            self._client._outbox.end(RequestError("the client could not be made"))
        if self._model_id is None:
            return
        try:
            async with asyncio.timeout(_UNLOAD_SECONDS):
                await unload_model(self._session.server, self._model_id)
        except (HoldfastError, TimeoutError) as error:
            log.warning("the half-made model %s was not unloaded: %s", self._model_id, error)

    async def create(self, fields: Mapping[str, Any]) -> TrainingClient:
        """A new model."""
        session_id = await self._session.id()
        number = self._session.next_model()
        self._model_id = f"{session_id}:train:{number}"
        request = check_body(
            CreateModelRequest, {**fields, "session_id": session_id, "model_seq_id": number}
        )
        created = await self._run("create_model", "CreateModel", request, CreateModelResponse)
        self._model_id = created.model_id
        return await self._client_of(self._model_id)

    async def create_by_load(self, load: Mapping[str, Any]) -> TrainingClient:
        """A model made from a checkpoint by one request."""
        session_id = await self._session.id()
        number = self._session.next_model()
        self._model_id = f"{session_id}:train:{number}"
        request = check_body(
            LoadWeightsRequest, {**load, "session_id": session_id, "model_seq_id": number}
        )
        loaded = await self._run("load_weights", "LoadWeights", request, LoadWeightsResponse)
        client = await self._client_of(self._model_id)
        client.loaded = loaded
        if load["optimizer"]:
            warn_of_pending(load["path"], loaded)
        return client

    async def create_and_load(self, load: Mapping[str, Any]) -> TrainingClient:
        """Read the checkpoint's configuration, make a model like it, load."""
        token = load["weights_access_token"]
        server = self._session.server if token is None else self._session.server.with_key(token)
        answer = await server.call("POST", "weights_info", {"tinker_path": load["path"]})
        info = answer.read(WeightsInfoResponse)
        flags = {
            name: True if value is None else value
            for name, value in (
                ("train_unembed", info.train_unembed),
                ("train_mlp", info.train_mlp),
                ("train_attn", info.train_attn),
            )
        }
        client = await self.create(
            {
                "base_model": load["base_model"] or info.base_model,
                "lora_config": {"rank": info.lora_rank or 32, **flags},
                "optimizer_config": load["optimizer_config"] or info.optimizer_config,
                "user_metadata": load["user_metadata"],
            }
        )
        loaded = client._load(load["path"], token, None, optimizer=load["optimizer"])
        client.loaded = await loaded
        return client

    async def _run(self, path: str, request_type: str, request: Body, model: type[M]) -> M:
        answer = await self._session.server.call("POST", path, request)
        body = answer.json()
        if not isinstance(body, dict) or "request_id" not in body:
            return answer.read(model)
        handle = answer.read(FutureHandle)
        return await poll(
            self._session.server,
            handle.request_id,
            request_type,
            lambda found: found.read(model),
            protobuf=False,
            lane="poll",
        )

    async def _client_of(self, model_id: str) -> TrainingClient:
        answer = await self._session.server.call(
            "POST", "get_info", GetInfoRequest(model_id=model_id)
        )
        self._client = TrainingClient(self._session, model_id, answer.read(GetInfoResponse))
        return self._client


def _end(kind: type[BaseException] | None) -> tuple[SessionEnd, str | None]:
    if kind is None:
        return "success", None
    if issubclass(kind, Exception):
        return "errored", kind.__name__
    return "interrupted", kind.__name__
