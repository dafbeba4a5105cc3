"""The bodies and results of forward and forward_backward, in protobuf and in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from google.protobuf.message import DecodeError

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.data import (
    Datum,
    datum_from_json,
    datum_from_protobuf,
    datum_to_json,
    write_datum,
)
from holdfast.protocol.errors import InvalidMessageError, InvalidTensorError
from holdfast.protocol.pieces import read_json_in_pieces
from holdfast.protocol.tensors import (
    ITEM_SIZE,
    Tensor,
    dtype_from_wire,
    dtype_to_wire,
    pack_integers,
    unpack_integers,
)

OUTPUT_TYPE = "TorchLossReturn"
_MAX_EMPTY_DATUMS = 1 << 16


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """The body of a forward (`forward_only`) or forward_backward."""

    model_id: str
    seq_id: int
    data: Sequence[Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False

    @classmethod
    def from_protobuf(cls, data: bytes) -> BatchRequest:
        """Read a ForwardBackwardRequest.

        Raises InvalidMessageError when the bytes are no such message, and InvalidTensorError when
        a tensor in it does not hold together.
        """
        message = pb.ForwardBackwardRequest()
        _parse(message, data, "ForwardBackwardRequest")
        if not message.model_id:
            raise InvalidMessageError("model_id is missing")
        if message.seq_id < 1:
            raise InvalidMessageError(f"seq_id {message.seq_id}: numbers begin at 1")
        config: dict[str, float | str] = {}
        for name in message.loss_fn_config:
            config[name] = message.loss_fn_config[name]
        for name, value in message.loss_fn_config_v2.items():
            kind = value.WhichOneof("value")
            if kind is None:
                raise InvalidMessageError(f"loss_fn_config {name!r:.80} has no value")
            config[name] = value.text if kind == "text" else value.number
        return cls(
            model_id=message.model_id,
            seq_id=message.seq_id,
            data=_located(message.data, datum_from_protobuf),
            loss_fn=message.loss_fn,
            loss_fn_config=config,
            forward_only=message.forward_only,
        )

    def to_protobuf(self) -> bytes:
        message = pb.ForwardBackwardRequest(
            model_id=self.model_id,
            seq_id=self.seq_id,
            loss_fn=self.loss_fn,
            forward_only=self.forward_only,
        )
        for name, value in self.loss_fn_config.items():
            if isinstance(value, str):
                message.loss_fn_config_v2[name].text = value
            else:
                message.loss_fn_config[name] = float(value)
                message.loss_fn_config_v2[name].number = float(value)
        for datum in self.data:
            write_datum(datum, message.data.add())
        # Equal batches give equal bytes, map order included: a retry is recognised by its bytes.
        return message.SerializeToString(deterministic=True)

    @classmethod
    def from_json(cls, body: object, *, forward_only: bool) -> BatchRequest:
        """Read `{"forward_backward_input": {..}, "model_id": .., "seq_id": ..}`.

        The wrapper is `forward_input` on the forward path; either is taken on both.
        """
        if not isinstance(body, Mapping):
            raise InvalidMessageError(f"an object is expected, not {body!r:.80}")
        model_id, seq_id = body.get("model_id"), body.get("seq_id")
        if not isinstance(model_id, str) or not model_id:
            raise InvalidMessageError(f"model_id {model_id!r:.80}: a text is expected")
        if isinstance(seq_id, bool) or not isinstance(seq_id, int) or not 1 <= seq_id < 2**63:
            raise InvalidMessageError(f"seq_id {seq_id!r:.80}: a whole number from 1 is expected")
        names = ("forward_input", "forward_backward_input")
        wrapped = next((body[name] for name in names if body.get(name) is not None), None)
        if not isinstance(wrapped, Mapping):
            raise InvalidMessageError(
                f"{names[0] if forward_only else names[1]} is missing: an object with data and"
                " loss_fn is expected"
            )
        data, loss_fn = wrapped.get("data"), wrapped.get("loss_fn")
        if not isinstance(data, list):
            raise InvalidMessageError(f"data: a list of datums is expected, not {data!r:.80}")
        if not isinstance(loss_fn, str):
            raise InvalidMessageError(f"loss_fn {loss_fn!r:.80}: a text is expected")
        config: dict[str, float | str] = {}
        given = wrapped.get("loss_fn_config")
        if given is not None and not isinstance(given, Mapping):
            raise InvalidMessageError(f"loss_fn_config {given!r:.80}: an object is expected")
        for name, value in (given or {}).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise InvalidMessageError(
                    f"loss_fn_config {name!r:.80} is {value!r:.80}: a number or a text is expected"
                )
            config[name] = value if isinstance(value, str) else _as_float(name, value)
        return cls(
            model_id=model_id,
            seq_id=seq_id,
            data=_located(data, datum_from_json),
            loss_fn=loss_fn,
            loss_fn_config=config,
            forward_only=forward_only,
        )

    def to_json(self) -> dict[str, Any]:
        wrapped: dict[str, Any] = {
            "data": [datum_to_json(datum) for datum in self.data],
            "loss_fn": self.loss_fn,
        }
        if self.loss_fn_config:
            wrapped["loss_fn_config"] = dict(self.loss_fn_config)
        name = "forward_input" if self.forward_only else "forward_backward_input"
        return {name: wrapped, "model_id": self.model_id, "seq_id": self.seq_id}


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of a forward or forward_backward: per datum its dense tensors by name."""

    outputs: Sequence[Mapping[str, Tensor]]
    metrics: Mapping[str, float]
    output_type: str = OUTPUT_TYPE

    def to_protobuf(self) -> bytes:
        """A ForwardBackwardOutput.

        Datums that share their fields' trailing dimensions go into one record. Raises
        InvalidTensorError for a sparse tensor, and for datums that differ in their fields' names.
        """
        message = pb.ForwardBackwardOutput(loss_fn_output_type=self.output_type)
        for name, metric in self.metrics.items():
            message.metrics[name] = metric
        start = 0
        while start < len(self.outputs):
            layout = _layout(self.outputs[start])
            end = start + 1
            while end < len(self.outputs) and _layout(self.outputs[end]) == layout:
                end += 1
            if set(layout) != set(self.outputs[0]):
                raise InvalidTensorError(
                    f"datum {start} has the outputs {sorted(layout)}, datum 0"
                    f" {sorted(self.outputs[0])}: the datums of a batch have the same"
                )
            _write_record(self.outputs[start:end], message.loss_fn_outputs.add())
            start = end
        return message.SerializeToString(deterministic=True)

    @classmethod
    def from_protobuf(cls, data: bytes) -> BatchResult:
        """Read a ForwardBackwardOutput. Raises InvalidMessageError or InvalidTensorError."""
        message = pb.ForwardBackwardOutput()
        _parse(message, data, "ForwardBackwardOutput")
        outputs: list[dict[str, Tensor]] = []
        for record in message.loss_fn_outputs:
            outputs.extend(_read_record(record))
        return cls(outputs, dict(message.metrics), message.loss_fn_output_type or OUTPUT_TYPE)

    def to_json(self) -> dict[str, Any]:
        """The JSON twin. JSON has no NaN or infinity.

        Null stands for them among a tensor's values; metrics that are none are left out.
        """
        return {
            "loss_fn_output_type": self.output_type,
            "loss_fn_outputs": [
                {name: tensor.to_result_json() for name, tensor in output.items()}
                for output in self.outputs
            ],
            "metrics": {k: v for k, v in self.metrics.items() if math.isfinite(v)},
        }

    @classmethod
    def from_json(cls, body: object) -> BatchResult:
        """Read the JSON twin. Raises InvalidMessageError or InvalidTensorError."""
        if not isinstance(body, Mapping):
            raise InvalidMessageError(f"an object is expected, not {body!r:.80}")
        listed = body.get("loss_fn_outputs")
        metrics = body.get("metrics")
        if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
            raise InvalidMessageError("loss_fn_outputs: a list of objects is expected")
        if metrics is None:
            metrics = {}
        if not isinstance(metrics, Mapping):
            raise InvalidMessageError(f"metrics {metrics!r:.80}: an object is expected")
        outputs: list[dict[str, Tensor]] = []
        for item in listed:
            output: dict[str, Tensor] = {}
            for name, value in item.items():
                if not isinstance(value, Mapping):
                    raise InvalidMessageError(f"output {name!r:.80}: an object is expected")
                output[name] = Tensor.from_result_json(value)
            outputs.append(output)
        numbers: dict[str, float] = {}
        for name, metric in metrics.items():
            if isinstance(metric, bool) or not isinstance(metric, int | float):
                raise InvalidMessageError(f"metric {name!r:.80} is {metric!r:.80}: not a number")
            numbers[name] = _as_float(name, metric)
        kind = body.get("loss_fn_output_type")
        return cls(outputs, numbers, kind if isinstance(kind, str) else OUTPUT_TYPE)


