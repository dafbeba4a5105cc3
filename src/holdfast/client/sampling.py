"""Sampling from a base model or from saved weights."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from holdfast.client.futures import Future
from holdfast.client.http import Answer, RetryConfig, Server
from holdfast.client.polling import poll
from holdfast.client.session import Session
from holdfast.client.tokenizers import load_tokenizer
from holdfast.client.types import (
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from holdfast.protocol.bodies import check_body
from holdfast.protocol.errors import (
    InvalidAnswerError,
    InvalidMessageError,
    InvalidTensorError,
    RequestError,
    ResultLostError,
)
from holdfast.protocol.futures import FutureHandle
from holdfast.protocol.samples import SampleResult
from holdfast.protocol.sampling import (
    CreateSamplingSessionRequest,
    CreateSamplingSessionResponse,
    GetSamplerResponse,
    SampleRequest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_IN_FLIGHT = 1024
_SUBMITTING = 8
_POLLING = 24
_RESUBMISSIONS = 5


class SamplingClient:
    """Samples from fixed weights; made by a ServiceClient or a TrainingClient.

    >>> prompt = ModelInput.from_ints(tokenizer.encode("3 March 2024"))  # doctest: +SKIP
    >>> params = SamplingParams(max_tokens=16, temperature=0.0)  # doctest: +SKIP
    >>> sampler.sample(prompt, 1, params).result().sequences[0].tokens  # doctest: +SKIP
    """

    def __init__(self, session: Session, server: Server, sampler_id: str, base_model: str) -> None:
        self._session = session
        self._server = server
        self._runtime = server.runtime
        self._base_model = base_model
        self._numbers = itertools.count()
        self._in_flight = asyncio.Semaphore(_IN_FLIGHT)
        self._submitting = asyncio.Semaphore(_SUBMITTING)
        self._polling = asyncio.Semaphore(_POLLING)
        self.sampling_session_id = sampler_id

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[SampleResponse]:
        """Continue a prompt `num_samples` times.

        >>> sampler.sample(prompt, 4, SamplingParams(max_tokens=8)).result()  # doctest: +SKIP
        """
        request = check_body(
            SampleRequest,
            {
                "prompt": prompt.to_wire(),
                "num_samples": num_samples,
                "sampling_params": sampling_params,
                "sampling_session_id": self.sampling_session_id,
                "prompt_logprobs": include_prompt_logprobs,
                "topk_prompt_logprobs": topk_prompt_logprobs,
                "topk_sample_logprobs": topk_sample_logprobs,
                "target_prompt_logprobs": (
                    None if target_prompt_logprobs is None else target_prompt_logprobs.tensor
                ),
                "prompt_alt_tokens_k": prompt_alt_tokens_k,
                "prompt_logprobs_last_n": prompt_logprobs_last_n,
            },
        )
        return self._future(self._sample(request))

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        """As `sample`, to its result."""
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> Future[list[float | None]]:
        """The log-probability of each prompt token given those before it; the first has none.

        >>> sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3])).result()  # doctest: +SKIP
        """
        sampled = self.sample(
            prompt,
            1,
            SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )

        async def work() -> list[float | None]:
            response = await sampled
            if response.prompt_logprobs is None:
                raise InvalidAnswerError("the server answered a sample without prompt_logprobs")
            return response.prompt_logprobs

        return self._future(work())

    async def compute_logprobs_async(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        """As `compute_logprobs`, to its result."""
        return await self.compute_logprobs(prompt, prompt_logprobs_last_n)

    def get_base_model(self) -> str:
        """The name of the base model.

        >>> sampler.get_base_model()  # doctest: +SKIP
        """
        return self._base_model

    async def get_base_model_async(self) -> str:
        """As `get_base_model`."""
        return self._base_model

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer; transformers is imported here.

        >>> tokenizer = sampler.get_tokenizer()  # doctest: +SKIP
        """
        return load_tokenizer(self._server, self._base_model, None)

    def _future(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return Future(work, self._runtime)

    async def _sample(self, request: SampleRequest) -> SampleResponse:
        async with self._in_flight:
            for _ in range(_RESUBMISSIONS):
                try:
                    return await self._sample_once(request)
                except ResultLostError:
                    # Sampling changes nothing: what the server lost is asked for anew.
                    continue
            return await self._sample_once(request)

    async def _sample_once(self, request: SampleRequest) -> SampleResponse:
        numbered = request.model_copy(update={"seq_id": next(self._numbers)})
        async with self._submitting:
            content = json.dumps(numbered.to_json()).encode()
            answer = await self._server.call("POST", "asample", content=content)
        handle = answer.read(FutureHandle)
        async with self._polling:
            return await poll(
                self._server,
                handle.request_id,
                "Sample",
                lambda found: read_sample(found, handle.sample_sequence_ids),
                protobuf=True,
                lane="sample",
            )


def read_sample(answer: Answer, ids: list[str] | None) -> SampleResponse:
    """A sample's result. Raises InvalidAnswerError."""
    try:
        if answer.is_protobuf:
            result = SampleResult.from_protobuf(answer.content)
        else:
            result = SampleResult.from_json(answer.json())
    except (InvalidMessageError, InvalidTensorError) as error:
        raise InvalidAnswerError(f"the result cannot be read: {error.message}") from None
    sequences = [
        SampledSequence(
            tokens=sequence.tokens.values(),
            logprobs=None if sequence.logprobs is None else sequence.logprobs.values(),
            stop_reason=sequence.stop_reason,
            topk_logprobs=None if sequence.topk is None else sequence.topk.rows(),
            sequence_id=ids[i] if ids is not None and i < len(ids) else None,
        )
        for i, sequence in enumerate(result.sequences)
    ]
    prompt = result.prompt_logprobs
    target = result.target_prompt_logprobs
    alternatives = result.prompt_alt_tokens
    alternative_logprobs = result.prompt_alt_logprobs
    return SampleResponse(
        sequences=sequences,
        prompt_logprobs=(
            None if prompt is None else [v if v == v else None for v in prompt.values()]
        ),
        topk_prompt_logprobs=(
            None if result.topk_prompt_logprobs is None else result.topk_prompt_logprobs.rows()
        ),
        target_prompt_logprobs=None if target is None else TensorData.of(target),
        prompt_alt_tokens=None if alternatives is None else TensorData.of(alternatives),
        prompt_alt_logprobs=(
            None if alternative_logprobs is None else TensorData.of(alternative_logprobs)
        ),
        prompt_cache_hit_tokens=result.prompt_cache_hit_tokens,
    )


async def open_sampler(
    session: Session,
    *,
    model_path: str | None = None,
    base_model: str | None = None,
    sampling_session_id: str | None = None,
    retry: RetryConfig | None = None,
) -> SamplingClient:
    """A sampling client of weights at a path, of a base model, or of an open sampling session."""
    server = session.server
    if retry is not None:
        server = server.with_retry(retry)
    if sampling_session_id is None:
        if (model_path is None) == (base_model is None):
            raise RequestError("give model_path or base_model, one of them")
        answer = await server.call(
            "POST",
            "create_sampling_session",
            check_body(
                CreateSamplingSessionRequest,
                {
                    "session_id": await session.id(),
                    "sampling_session_seq_id": session.next_sampler(),
                    "model_path": model_path,
                    "base_model": base_model,
                },
            ),
        )
        sampling_session_id = answer.read(CreateSamplingSessionResponse).sampling_session_id
    if base_model is None:
        found = await server.call("GET", f"samplers/{quote(sampling_session_id, safe=':')}")
        base_model = found.read(GetSamplerResponse).base_model
    return SamplingClient(session, server, sampling_session_id, base_model)
