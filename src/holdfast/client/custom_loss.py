"""A loss of the caller's own, computed here between a forward and a forward_backward.

For a loss C of the log-probabilities, the gradient of sum(w * logp) with w = dC/dlogp is that of
C. cross_entropy is -sum(weights * logp), so its weights are -dC/dlogp.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast.client.outbox import Operation
from holdfast.client.types import Datum, ForwardBackwardOutput, TensorData
from holdfast.protocol.batches import BatchRequest
from holdfast.protocol.data import Datum as WireDatum
from holdfast.protocol.errors import RequestError
from holdfast.protocol.tensors import Tensor

if TYPE_CHECKING:
    import torch

    CustomLoss = Callable[
        [list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]
    ]

FAILED_LOSS = "custom_loss_failed"
"""A loss that no server knows: its refusal keeps the next optim_step from a part of a batch."""


class Deferred:
    """The backward part of a batch, whose weights come later. It keeps its place in the order."""

    def __init__(self, model_id: str, part: Sequence[WireDatum]) -> None:
        self.part = part
        self.ready = asyncio.Event()
        self._model_id = model_id
        self._data: Sequence[WireDatum] = ()
        self._loss_fn = FAILED_LOSS

    def build(self, seq: int) -> bytes:
        return BatchRequest(self._model_id, seq, self._data, self._loss_fn).to_protobuf()

    def go(self, weights: Sequence[Tensor]) -> None:
        self._data = [
            replace(
                datum,
                loss_fn_inputs={
                    "target_tokens": datum.loss_fn_inputs["target_tokens"],
                    "weights": weight,
                },
            )
            for datum, weight in zip(self.part, weights, strict=True)
        ]
        self._loss_fn = "cross_entropy"
        self.ready.set()

    def fail(self) -> None:
        """Send, in its place, a forward_backward that is refused."""
        self._data = self.part[:1]
        self.ready.set()


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """What the server needs of the data: target_tokens, and weights that cross_entropy takes.

    Raises RequestError for a datum without target_tokens.
    """
    needed: list[Datum] = []
    for i, datum in enumerate(data):
        inputs = datum.loss_fn_inputs
        if "target_tokens" not in inputs:
            raise RequestError(f"datum {i} has no target_tokens, whose logprobs the loss takes")
        targets: TensorData = inputs["target_tokens"]
        weights = inputs.get("weights")
        if weights is None:
            size = targets.tensor.size
            weights = TensorData.of(Tensor("float32", targets.tensor.shape, bytes(4 * size)))
        needed.append(Datum(datum.model_input, {"target_tokens": targets, "weights": weights}))
    return needed


def require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise RequestError("forward_backward_custom needs torch, which is not installed")


async def run(
    data: list[Datum],
    loss_fn: CustomLoss,
    forwards: Sequence[Operation],
    backwards: Sequence[tuple[Operation, Deferred]],
) -> ForwardBackwardOutput:
    """Forward, the caller's loss, backward. The metrics are the caller's and both losses."""
    from holdfast.client.training import collect

    try:
        forward = await collect(forwards)
        loss, metrics, weights = await asyncio.to_thread(_differentiate, data, loss_fn, forward)
    except BaseException:
        for _, deferred in backwards:
            deferred.fail()
        raise
    start = 0
    for _, deferred in backwards:
        end = start + len(deferred.part)
        deferred.go(weights[start:end])
        start = end
    backward = await collect([operation for operation, _ in backwards])
    combined = {**metrics, "loss:sum": loss}
    if "loss:sum" in backward.metrics:
        combined["surrogate_loss:sum"] = backward.metrics["loss:sum"]
    return ForwardBackwardOutput(backward.loss_fn_output_type, backward.loss_fn_outputs, combined)


def _differentiate(
    data: list[Datum], loss_fn: CustomLoss, forward: ForwardBackwardOutput
) -> tuple[float, dict[str, float], list[Tensor]]:
    import torch

    logprobs: list[torch.Tensor] = []
    for i, output in enumerate(forward.loss_fn_outputs):
        if "logprobs" not in output:
            raise RequestError(f"the forward gave no logprobs for datum {i}")
        logprobs.append(output["logprobs"].to_torch().clone().requires_grad_(True))
    loss, metrics = loss_fn(data, logprobs)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise RequestError("the custom loss must return a tensor of one value and its metrics")
    gradients: Sequence[Any] = torch.autograd.grad(
        loss, logprobs, allow_unused=True, retain_graph=False
    )
    weights = [
        TensorData.from_torch(torch.zeros_like(lp) if gradient is None else -gradient).tensor
        for lp, gradient in zip(logprobs, gradients, strict=True)
    ]
    return float(loss.detach()), {name: float(v) for name, v in metrics.items()}, weights
