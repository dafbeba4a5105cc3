"""Tensors as they travel: dtype, shape and little-endian bytes, dense or as sparse CSR."""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.errors import InvalidTensorError

if TYPE_CHECKING:
    import numpy.typing as npt

DType = Literal["float32", "int64", "int32", "bfloat16"]
DTYPES: tuple[DType, ...] = get_args(DType)
ITEM_SIZE: dict[DType, int] = {"float32": 4, "int64": 8, "int32": 4, "bfloat16": 2}

_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 2**40
_TYPECODE = {"float32": "f", "int64": "q", "int32": "i", "bfloat16": "H"}
_TO_WIRE: dict[DType, pb.DType] = {
    "float32": pb.DTYPE_FLOAT32,
    "int64": pb.DTYPE_INT64,
    "int32": pb.DTYPE_INT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
}
_FROM_WIRE: dict[int, DType] = {int(number): dtype for dtype, number in _TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class Csr:
    """The places of a sparse matrix's listed entries: int64, little-endian.

    Row i owns the entries `crow_indices[i]` up to `crow_indices[i + 1]`; columns rise in a row.
    """

    crow_indices: bytes
    col_indices: bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A checked tensor. `data` holds every value in row-major order, or with `csr` the listed ones.

    Building one checks that sizes, shape and indices agree and raises InvalidTensorError, so a
    Tensor from anywhere is safe to turn into an array.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes
    csr: Csr | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZE:
            raise InvalidTensorError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 1 <= len(self.shape) <= _MAX_DIMENSIONS:
            raise InvalidTensorError(
                f"a tensor of {len(self.shape)} dimensions: 1 to {_MAX_DIMENSIONS} are possible"
            )
        for size in self.shape:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise InvalidTensorError(f"shape {list(self.shape)!r}: sizes are whole numbers")
            if size > _MAX_DIMENSION:
                raise InvalidTensorError(f"shape {list(self.shape)!r}: {size} is too large")
        if len(self.data) % ITEM_SIZE[self.dtype]:
            raise InvalidTensorError(
                f"{len(self.data)} bytes are no whole number of {self.dtype} values"
            )
        if self.csr is not None:
            self._check_csr(self.csr)
        elif self.stored != self.size:
            raise InvalidTensorError(
                f"shape {list(self.shape)} takes {self.size} values, {self.stored} were given"
            )

    def _check_csr(self, csr: Csr) -> None:
        if len(self.shape) != 2:
            raise InvalidTensorError(
                f"a sparse tensor has two dimensions, not shape {list(self.shape)}"
            )
        rows, columns = self.shape
        crow = _integers(csr.crow_indices, "sparse_crow_indices")
        col = _integers(csr.col_indices, "sparse_col_indices")
        if len(crow) != rows + 1:
            raise InvalidTensorError(
                f"sparse_crow_indices has {len(crow)} entries: {rows} rows take {rows + 1}"
            )
        if len(col) != self.stored:
            raise InvalidTensorError(
                f"sparse_col_indices has {len(col)} entries for {self.stored} values"
            )
        if crow[0] != 0 or crow[-1] != len(col):
            raise InvalidTensorError(
                f"sparse_crow_indices goes from {crow[0]} to {crow[-1]}: it must go from 0 to the"
                f" number of values, {len(col)}"
            )
        for row in range(rows):
            start, end = crow[row], crow[row + 1]
            if end < start:
                raise InvalidTensorError(f"sparse_crow_indices falls at row {row}")
            # start >= 0 by induction from crow[0] == 0; end <= len(col) is checked here.
            if end > len(col):
                raise InvalidTensorError(f"sparse_crow_indices passes its end at row {row}")
            previous = -1
            for column in col[start:end]:
                if column <= previous or column >= columns:
                    raise InvalidTensorError(
                        f"sparse_col_indices: column {column} in row {row} of shape"
                        f" {list(self.shape)}; columns rise in a row and stay below {columns}"
                    )
                previous = column

    @property
    def size(self) -> int:
        """The number of values of the dense form."""
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size

    @property
    def stored(self) -> int:
        """The number of values in `data`."""
        return len(self.data) // ITEM_SIZE[self.dtype]

    # ---- lists ----

    @classmethod
    def of(
        cls, values: Iterable[float], dtype: DType, shape: Sequence[int] | None = None
    ) -> Tensor:
        """A dense tensor of flat, row-major values; without a shape it has one dimension."""
        data = _pack(values, dtype)
        if shape is None:
            shape = (len(data) // ITEM_SIZE[dtype],)
        return cls(dtype, tuple(shape), data)

    def values(self) -> list[Any]:
        """The stored values, flat: ints for integer dtypes, floats for the others."""
        raw = _unpack(self.data, _TYPECODE[self.dtype])
        if self.dtype == "bfloat16":
            widened = b"".join(b"\0\0" + struct.pack("<H", bits) for bits in raw)
            return _unpack(widened, "f").tolist()
        return raw.tolist()

    # ---- JSON ----

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Tensor:
        """Read `{"data": [..], "dtype": .., "shape"?: [..], "sparse_crow_indices"?: [..], ..}`."""
        dtype = body.get("dtype")
        values = body.get("data")
        shape = body.get("shape")
        crow = body.get("sparse_crow_indices")
        col = body.get("sparse_col_indices")
        for known in DTYPES:
            if dtype == known:
                break
        else:
            raise InvalidTensorError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(values, list):
            raise InvalidTensorError(f"data is a {type(values).__name__}: a flat list is expected")
        if shape is not None and not isinstance(shape, list):
            raise InvalidTensorError(f"shape {shape!r}: a list of whole numbers is expected")
        data = _pack(values, known)
        if crow is None and col is None:
            return cls(known, tuple(shape) if shape else (len(values),), data)
        if not isinstance(crow, list) or not isinstance(col, list) or shape is None:
            raise InvalidTensorError(
                "a sparse tensor takes sparse_crow_indices, sparse_col_indices and shape together"
            )
        return cls(known, tuple(shape), data, Csr(_pack(crow, "int64"), _pack(col, "int64")))

    def to_json(self) -> dict[str, Any]:
        """The JSON form; int32 is named int64 and bfloat16 float32, the dtypes clients know."""
        integral = self.dtype in ("int64", "int32")
        body: dict[str, Any] = {
            "data": self.values(),
            "dtype": "int64" if integral else "float32",
            "shape": list(self.shape),
        }
        if self.csr is not None:
            body["sparse_crow_indices"] = _unpack(self.csr.crow_indices, "q").tolist()
            body["sparse_col_indices"] = _unpack(self.csr.col_indices, "q").tolist()
        return body

    @classmethod
    def from_result_json(cls, body: Mapping[str, Any]) -> Tensor:
        """As from_json, for results: null is NaN. In a request it is a mistake."""
        values = body.get("data")
        if isinstance(values, list) and None in values:
            body = {**body, "data": [math.nan if value is None else value for value in values]}
        return cls.from_json(body)

    def to_result_json(self) -> dict[str, Any]:
        """As to_json, for results: null stands for NaN and infinity, which JSON does not have."""
        return {**self.to_json(), "data": finite(self.values())}

    # ---- protobuf ----

    @classmethod
    def from_protobuf(cls, message: pb.Tensor) -> Tensor:
        """Read a message; without a shape a dense tensor has one dimension."""
        dtype = dtype_from_wire(message.dtype)
        shape = tuple(message.shape[:])
        if message.HasField("sparse_csr"):
            csr = message.sparse_csr
            return cls(dtype, shape, csr.values, Csr(csr.crow_indices, csr.col_indices))
        data = message.dense
        return cls(dtype, shape or (len(data) // ITEM_SIZE[dtype],), data)

    def write_protobuf(self, message: pb.Tensor) -> None:
        """Fill an empty message."""
        message.dtype = dtype_to_wire(self.dtype)
        message.shape.extend(self.shape)
        if self.csr is None:
            message.dense = self.data
        else:
            message.sparse_csr.values = self.data
            message.sparse_csr.crow_indices = self.csr.crow_indices
            message.sparse_csr.col_indices = self.csr.col_indices

    # ---- numpy ----

    @classmethod
    def from_numpy(cls, values: npt.NDArray[Any]) -> Tensor:
        """A dense tensor; other widths become the wire's: int64 for integers, float32 for reals."""
        import numpy as np

        if values.dtype == np.int32:
            dtype: DType = "int32"
        elif values.dtype.kind in "iu":
            dtype = "int64"
        elif values.dtype.kind == "f":
            dtype = "float32"
        else:
            raise InvalidTensorError(f"values of dtype {values.dtype}: numbers are expected")
        contiguous = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
        return cls(dtype, values.shape, contiguous.tobytes())

    def to_numpy(self, *, max_elements: int) -> npt.NDArray[Any]:
        """The dense array, owning its memory; bfloat16 is widened to float32.

        A sparse tensor is filled with zeros. Raises InvalidTensorError when the dense form has
        more than `max_elements` values, before anything is allocated.
        """
        import numpy as np

        if self.size > max_elements:
            raise InvalidTensorError(
                f"shape {list(self.shape)} takes {self.size} values: at most {max_elements}"
            )
        values = _numpy_values(self.dtype, self.data)
        if self.csr is None:
            return values.reshape(self.shape)
        crow = np.frombuffer(self.csr.crow_indices, dtype="<i8")
        col = np.frombuffer(self.csr.col_indices, dtype="<i8")
        dense = np.zeros(self.shape, dtype=values.dtype)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(crow)), col] = values
        return dense

    def dense(self, *, max_elements: int) -> Tensor:
        """The same values, none left out, as float32, int64 or int32. Raises as `to_numpy` does."""
        if self.csr is None and self.dtype != "bfloat16" and self.size <= max_elements:
            return self
        return Tensor.from_numpy(self.to_numpy(max_elements=max_elements))


def finite(values: Sequence[float]) -> list[float | None]:
    """The values, with None for those that JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def dtype_from_wire(number: int) -> DType:
    """The dtype of an enum number. Raises InvalidTensorError for 0 and unknown numbers."""
    try:
        return _FROM_WIRE[number]
    except KeyError:
        raise InvalidTensorError(
            f"dtype number {number}: 1 float32, 2 int64, 3 int32, 4 bfloat16"
        ) from None


def dtype_to_wire(dtype: DType) -> pb.DType:
    return _TO_WIRE[dtype]


def pack_integers(values: Iterable[int], dtype: Literal["int32", "int64"]) -> bytes:
    """Whole numbers as little-endian bytes. Raises InvalidTensorError for anything else."""
    return _pack(values, dtype)


def unpack_integers(data: bytes, dtype: Literal["int32", "int64"]) -> list[int]:
    """The reverse of pack_integers. Raises InvalidTensorError for a broken last value."""
    if len(data) % ITEM_SIZE[dtype]:
        raise InvalidTensorError(f"{len(data)} bytes are no whole number of {dtype} values")
    return _unpack(data, _TYPECODE[dtype]).tolist()


def _pack(values: Iterable[float], dtype: DType) -> bytes:
    if not isinstance(values, list):
        values = list(values)
    if bool in set(map(type, values)):
        raise InvalidTensorError(f"true or false among {dtype} values: numbers are expected")
    try:
        if dtype == "bfloat16":
            packed = array("H", map(_bfloat16_bits, array("f", values)))
        else:
            packed = array(_TYPECODE[dtype], cast("list[int]", values))
    except (TypeError, OverflowError, ValueError) as error:
        wrong = next((v for v in values if not _fits(v, dtype)), None)
        raise InvalidTensorError(f"{wrong!r:.80} is not a {dtype} value") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _fits(value: Any, dtype: DType) -> bool:
    try:
        array(_TYPECODE[dtype] if dtype != "bfloat16" else "f", [value])
    except (TypeError, OverflowError, ValueError):
        return False
    return True


def _unpack(data: bytes, typecode: str) -> array[Any]:
    values: array[Any] = array(typecode)
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _integers(data: bytes, name: str) -> array[int]:
    if len(data) % 8:
        raise InvalidTensorError(f"{name}: {len(data)} bytes are no whole number of int64 values")
    return _unpack(data, "q")


def _bfloat16_bits(value: float) -> int:
    """Round a float32 to bfloat16, to nearest with ties to even; NaN stays NaN."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    if value != value:
        return (bits >> 16) | 0x40
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def _numpy_values(dtype: DType, data: bytes) -> npt.NDArray[Any]:
    import numpy as np

    if dtype == "bfloat16":
        bits = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return bits.view("<f4").astype(np.float32)
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(np.dtype(dtype))
