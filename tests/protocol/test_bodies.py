"""JSON bodies: what each client family sends is read; mistakes are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from holdfast.protocol import checkpoints, futures, rest, sampling, sessions, training
from holdfast.protocol.bodies import Body, check_body, read_body, read_json
from holdfast.protocol.errors import InvalidMessageError

MODELS: list[type[Body]] = sorted(
    {
        value
        for module in (checkpoints, futures, rest, sampling, sessions, training)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Body) and value is not Body
    },
    key=lambda model: model.__name__,
)

# As sent by the Elixir client: nulls spelled out, no `type` in some, whole numbers for floats.
ELIXIR: list[tuple[type[Body], str]] = [
    (
        sessions.CreateSessionRequest,
        '{"project_id":null,"sdk_version":"0.15.0","tags":["tinkex-elixir"],'
        '"type":"create_session","user_metadata":null}',
    ),
    (sessions.SessionHeartbeatRequest, '{"session_id":"S"}'),
    (
        training.CreateModelRequest,
        '{"base_model":"b","lora_config":{"rank":32,"seed":null,"train_attn":true,'
        '"train_mlp":true,"train_unembed":true},"model_seq_id":0,"session_id":"S",'
        '"type":"create_model","user_metadata":null}',
    ),
    (
        training.OptimStepRequest,
        '{"adam_params":{"beta1":0.9,"beta2":0.95,"eps":1.0e-12,"learning_rate":1},'
        '"model_id":"M","seq_id":2}',
    ),
    (
        checkpoints.SaveWeightsRequest,
        '{"model_id":"M","path":"n","seq_id":3,"ttl_seconds":null,"type":"save_weights"}',
    ),
    (
        checkpoints.SaveWeightsForSamplerRequest,
        '{"model_id":"M","path":null,"sampling_session_seq_id":0,"seq_id":4,"ttl_seconds":null,'
        '"type":"save_weights_for_sampler"}',
    ),
    (
        checkpoints.LoadWeightsRequest,
        '{"model_id":"M","optimizer":true,"path":"tinker://M/weights/n","seq_id":1,'
        '"type":"load_weights"}',
    ),
    (
        sampling.CreateSamplingSessionRequest,
        '{"base_model":null,"model_path":"tinker://M/sampler_weights/n",'
        '"sampling_session_seq_id":1,"session_id":"S","type":"create_sampling_session"}',
    ),
    (
        sampling.SampleRequest,
        '{"num_samples":1,"prompt":{"chunks":[{"tokens":[1,2],"type":"encoded_text"}]},'
        '"sampling_params":{"max_tokens":3,"temperature":1,"top_k":-1,"top_p":1},'
        '"sampling_session_id":"S:sample:0","seq_id":0}',
    ),
]

PYTHON: list[tuple[type[Body], str]] = [
    (
        checkpoints.LoadWeightsRequest,
        '{"session_id":"S","model_seq_id":1,"path":"tinker://R/weights/N","optimizer":false,'
        '"type":"load_weights"}',
    ),
    (
        training.CreateModelRequest,
        '{"session_id":"S","model_seq_id":0,"base_model":"org/model","user_metadata":{"run":1},'
        '"optimizer_config":{"type":"dimuon","version":1},"type":"create_model"}',
    ),
    (
        sampling.SampleRequest,
        '{"num_samples":2,"prompt":{"chunks":[{"tokens":[1,2],"type":"encoded_text"}]},'
        '"sampling_params":{"max_tokens":3,"seed":1,"stop":[5],"temperature":1.0,"top_k":-1,'
        '"top_p":1.0},"sampling_session_id":"S:sample:0","seq_id":951067933000000000,'
        '"prompt_logprobs":false,"topk_prompt_logprobs":0,"type":"sample"}',
    ),
    (
        training.OptimStepRequest,
        '{"model_id":"M","seq_id":2,"optimizer_params":{"type":"dimuon","learning_rate":0.1}}',
    ),
    (
        sessions.TelemetryRequest,
        '{"events":[{"event":"GENERIC_EVENT"}],"platform":"Linux","session_id":"S"}',
    ),
]


@pytest.mark.parametrize(("model", "text"), ELIXIR + PYTHON)
def test_what_clients_send_is_read_and_written_back(model: type[Body], text: str) -> None:
    body = read_body(model, text)
    again = check_body(model, body.to_json())
    assert again == body
    assert None not in body.to_json().values()


def test_values_survive_reading() -> None:
    body = read_body(training.CreateModelRequest, PYTHON[1][1])
    assert body.user_metadata == {"run": "1"}
    assert body.optimizer_config.to_json() == {"type": "dimuon", "version": 1}
    assert body.lora_config == training.LoraConfig(rank=32)


def test_a_load_is_for_a_living_model_or_creates_one() -> None:
    assert not read_body(checkpoints.LoadWeightsRequest, ELIXIR[6][1]).creates
    assert read_body(checkpoints.LoadWeightsRequest, PYTHON[0][1]).creates
    for wrong in (
        {"path": "p", "optimizer": True},
        {"path": "p", "optimizer": True, "model_id": "M"},
        {"path": "p", "optimizer": True, "model_id": "M", "seq_id": 1, "session_id": "S"},
        {"path": "p", "optimizer": True, "session_id": "S"},
    ):
        with pytest.raises(InvalidMessageError, match="model_id and seq_id"):
            check_body(checkpoints.LoadWeightsRequest, wrong)


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (training.LoraConfig, {"rank": "8"}, ["rank", "integer", "'8'"]),
        (training.LoraConfig, {"rank": 0}, ["rank", "greater than or equal to 1"]),
        (training.LoraConfig, {"rank": 8.0}, ["rank", "integer"]),
        (training.LoraConfig, {"rank": True}, ["rank", "integer"]),
        (training.LoraConfig, {"train_mlp": "yes"}, ["train_mlp", "boolean"]),
        (training.AdamParams, {"learning_rate": float("nan")}, ["learning_rate"]),
        (training.AdamParams, {"learning_rate": "1e-4"}, ["learning_rate", "number", "'1e-4'"]),
        (training.AdamParams, {"learning_rate": -1.0}, ["learning_rate", "-1.0"]),
        (training.AdamParams, {"beta1": 1.0}, ["beta1", "less than 1"]),
        (training.AdamParams, {"weight_decay": float("inf")}, ["weight_decay", "finite"]),
        (sampling.SamplingParams, {"temperature": -0.1}, ["temperature"]),
        (sampling.SamplingParams, {"stop": {"a": 1}}, ["stop"]),
        (sampling.SamplingParams, {"max_tokens": 0}, ["max_tokens"]),
        (checkpoints.SetTtlRequest, {"ttl_seconds": 0}, ["ttl_seconds"]),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    model: type[Body], change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InvalidMessageError) as caught:
        check_body(model, change)
    for word in words:
        assert word in caught.value.message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidMessageError, match="session_id is missing"):
        check_body(training.CreateModelRequest, {"model_seq_id": 0, "base_model": "b"})


def test_keys_never_reach_a_message() -> None:
    with pytest.raises(InvalidMessageError) as caught:
        check_body(
            checkpoints.LoadWeightsRequest,
            {"path": "p", "optimizer": True, "weights_access_token": "tml-secret"},
        )
    assert "secret" not in caught.value.message


def test_nan_is_a_number_in_json() -> None:
    assert read_json(b'{"a": [NaN, Infinity, -Infinity]}')["a"][1] == float("inf")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a":"\\ud800"}', b"nul", b'{"a":1}x']
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMessageError, match="not JSON"):
        read_json(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(model=st.sampled_from(MODELS), data=st.data())
def test_any_json_is_read_or_refused(model: type[Body], data: st.DataObject) -> None:
    fields = st.sampled_from(sorted(model.model_fields) or ["x"])
    value = data.draw(JSON | st.dictionaries(fields, JSON))
    try:
        body = check_body(model, value)
    except InvalidMessageError as error:
        assert len(error.message) < 1500
        return
    json.dumps(body.to_json())


def test_every_field_of_the_official_requests_is_known() -> None:
    """What the official client can send is read, or is ignored on purpose."""
    import tinker.types as official

    ignored = {
        "OptimStepRequest": {"optim_params"},  # its names on the wire are tested above
        "CopyWeightsRequest": {"weights_access_token"},  # travels as a header
    }
    ours = {model.__name__: model for model in MODELS}
    compared = 0
    for name in dir(official):
        model = getattr(official, name)
        if name not in ours or not isinstance(model, type) or not issubclass(model, BaseModel):
            continue
        if name == "ClientConfigResponse":
            continue  # switches for that client alone
        missing = set(model.model_fields) - set(ours[name].model_fields) - ignored.get(name, set())
        assert not missing, f"{name} lacks {missing}"
        compared += 1
    assert compared >= 20
