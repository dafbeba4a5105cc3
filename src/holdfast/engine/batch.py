"""Checks a batch against the model and the loss, and turns it into tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdfast.engine.interface import EngineError
from holdfast.engine.losses import LOSSES, Loss
from holdfast.engine.payload import Array, Batch, Datum, PayloadError


@dataclass(frozen=True, slots=True)
class Sequence:
    """One datum, checked."""

    tokens: Tensor
    """int64 [N]"""
    targets: Tensor
    """int64 [N] or [N, K]"""
    inputs: Mapping[str, Tensor]
    """float32, in the shape of `targets`."""


@dataclass(frozen=True, slots=True)
class CheckedBatch:
    loss: Loss
    sequences: list[Sequence]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence.tokens) for sequence in self.sequences]


def check(body: bytes, *, vocab_size: int, max_length: int) -> CheckedBatch:
    """Decode and check the body of a forward or forward_backward.

    Raises EngineError of category user that names the datum, the value and what would be right.
    """
    try:
        batch = Batch.decode(body)
    except PayloadError as error:
        raise EngineError("invalid_batch", f"The batch cannot be read: {error}") from error
    loss = LOSSES.get(batch.loss_fn)
    if loss is None:
        known = ", ".join(LOSSES)
        raise EngineError(
            "unknown_loss", f"Unknown loss function {batch.loss_fn!r}; known are {known}."
        )
    config = _settings(batch.loss_fn, loss, batch.loss_fn_config)
    sequences = []
    for index, datum in enumerate(batch.data):
        where = f"datum {index}"
        tokens = _tokens(where, datum.tokens, vocab_size, max_length)
        sequences.append(_sequence(where, datum, tokens, batch.loss_fn, loss, config, vocab_size))
    return CheckedBatch(loss, sequences)


def check_tokens(where: str, tokens: Array, vocab_size: int, max_length: int) -> Tensor:
    """Check a sequence of token ids and give it as int64 [N]."""
    return _tokens(where, tokens, vocab_size, max_length)


def check_token_ids(where: str, ids: Array, vocab_size: int) -> None:
    """Refuse values that are no integers or outside the vocabulary."""
    if ids.dtype.kind not in "iu":
        raise _invalid(f"{where} has dtype {ids.dtype}; token ids are integers.")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        place = np.unravel_index(int(outside.argmax()), ids.shape)
        at = ", ".join(str(int(i)) for i in place)
        raise EngineError(
            "token_out_of_range",
            f"{where}[{at}] is {int(ids[place])}, outside the model's vocabulary of "
            f"{vocab_size} tokens (0 to {vocab_size - 1}).",
        )


def _invalid(message: str) -> EngineError:
    return EngineError("invalid_batch", message[0].upper() + message[1:])


def _settings(name: str, loss: Loss, given: Mapping[str, float | str]) -> dict[str, float]:
    settings = dict(loss.config)
    for key, value in given.items():
        if key not in settings:
            known = ", ".join(settings) or "none"
            raise EngineError(
                "invalid_loss_config",
                f"The loss {name!r} has no setting {key!r}; its settings: {known}.",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EngineError(
                "invalid_loss_config", f"The setting {key!r} is {value!r}; it must be a number."
            )
        if not math.isfinite(value):
            raise EngineError(
                "invalid_loss_config", f"The setting {key!r} is {value}; it must be finite."
            )
        settings[key] = float(value)
    return settings


def _tokens(where: str, tokens: Array, vocab_size: int, max_length: int) -> Tensor:
    if tokens.ndim != 1:
        raise _invalid(f"{where}: tokens have shape {tokens.shape}; one dimension is expected.")
    if len(tokens) == 0:
        raise _invalid(f"{where} has no tokens; at least one is needed.")
    if len(tokens) > max_length:
        raise EngineError(
            "sequence_too_long",
            f"{where[0].upper()}{where[1:]} has {len(tokens)} tokens; the model takes at most "
            f"{max_length}.",
        )
    check_token_ids(f"{where}: tokens", tokens, vocab_size)
    return torch.from_numpy(tokens.astype(np.int64))


def _sequence(
    where: str,
    datum: Datum,
    tokens: Tensor,
    name: str,
    loss: Loss,
    config: Mapping[str, float],
    vocab_size: int,
) -> Sequence:
    expected = {"target_tokens", *loss.required}
    if missing := sorted(expected - datum.inputs.keys()):
        raise _invalid(f"{where} lacks {missing[0]!r}, which the loss {name!r} needs.")
    if unknown := sorted(datum.inputs.keys() - expected - config.keys()):
        known = ", ".join(sorted(expected | config.keys()))
        raise _invalid(
            f"{where} has the input {unknown[0]!r}, which the loss {name!r} does not know; "
            f"its inputs: {known}."
        )
    targets = datum.inputs["target_tokens"]
    dimensions = (1, 2) if loss.wide else (1,)
    if targets.ndim not in dimensions or len(targets) != len(tokens) or targets.size == 0:
        shape = f"({len(tokens)},)" + (f" or ({len(tokens)}, K)" if loss.wide else "")
        raise _invalid(
            f"{where}: target_tokens have shape {targets.shape}; for {len(tokens)} tokens "
            f"{shape} is expected."
        )
    check_token_ids(f"{where}: target_tokens", targets, vocab_size)
    inputs = {
        key: _numbers(where, key, datum.inputs[key], targets.shape)
        for key in (*loss.required, *config)
        if key in datum.inputs
    }
    for key, value in config.items():
        inputs.setdefault(key, torch.full(targets.shape, value, dtype=torch.float32))
    return Sequence(tokens, torch.from_numpy(targets.astype(np.int64)), inputs)


def _numbers(where: str, key: str, value: Array, shape: tuple[int, ...]) -> Tensor:
    if value.shape != shape:
        raise _invalid(f"{where}: {key} has shape {value.shape}; target_tokens have {shape}.")
    if value.dtype.kind not in "fiu":
        raise _invalid(f"{where}: {key} has dtype {value.dtype}; numbers are expected.")
    with np.errstate(over="ignore"):
        numbers = value.astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        place = np.unravel_index(int(finite.argmin()), shape)
        at = ", ".join(str(int(i)) for i in place)
        raise _invalid(
            f"{where}: {key}[{at}] is {value[place]}; every value must be finite in float32."
        )
    return torch.from_numpy(numbers)
