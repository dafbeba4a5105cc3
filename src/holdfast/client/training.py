"""A model in training: its operations, in the order of the calls."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from holdfast.client import custom_loss
from holdfast.client.chunking import combine, split
from holdfast.client.futures import ClientFuture, Future
from holdfast.client.http import JSON_TYPE, PROTOBUF_TYPE, Answer, Server, read_as
from holdfast.client.outbox import Operation, closed, new_result
from holdfast.client.sampling import SamplingClient, open_sampler
from holdfast.client.session import Session, tell_end
from holdfast.client.tokenizers import load_tokenizer
from holdfast.client.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    OtherOptimizerParams,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
    UnloadModelResponse,
)
from holdfast.protocol.batches import BatchRequest, BatchResult
from holdfast.protocol.bodies import Body, check_body
from holdfast.protocol.checkpoints import (
    LoadWeightsRequest,
    SaveWeightsExternalRequest,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from holdfast.protocol.data import Datum as WireDatum
from holdfast.protocol.errors import (
    AwaitTimeoutError,
    InvalidAnswerError,
    InvalidMessageError,
    InvalidTensorError,
    RequestError,
)
from holdfast.protocol.training import OptimStepRequest, UnloadModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.client.custom_loss import CustomLoss
    from holdfast.client.http import RetryConfig

log = logging.getLogger("holdfast.client")

T = TypeVar("T")


class TrainingClient:
    """A model in training, made by a ServiceClient.

    Every method that submits returns at once with a future; the server executes the operations in
    the order of the calls, from whichever thread. Each has an `_async` form that gives the same
    future to `await`. At the end of a `with` block what was called in it is waited for, unless the
    block ends with an error.

    >>> training_client.forward_backward(data, "cross_entropy")  # doctest: +SKIP
    >>> training_client.optim_step(AdamParams(learning_rate=1e-4))  # doctest: +SKIP
    >>> training_client.save_state("step-1").result().path  # doctest: +SKIP
    'tinker://.../weights/step-1'
    """

    def __init__(self, session: Session, model_id: str, info: GetInfoResponse) -> None:
        self._session = session
        self._server = session.server
        self._runtime = session.server.runtime
        self._outbox = session.outbox()
        self._info = info
        self._closed = False
        self.model_id = model_id
        self.loaded: LoadWeightsResponse | None = None
        """What this client was made from, when it was made from a checkpoint."""

    # ---- training ----

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Log-probabilities and loss of a batch; the model stays as it is.

        >>> output = training_client.forward(data, "cross_entropy").result()  # doctest: +SKIP
        >>> output.loss_fn_outputs[0]["logprobs"].tolist()  # doctest: +SKIP
        """
        return self._batch(data, loss_fn, loss_fn_config, forward_only=True)

    async def forward_async(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """As `forward`."""
        return self.forward(data, loss_fn, loss_fn_config)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Add a batch's gradients to those accumulated since the last optim_step.

        When it fails, the next optim_step fails too: no step is made on a part of a batch.

        >>> training_client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
        ... # doctest: +SKIP
        """
        return self._batch(data, loss_fn, loss_fn_config, forward_only=False)

    async def forward_backward_async(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """As `forward_backward`."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        """Gradients of a loss of your own: `loss_fn(data, logprobs) -> (loss, metrics)`.

        `logprobs` is one torch tensor per datum that requires gradients, `loss` a scalar tensor.
        It runs in this process, on a thread of its own, between a forward and a forward_backward;
        operations called later wait for it. torch is needed. When `loss_fn` raises, its error is
        the future's, and the next optim_step fails as after any failed forward_backward.

        >>> def loss(data, logprobs):  # doctest: +SKIP
        ...     total = -sum(lp.sum() for lp in logprobs)
        ...     return total, {"mine": float(total)}
        >>> training_client.forward_backward_custom(data, loss).result()  # doctest: +SKIP
        """
        custom_loss.require_torch()
        given = list(data)
        parts = self._parts(custom_loss.forward_data(given))
        forwards = [
            self._batch_operation(part, "cross_entropy", {}, forward_only=True) for part in parts
        ]
        backwards: list[tuple[Operation, custom_loss.Deferred]] = []
        for part in parts:
            deferred = custom_loss.Deferred(self.model_id, part)
            operation = self._operation(
                "forward_backward",
                "ForwardBackward",
                deferred.build,
                read_batch,
                content_type=PROTOBUF_TYPE,
                protobuf=True,
            )
            operation.ready = deferred.ready
            backwards.append((operation, deferred))
        self._append(*forwards, *(operation for operation, _ in backwards))

        async def work() -> ForwardBackwardOutput:
            return await custom_loss.run(given, loss_fn, forwards, backwards)

        return self._future(work())

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        """As `forward_backward_custom`."""
        return self.forward_backward_custom(data, loss_fn)

    def optim_step(
        self,
        optim_params: AdamParams | OtherOptimizerParams | None = None,
        *,
        adam_params: AdamParams | None = None,
    ) -> Future[OptimStepResponse]:
        """Apply the accumulated gradients and clear them.

        Without parameters AdamW's defaults hold. A model of another optimizer type takes
        OtherOptimizerParams.

        >>> training_client.optim_step(AdamParams(learning_rate=1e-4)).result()  # doctest: +SKIP
        """
        if optim_params is not None and adam_params is not None:
            raise RequestError("give optim_params or adam_params, not both")
        params = optim_params or adam_params or AdamParams()
        name = "adam_params" if isinstance(params, AdamParams) else "optimizer_params"

        def build(seq: int) -> bytes:
            fields = {"model_id": self.model_id, "seq_id": seq, name: params}
            return _encode(OptimStepRequest, **fields)

        return self._submit("optim_step", "OptimStep", build, _reader(OptimStepResponse))

    async def optim_step_async(
        self,
        optim_params: AdamParams | OtherOptimizerParams | None = None,
        *,
        adam_params: AdamParams | None = None,
    ) -> Future[OptimStepResponse]:
        """As `optim_step`."""
        return self.optim_step(optim_params, adam_params=adam_params)

    # ---- training state ----

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:
        """Save weights, optimizer state and accumulated gradients as a checkpoint of this run.

        The result comes when it is durable. It holds what the operations called before have done
        and nothing of those called after. A name that is taken is an error unless `overwrite`.

        >>> training_client.save_state("epoch-1").result().path  # doctest: +SKIP
        """

        def build(seq: int) -> bytes:
            return _encode(
                SaveWeightsRequest,
                model_id=self.model_id,
                path=name,
                seq_id=seq,
                ttl_seconds=ttl_seconds,
                overwrite=overwrite,
                user_metadata=user_metadata,
            )

        return self._submit("save_weights", "SaveWeights", build, _reader(SaveWeightsResponse))

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:
        """As `save_state`."""
        return self.save_state(name, ttl_seconds, overwrite, user_metadata)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> Future[SaveWeightsExternalResponse]:
        """Save the weights alone for other programs, each file with an address of its own.

        `RestClient.get_external_weights_urls` gives the addresses. Recipients to encrypt for are
        sent on; Holdfast's own server refuses them, as it does not encrypt.

        >>> path = training_client.save_weights_external("final").result().path  # doctest: +SKIP
        """

        def build(seq: int) -> bytes:
            return _encode(
                SaveWeightsExternalRequest,
                model_id=self.model_id,
                path=name,
                seq_id=seq,
                ttl_seconds=ttl_seconds,
                age_encryption_recipients=age_encryption_recipients,
            )

        return self._submit(
            "save_weights_external",
            "SaveWeightsExternal",
            build,
            _reader(SaveWeightsExternalResponse),
        )

    async def save_weights_external_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> Future[SaveWeightsExternalResponse]:
        """As `save_weights_external`."""
        return self.save_weights_external(name, ttl_seconds, age_encryption_recipients)

    def load_state(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> Future[LoadWeightsResponse]:
        """Set the weights from a checkpoint; the optimizer starts cold, gradients are cleared.

        Waits without bound, or `await_timeout` seconds: then the future fails with
        AwaitTimeoutError, the load may still finish, and the client stays usable.

        >>> training_client.load_state("tinker://RUN/weights/epoch-1").result()  # doctest: +SKIP
        """
        return self._load(path, weights_access_token, await_timeout, optimizer=False)

    async def load_state_async(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> Future[LoadWeightsResponse]:
        """As `load_state`."""
        return self.load_state(path, weights_access_token, await_timeout=await_timeout)

    def load_state_with_optimizer(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> Future[LoadWeightsResponse]:
        """Set weights, optimizer state and accumulated gradients from a checkpoint.

        Fails when the checkpoint has no optimizer state. `await_timeout` as in `load_state`.

        >>> path = "tinker://RUN/weights/epoch-1"
        >>> training_client.load_state_with_optimizer(path).result()  # doctest: +SKIP
        """
        return self._load(path, weights_access_token, await_timeout, optimizer=True)

    async def load_state_with_optimizer_async(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        await_timeout: float | None = None,
    ) -> Future[LoadWeightsResponse]:
        """As `load_state_with_optimizer`."""
        return self.load_state_with_optimizer(
            path, weights_access_token, await_timeout=await_timeout
        )

    def _load(
        self, path: str, token: str | None, await_timeout: float | None, *, optimizer: bool
    ) -> Future[LoadWeightsResponse]:
        def build(seq: int) -> bytes:
            return _encode(
                LoadWeightsRequest,
                model_id=self.model_id,
                seq_id=seq,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
            )

        def read(answer: Answer) -> LoadWeightsResponse:
            response = answer.read(LoadWeightsResponse)
            if optimizer:
                warn_of_pending(path, response)
            return response

        return self._submit(
            "load_weights",
            "LoadWeights",
            build,
            read,
            await_timeout=await_timeout,
        )

    # ---- sampling from the model ----

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]:
        """Save the weights alone, to sample from; training cannot be resumed from them.

        >>> path = training_client.save_weights_for_sampler("final").result().path
        ... # doctest: +SKIP
        """
        return self._save_for_sampler(name, ttl_seconds, user_metadata, "snapshot")

    async def save_weights_for_sampler_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]:
        """As `save_weights_for_sampler`."""
        return self.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    def _save_for_sampler(
        self,
        name: str | None,
        ttl_seconds: int | None,
        user_metadata: dict[str, str] | None,
        kind: Literal["snapshot", "inflight"],
    ) -> Future[SaveWeightsForSamplerResponse]:
        # Numbered at the call: the same body has to be built again for a retry.
        number: list[int] = []

        def build(seq: int) -> bytes:
            if name is None and not number:
                number.append(self._session.next_sampler())
            return _encode(
                SaveWeightsForSamplerRequest,
                model_id=self.model_id,
                seq_id=seq,
                path=name,
                sampling_session_seq_id=number[0] if number else None,
                kind=kind,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
            )

        return self._submit(
            "save_weights_for_sampler",
            "SaveWeightsForSampler",
            build,
            _reader(SaveWeightsForSamplerResponse),
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        *,
        kind: Literal["snapshot", "inflight"] = "snapshot",
    ) -> ClientFuture[SamplingClient]:
        """Sample from the weights as they are now. With a name they are kept as a checkpoint.

        >>> sampler = training_client.save_weights_and_get_sampling_client().result()
        ... # doctest: +SKIP
        """
        saved = self._save_for_sampler(name, None, None, kind)

        async def work() -> SamplingClient:
            response = await saved
            return await open_sampler(
                self._session,
                sampling_session_id=response.sampling_session_id,
                model_path=response.path if response.sampling_session_id is None else None,
                base_model=self._base_model(),
                retry=retry_config,
            )

        return ClientFuture(work(), self._runtime)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        *,
        kind: Literal["snapshot", "inflight"] = "snapshot",
    ) -> SamplingClient:
        """As `save_weights_and_get_sampling_client`."""
        return await self.save_weights_and_get_sampling_client(name, retry_config, kind=kind)

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> ClientFuture[SamplingClient]:
        """Sample from a saved checkpoint.

        >>> sampler = training_client.create_sampling_client(path).result()  # doctest: +SKIP
        """
        return ClientFuture(
            open_sampler(self._session, model_path=model_path, retry=retry_config), self._runtime
        )

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> SamplingClient:
        """As `create_sampling_client`."""
        return await self.create_sampling_client(model_path, retry_config)

    # ---- the model itself ----

    def get_info(self) -> GetInfoResponse:
        """The model's base, LoRA rank and optimizer, as they were when this client was made.

        >>> training_client.get_info().lora_rank  # doctest: +SKIP
        """
        return self._info

    async def get_info_async(self) -> GetInfoResponse:
        """As `get_info`."""
        return self._info

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer; transformers is imported here.

        >>> tokenizer = training_client.get_tokenizer()  # doctest: +SKIP
        """
        return load_tokenizer(self._server, self._base_model(), self._info.model_data.tokenizer_id)

    def _base_model(self) -> str:
        name = self._info.model_data.model_name or self._info.model_name
        if name is None:
            raise InvalidAnswerError("the server did not say which base model this is")
        return name

    def unload(self) -> Future[UnloadModelResponse]:
        """Free the model at the server, after the operations called before it.

        The run and its checkpoints stay; go on with `create_training_client_from_state...`. Its
        last state becomes one of them a while after the answer: `last_checkpoint` shows it then.

        >>> training_client.unload().result()  # doctest: +SKIP
        """
        self._check_open()
        self._closed = True

        async def work() -> UnloadModelResponse:
            await self._outbox.idle()
            self._outbox.end(closed("TrainingClient"))
            return await unload_model(self._server, self.model_id)

        return self._future(work())

    async def unload_async(self) -> Future[UnloadModelResponse]:
        """As `unload`."""
        return self.unload()

    async def _leave(self, *, giving_up: bool, after_error: bool = False) -> None:
        if not giving_up:
            await self._outbox.idle()
        self._outbox.end(closed("TrainingClient"))
        await tell_end(
            self._server,
            f"model {self.model_id}",
            lambda server: unload_model(server, self.model_id),
            after_error=after_error,
        )

    def close(self) -> None:
        """Free the model at the server now, giving up what is still waiting. Idempotent.

        A server that does not answer is left alone after some seconds: the model ends there with
        its session.

        >>> training_client.close()  # doctest: +SKIP
        """
        if not self._closed:
            self._closed = True
            self._future(self._leave(giving_up=True)).result()

    async def close_async(self) -> None:
        """As `close`."""
        if not self._closed:
            self._closed = True
            await self._future(self._leave(giving_up=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = error is not None
        if not self._closed:
            self._closed = True
            self._future(self._leave(giving_up=failed, after_error=failed)).result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = error is not None
        if not self._closed:
            self._closed = True
            await self._future(self._leave(giving_up=failed, after_error=failed))

    # ---- submitting ----

    def _check_open(self) -> None:
        if self._closed:
            raise closed("TrainingClient")
        if self._session.closed:
            raise closed("ServiceClient")

    def _future(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return Future(work, self._runtime)

    def _append(self, *operations: Operation) -> None:
        self._check_open()
        self._outbox.append(*operations)

    def _operation(
        self,
        path: str,
        request_type: str,
        build: Callable[[int], bytes],
        read: Callable[[Answer], Any],
        *,
        content_type: str = JSON_TYPE,
        protobuf: bool = False,
    ) -> Operation:
        return Operation(
            path,
            request_type,
            build,
            read,
            new_result(self._runtime.loop),
            content_type=content_type,
            protobuf_result=protobuf,
        )

    def _submit(
        self,
        path: str,
        request_type: str,
        build: Callable[[int], bytes],
        read: Callable[[Answer], T],
        *,
        await_timeout: float | None = None,
    ) -> Future[T]:
        build(1)  # what cannot be sent is an error of the call, and uses no number
        operation = self._operation(path, request_type, build, read)
        self._append(operation)

        async def work() -> T:
            try:
                async with asyncio.timeout(await_timeout):
                    result: T = await operation.result
            except TimeoutError:
                if isinstance(error := operation.error(), TimeoutError):
                    raise error from None
                raise AwaitTimeoutError(
                    f"{path} was not done after {await_timeout} s: it may still finish, and"
                    " operations called later follow it",
                    request_id=operation.request_id,
                ) from None
            return result

        return self._future(work())

    def _parts(self, data: Sequence[Datum]) -> list[Sequence[WireDatum]]:
        if not data:
            raise RequestError("data is empty: a batch has at least one datum")
        config = self._session.config
        return split(
            [datum.to_wire() for datum in data],
            max_datums=config.fwdbwd_max_chunk_len,
            max_bytes=config.fwdbwd_max_chunk_bytes_count,
        )

    def _batch_operation(
        self,
        part: Sequence[WireDatum],
        loss_fn: str,
        config: Mapping[str, float | str],
        *,
        forward_only: bool,
    ) -> Operation:
        def build(seq: int) -> bytes:
            return BatchRequest(
                self.model_id, seq, part, loss_fn, config, forward_only
            ).to_protobuf()

        return self._operation(
            "forward_backward",
            "Forward" if forward_only else "ForwardBackward",
            build,
            read_batch,
            content_type=PROTOBUF_TYPE,
            protobuf=True,
        )

    def _batch(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> Future[ForwardBackwardOutput]:
        config = dict(loss_fn_config or {})
        for name, value in config.items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise RequestError(
                    f"loss_fn_config {name!r} is a {type(value).__name__}: a number or a text is"
                    " expected"
                )
        operations = [
            self._batch_operation(part, loss_fn, config, forward_only=forward_only)
            for part in self._parts(list(data))
        ]
        self._append(*operations)
        return self._future(collect(operations))


async def collect(operations: Sequence[Operation]) -> ForwardBackwardOutput:
    """The one result of a batch's operations. Raises the error of the first that failed."""
    outcomes = await asyncio.gather(
        *(operation.result for operation in operations), return_exceptions=True
    )
    results: list[BatchResult] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    combined = combine(results)
    return ForwardBackwardOutput(
        combined.output_type,
        [
            {name: TensorData.of(tensor) for name, tensor in output.items()}
            for output in combined.outputs
        ],
        dict(combined.metrics),
    )


def read_batch(answer: Answer) -> BatchResult:
    """A forward's or forward_backward's result. Raises InvalidAnswerError."""
    try:
        if answer.is_protobuf:
            return BatchResult.from_protobuf(answer.content)
        return BatchResult.from_json(answer.json())
    except (InvalidMessageError, InvalidTensorError) as error:
        raise InvalidAnswerError(f"the result cannot be read: {error.message}") from None


def warn_of_pending(path: str, loaded: LoadWeightsResponse) -> None:
    """Say that a checkpoint was saved between a forward_backward and its optim_step."""
    if loaded.pending_forward_backwards:
        log.warning(
            "%s holds the gradients of %d forward_backward calls that no optim_step has applied:"
            " the next optim_step applies them too, so do not repeat those calls",
            path,
            loaded.pending_forward_backwards,
        )


async def unload_model(server: Server, model_id: str) -> UnloadModelResponse:
    """Free a model at the server; one that is not there any more is fine."""
    answer = await server.call(
        "POST",
        "unload_model",
        UnloadModelRequest(model_id=model_id),
        accept=frozenset({404, 405, 410}),
    )
    if answer.status >= 300:
        return UnloadModelResponse(model_id=model_id)
    body = answer.json()
    if isinstance(body, dict) and "request_id" in body and "model_id" not in body:
        return UnloadModelResponse(model_id=model_id)
    return read_as(UnloadModelResponse, {"model_id": model_id, **body})


def _encode(model: type[Body], **fields: Any) -> bytes:
    return json.dumps(check_body(model, fields).to_json()).encode()


@functools.cache
def _reader(model: type[Any]) -> Callable[[Answer], Any]:
    return lambda answer: answer.read(model)