def read_large_json(data: bytes) -> Any:
    """As `read_json`, in a thread that lets others have their turn.

    Each datum is read already, as `from_json` takes it too, unless it is not right.
    """
    return read_json_in_pieces(data, _datum_if_right)


def _datum_if_right(item: object) -> object:
    try:
        return datum_from_json(item)
    except (InvalidMessageError, InvalidTensorError):
        return item


def _layout(output: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in output.items()}


def _write_record(outputs: Sequence[Mapping[str, Tensor]], record: pb.ArrayRecord) -> None:
    record.num_datums = len(outputs)
    for name, first in outputs[0].items():
        offsets = [0]
        for output in outputs:
            if output[name].csr is not None:
                raise InvalidTensorError(f"output {name!r} is sparse: results are dense")
            offsets.append(offsets[-1] + len(output[name].data))
        batched = record.fields[name]
        batched.data = b"".join(output[name].data for output in outputs)
        batched.offsets = pack_integers(offsets, "int64")
        batched.dtype = dtype_to_wire(first.dtype)
        batched.trailing_shape.extend(first.shape[1:])


def _read_record(record: pb.ArrayRecord) -> list[dict[str, Tensor]]:
    count = record.num_datums
    if count == 0 and record.fields:
        # Some writers leave the count to the offsets.
        count = max(len(next(iter(record.fields.values())).offsets) // 8 - 1, 0)
    if count < 0 or (not record.fields and count > _MAX_EMPTY_DATUMS):
        raise InvalidMessageError(f"a record of {count} datums without fields")
    columns = {name: _read_batched(name, batched, count) for name, batched in record.fields.items()}
    return [{name: tensors[i] for name, tensors in columns.items()} for i in range(count)]


def _read_batched(name: str, batched: pb.BatchedTensor, count: int) -> list[Tensor]:
    dtype = dtype_from_wire(batched.dtype)
    trailing = tuple(batched.trailing_shape)
    offsets = unpack_integers(batched.offsets, "int64")
    if len(offsets) != count + 1:
        raise InvalidMessageError(
            f"output {name!r:.80} has {len(offsets)} offsets: {count} datums take {count + 1}"
        )
    if offsets[0] != 0 or offsets[-1] != len(batched.data):
        raise InvalidMessageError(
            f"output {name!r:.80}: offsets go from {offsets[0]} to {offsets[-1]} over"
            f" {len(batched.data)} bytes"
        )
    row = ITEM_SIZE[dtype] * math.prod(trailing)
    tensors: list[Tensor] = []
    for start, end in pairwise(offsets):
        if not start <= end <= len(batched.data) or (row and (end - start) % row):
            raise InvalidMessageError(
                f"output {name!r:.80}: bytes {start} to {end} are no whole number of rows of"
                f" {row} bytes"
            )
        leading = (end - start) // row if row else 0
        tensors.append(Tensor(dtype, (leading, *trailing), batched.data[start:end]))
    return tensors


def _located(items: Any, read: Any) -> list[Datum]:
    """Read each datum that is not yet; an error says which one it was."""
    data: list[Datum] = []
    for i, item in enumerate(items):
        try:
            data.append(item if isinstance(item, Datum) else read(item))
        except (InvalidMessageError, InvalidTensorError) as error:
            raise type(error)(f"datum {i}: {error.message}") from None
    return data


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InvalidMessageError(f"{name!r:.80}: a number beyond the range of floats") from None


def _parse(message: Any, data: bytes, name: str) -> None:
    try:
        message.ParseFromString(data)
    except (DecodeError, RecursionError) as error:
        raise InvalidMessageError(f"the body is not a {name} message: {error}") from None
