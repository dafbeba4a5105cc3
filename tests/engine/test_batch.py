"""Losses by their formulas; batches that cannot be trained on are refused by name and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from holdfast.engine.core import Core
from holdfast.engine.interface import EngineError
from holdfast.engine.payload import Array, Batch, Datum, ForwardOutput
from tests.engine.conftest import MakeCore
from tests.engine.helpers import VOCAB, make_batch, run_config

N = 20


@pytest.fixture
def core(make_core: MakeCore) -> Core:
    core = make_core("llama")
    core.create("run", run_config())
    return core


def policy_batch(loss: str, config: dict[str, float], **extra: Array) -> Batch:
    rng = np.random.default_rng(3)
    inputs: dict[str, Array] = {
        "target_tokens": rng.integers(0, VOCAB, N).astype(np.int64),
        "logprobs": rng.normal(-4.5, 0.6, N).astype(np.float32),
        "advantages": rng.normal(size=N).astype(np.float32),
        **extra,
    }
    return Batch([Datum(rng.integers(0, VOCAB, N).astype(np.int32), inputs)], loss, dict(config))


def expected(
    loss: str, p: Array, q: Array, a: Array, low: Array, high: Array, beta: float
) -> float:
    """The sums as the table of losses gives them, in float64."""
    ratio = np.exp(p - q)
    clipped = np.clip(ratio, low, high)
    terms = {
        "importance_sampling": ratio * a,
        "ppo": np.minimum(ratio * a, clipped * a),
        "cispo": clipped * p * a,
        "dro": p * a - 0.5 * beta * (p - q) ** 2,
    }
    return -float(terms[loss].sum())


LOW = np.linspace(0.2, 0.9, N).astype(np.float32)
HIGH = np.linspace(1.0, 3.0, N).astype(np.float32)


@pytest.mark.parametrize(
    ("loss", "config", "extra"),
    [
        ("importance_sampling", {}, {}),
        ("ppo", {}, {}),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}, {}),
        ("ppo", {}, {"clip_low_threshold": LOW, "clip_high_threshold": HIGH}),
        ("cispo", {}, {}),
        ("cispo", {"clip_high_threshold": 1.5}, {"clip_low_threshold": LOW}),
        ("dro", {}, {}),
        ("dro", {"beta": 0.7}, {}),
    ],
)
def test_policy_losses(
    loss: str, config: dict[str, float], extra: dict[str, Array], core: Core
) -> None:
    batch = policy_batch(loss, config, **extra)
    output = ForwardOutput.decode(core.forward("run", batch.encode()))
    inputs = batch.data[0].inputs
    p, q = output.outputs[0]["logprobs"].astype(np.float64), inputs["logprobs"].astype(np.float64)
    low = extra.get("clip_low_threshold", np.full(N, config.get("clip_low_threshold", 0.8)))
    high = extra.get("clip_high_threshold", np.full(N, config.get("clip_high_threshold", 1.2)))
    wanted = expected(
        loss, p, q, inputs["advantages"].astype(np.float64), low, high, config.get("beta", 0.05)
    )
    assert output.metrics["loss:sum"] == pytest.approx(wanted, rel=1e-5)


def gradient(core: Core, batch: Batch) -> Array:
    core.create("run", run_config())
    core.forward_backward("run", 0, batch.encode())
    grads = core._runs["run"].grads
    assert grads is not None
    return grads.numpy().copy()


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_gradients_of_policy_losses_are_those_of_weighted_cross_entropy(
    loss: str, core: Core
) -> None:
    """d loss / d logp, derived by hand, as the weights of a cross_entropy."""
    batch = policy_batch(loss, {})
    inputs = batch.data[0].inputs
    output = ForwardOutput.decode(core.forward("run", batch.encode()))
    p, q = output.outputs[0]["logprobs"].astype(np.float64), inputs["logprobs"].astype(np.float64)
    a = inputs["advantages"].astype(np.float64)
    ratio = np.exp(p - q)
    clipped = np.clip(ratio, 0.8, 1.2)
    weights = {
        "importance_sampling": ratio * a,
        "ppo": np.where((ratio * a <= clipped * a), ratio * a, 0.0),
        "cispo": clipped * a,
        "dro": a - 0.05 * (p - q),
    }[loss]
    assert loss != "ppo" or 0 < (weights == 0).sum() < N
    plain = Batch(
        [
            Datum(
                batch.data[0].tokens,
                {
                    "target_tokens": inputs["target_tokens"],
                    "weights": weights.astype(np.float32),
                },
            )
        ],
        "cross_entropy",
    )
    ours, theirs = gradient(core, batch), gradient(core, plain)
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_zero_datums_give_an_empty_result(core: Core) -> None:
    output = ForwardOutput.decode(
        core.forward_backward("run", 0, Batch([], "cross_entropy").encode())
    )
    assert output.outputs == [] and output.metrics == {"loss:sum": 0.0}
    assert core._runs["run"].info.pending_forward_backwards == 1


Mutation = Callable[[Datum], Datum]


def with_input(name: str, change: Callable[[Array], Array]) -> Mutation:
    return lambda d: dataclasses.replace(d, inputs={**d.inputs, name: change(d.inputs[name])})


def put(at: int, value: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array = array.copy()
        array[at] = value
        return array

    return change


MISTAKES: dict[str, tuple[Mutation, str, str]] = {
    "token outside": (
        lambda d: dataclasses.replace(d, tokens=put(3, VOCAB)(d.tokens)),
        "token_out_of_range",
        r"datum 1: tokens\[3\] is 97, outside .* 97 tokens \(0 to 96\)",
    ),
    "negative token": (
        lambda d: dataclasses.replace(d, tokens=put(0, -1)(d.tokens)),
        "token_out_of_range",
        r"tokens\[0\] is -1",
    ),
    "target outside": (
        with_input("target_tokens", put(2, -100)),
        "token_out_of_range",
        r"target_tokens\[2\] is -100",
    ),
    "no tokens": (
        lambda d: dataclasses.replace(d, tokens=d.tokens[:0]),
        "invalid_batch",
        "Datum 1 has no tokens",
    ),
    "float tokens": (
        lambda d: dataclasses.replace(d, tokens=d.tokens.astype(np.float32)),
        "invalid_batch",
        "dtype float32; token ids are integers",
    ),
    "two-dimensional tokens": (
        lambda d: dataclasses.replace(d, tokens=d.tokens[None]),
        "invalid_batch",
        r"tokens have shape \(1, 24\)",
    ),
    "short targets": (
        with_input("target_tokens", lambda a: a[:-1]),
        "invalid_batch",
        r"target_tokens have shape \(23,\); for 24 tokens \(24,\)",
    ),
    "short weights": (
        with_input("weights", lambda a: a[:-1]),
        "invalid_batch",
        r"weights has shape \(23,\)",
    ),
    "NaN weight": (
        with_input("weights", put(5, np.nan)),
        "invalid_batch",
        r"weights\[5\] is nan",
    ),
    "infinite weight": (
        with_input("weights", put(0, -np.inf)),
        "invalid_batch",
        r"weights\[0\] is -inf",
    ),
    "weight beyond float32": (
        with_input("weights", lambda a: put(1, 1e300)(a.astype(np.float64))),
        "invalid_batch",
        r"weights\[1\] is 1e\+300",
    ),
    "logical weights": (
        with_input("weights", lambda a: a > 0),
        "invalid_batch",
        "weights has dtype bool",
    ),
    "missing weights": (
        lambda d: dataclasses.replace(d, inputs={"target_tokens": d.inputs["target_tokens"]}),
        "invalid_batch",
        "Datum 1 lacks 'weights', which the loss 'cross_entropy' needs",
    ),
    "unknown input": (
        lambda d: dataclasses.replace(d, inputs={**d.inputs, "advantages": d.inputs["weights"]}),
        "invalid_batch",
        "'advantages', which the loss 'cross_entropy' does not know",
    ),
    "too long": (
        lambda d: make_batch(0, (601,)).data[0],
        "sequence_too_long",
        "Datum 1 has 601 tokens; the model takes at most 600",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_datum(mistake: str, core: Core) -> None:
    mutate, code, message = MISTAKES[mistake]
    good = make_batch(0)
    data = list(good.data)
    data[1] = mutate(data[1])
    bad = dataclasses.replace(good, data=data)
    with pytest.raises(EngineError, match=message) as caught:
        core.forward("run", bad.encode())
    assert (caught.value.code, caught.value.category) == (code, "user")
    assert core.forward("run", good.encode())  # Later operations still work.


@pytest.mark.parametrize(
    ("batch", "code", "message"),
    [
        (
            dataclasses.replace(make_batch(0), loss_fn="gspo"),
            "unknown_loss",
            "'gspo'; known are cross_entropy, importance_sampling, ppo, cispo, dro",
        ),
        (
            dataclasses.replace(make_batch(0), loss_fn_config={"beta": 1.0}),
            "invalid_loss_config",
            "'cross_entropy' has no setting 'beta'; its settings: none",
        ),
        (policy_batch("dro", {"beta": float("nan")}), "invalid_loss_config", "'beta' is nan"),
        (
            dataclasses.replace(policy_batch("dro", {}), loss_fn_config={"beta": "much"}),
            "invalid_loss_config",
            "'beta' is 'much'; it must be a number",
        ),
    ],
)
def test_mistakes_in_the_loss(batch: Batch, code: str, message: str, core: Core) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        core.forward("run", batch.encode())
    assert (caught.value.code, caught.value.category) == (code, "user")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        b"{}",
        make_batch(0).encode()[:-3],
        make_batch(0).encode()[:40],
        make_batch(0).encode().replace(b"holdfast.batch.1", b"holdfast.batch.9"),
        make_batch(0).encode().replace(b"1.tokens", b"9.tokens"),
        make_batch(0).encode().replace(b"1.tokens", b"x.tokens"),
        make_batch(0).encode().replace(b"1.tokens", b"tokens.1"),
        make_batch(0).encode().replace(b'\\"count\\":4', b'\\"count\\":3'),
        make_batch(0).encode().replace(b'\\"count\\":4', b'\\"count\\":[]'),
    ],
    ids=range(12),
)
def test_bodies_that_are_no_batch(body: bytes, core: Core) -> None:
    with pytest.raises(EngineError) as caught:
        core.forward("run", body)
    assert (caught.value.code, caught.value.category) == ("invalid_batch", "user")
