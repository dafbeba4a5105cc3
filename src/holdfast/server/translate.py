"""Between the wire's messages and the engine's."""

from __future__ import annotations

import secrets

import numpy as np

from holdfast.engine.payload import (
    Array,
    ForwardOutput,
    SampledSequence,
    SampleOutput,
    SampleRequest,
    Stored,
    TopK,
    encode_batch,
)
from holdfast.protocol import samples
from holdfast.protocol.batches import BatchRequest, BatchResult
from holdfast.protocol.data import text_tokens
from holdfast.protocol.errors import InvalidMessageError, InvalidTensorError
from holdfast.protocol.sampling import SampleRequest as WireSampleRequest
from holdfast.protocol.tensors import Tensor

MOST_ELEMENTS = 1 << 24
"""Elements that one tensor of a batch may have when its zeros are filled in."""


def batch_body(request: BatchRequest) -> bytes:
    """The engine's batch. Raises RequestError for images and for tensors that are too large."""
    data = []
    for index, datum in enumerate(request.data):
        try:
            tokens = text_tokens(datum.model_input)
            inputs = {name: _stored(tensor) for name, tensor in datum.loss_fn_inputs.items()}
        except (InvalidMessageError, InvalidTensorError) as error:
            raise type(error)(f"datum {index}: {error.message}") from None
        data.append((Stored("I32", (len(tokens) // 4,), tokens), inputs))
    return encode_batch(data, request.loss_fn, request.loss_fn_config)


_CODES = {"float32": "F32", "int64": "I64", "int32": "I32"}


def _stored(tensor: Tensor) -> Stored:
    dense = tensor.dense(max_elements=MOST_ELEMENTS)
    return Stored(_CODES[dense.dtype], dense.shape, dense.data)


def batch_result(body: bytes) -> BatchResult:
    """The wire's result of a forward or forward_backward."""
    output = ForwardOutput.decode(body)
    return BatchResult(
        outputs=[
            {name: Tensor.from_numpy(value) for name, value in item.items()}
            for item in output.outputs
        ],
        metrics=dict(output.metrics),
    )


def sample_body(request: WireSampleRequest) -> bytes:
    """The engine's sampling request; a missing seed is drawn, so that the body fixes its result."""
    params = request.sampling_params
    targets = request.target_prompt_logprobs
    stop = params.stop
    return SampleRequest(
        prompt=np.frombuffer(text_tokens(request.prompt), dtype="<i4"),
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        stop=[stop] if isinstance(stop, str) else stop,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        prompt_logprobs=request.prompt_logprobs,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        target_prompt_tokens=None
        if targets is None
        else targets.to_numpy(max_elements=MOST_ELEMENTS).astype(np.int64),
    ).encode()


def sample_result(body: bytes) -> samples.SampleResult:
    """The wire's result of a sampling request."""
    output = SampleOutput.decode(body)
    return samples.SampleResult(
        sequences=[_sequence(sequence) for sequence in output.sequences],
        prompt_logprobs=_tensor(output.prompt_logprobs),
        topk_prompt_logprobs=_topk(output.topk_prompt),
        target_prompt_logprobs=_tensor(output.target_prompt_logprobs),
        prompt_alt_tokens=None
        if output.prompt_alt is None
        else Tensor.from_numpy(output.prompt_alt.tokens),
        prompt_alt_logprobs=None
        if output.prompt_alt is None
        else Tensor.from_numpy(output.prompt_alt.logprobs),
    )


def _sequence(sequence: SampledSequence) -> samples.SampledSequence:
    return samples.SampledSequence(
        tokens=Tensor.from_numpy(sequence.tokens),
        stop_reason="stop" if sequence.stop_reason == "stop" else "length",
        logprobs=Tensor.from_numpy(sequence.logprobs),
        topk=_topk(sequence.topk),
    )


def _tensor(value: Array | None) -> Tensor | None:
    return None if value is None else Tensor.from_numpy(value)


def _topk(value: TopK | None) -> samples.TopK | None:
    if value is None:
        return None
    return samples.TopK(Tensor.from_numpy(value.tokens), Tensor.from_numpy(value.logprobs))
