"""What the store keeps: blobs, manifests and the names that point to them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from blake3 import blake3

from holdfast.store.errors import CorruptManifest, InvalidValue, UnsupportedFormat

FORMAT_VERSION = 1
"""Of manifests. Every version ever released stays readable."""

MAX_MANIFEST = 1 << 20
"""Bytes; a larger one is refused before it is parsed."""

MAX_BLOB = 1 << 50
"""Bytes; a manifest that claims more is refused."""

CheckpointKind = Literal["training", "sampler", "external"]
NameKind = Literal["weights", "sampler_weights", "external_weights"]

CHECKPOINT_KINDS: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
NAME_KINDS: tuple[NameKind, ...] = get_args(NameKind)

_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")
_MAX_COUNT = 1 << 62
_MAX_FILES = 100


def content_hash(data: bytes) -> str:
    """blake3 of `data`, 64 lower-case hex digits: the id of a manifest, the name of a blob."""
    return blake3(data).hexdigest()


def check_id(value: str, what: str = "manifest id") -> str:
    """`value` itself when it is a hash; InvalidValue otherwise, so that it is safe in a path."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise InvalidValue(f"{what} must be 64 lower-case hex digits, got {_show(value)}")
    return value


def check_file_name(value: object) -> str:
    """`value` itself when it is a plain file name; InvalidValue otherwise."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidValue(f"{_show(value)} is not a plain file name")
    return value


@dataclass(frozen=True, slots=True)
class Blob:
    """Immutable bytes, named by their content."""

    hash: str
    """blake3, 64 lower-case hex digits."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class NameKey:
    """The only mutable thing: a checkpoint's name within its run."""

    run: str
    kind: str
    """"weights", "sampler_weights" or "external_weights"."""
    name: str

    def __post_init__(self) -> None:
        _check_run(self.run)
        _check_name(self.name)
        if self.kind not in NAME_KINDS:
            raise InvalidValue(f"kind must be one of {list(NAME_KINDS)}, got {_show(self.kind)}")

    def __str__(self) -> str:
        return f"{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What is trained. `alpha` is PEFT's lora_alpha: the update is scaled by alpha / rank."""

    rank: int
    seed: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The accumulated gradients lack the forward_backward `seq`."""

    seq: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One checkpoint: which blobs it is made of, and everything known about it.

    Immutable; its id is the hash of its bytes. Raises InvalidValue when a field is not of the
    right form, so that every Manifest there is can be published.
    """

    kind: CheckpointKind
    run: str
    name: str | None
    """None: not listed; kept until it is discarded (a snapshot, the base of a resumed run)."""
    seq: int
    """The position in the run's order of operations that the state belongs to."""
    step: int
    """optim_steps applied."""
    base_model: str
    base_revision: str
    lora: LoraConfig
    optimizer: str | None
    """The optimizer's type, None without optimizer state."""
    owner: str
    created: float
    """Seconds since 1970, UTC."""
    files: Mapping[str, Blob]
    """By file name: adapter_model.safetensors, adapter_config.json, optimizer.safetensors."""
    pending_forward_backwards: int = 0
    incomplete: Incomplete | None = None
    parent: str | None = None
    """Id of the manifest that the state was copied, imported, or loaded from to go on with it.

    Changing a checkpoint's expiry, metadata or visibility leaves this as it was.
    """
    expires: float | None = None
    """Seconds since 1970, UTC; None: never."""
    public: bool = False
    user_metadata: Mapping[str, str] | None = None
    fingerprint: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    request_id: str | None = None
    """The operation that made it."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_manifest(self)

    @property
    def id(self) -> str:
        """blake3 of `to_bytes()`."""
        return content_hash(self.to_bytes())

    @property
    def key(self) -> NameKey | None:
        """The name that it is made for, None for an unnamed one."""
        if self.name is None:
            return None
        return NameKey(self.run, NAME_KINDS[CHECKPOINT_KINDS.index(self.kind)], self.name)

    @property
    def label(self) -> str:
        """How messages call it."""
        return str(self.key or f"{self.run} at position {self.seq}")

    @property
    def size(self) -> int:
        """Bytes of all its blobs, shared ones included."""
        return sum(blob.size for blob in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests have equal bytes."""
        document = _fields_of(self)
        document["lora"] = _fields_of(self.lora)
        document["incomplete"] = None if self.incomplete is None else _fields_of(self.incomplete)
        document["files"] = {name: _fields_of(blob) for name, blob in self.files.items()}
        document["fingerprint"] = dict(self.fingerprint)
        document["user_metadata"] = None if self.user_metadata is None else dict(self.user_metadata)
        data = canonical_json(document)
        if len(data) > MAX_MANIFEST:
            raise InvalidValue(
                f"a manifest of {len(data)} bytes is too large (the limit is {MAX_MANIFEST}); "
                f"its user_metadata is {len(str(self.user_metadata))} characters"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, path: str = "manifest") -> Manifest:
        """Parse a manifest that anybody may have written.

        Raises CorruptManifest, naming `path`, unless the bytes are exactly what `to_bytes` of a
        valid manifest gives; UnsupportedFormat when a newer version wrote it.
        """
        document = parse_json(data, path)
        version = document.get("format_version")
        if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{path} has format version {version}; this Holdfast reads up to {FORMAT_VERSION}"
            )
        try:
            _check_keys("a manifest", document, cls)
            _check_keys("lora", document["lora"], LoraConfig)
            document["lora"] = LoraConfig(**document["lora"])
            if document["incomplete"] is not None:
                _check_keys("incomplete", document["incomplete"], Incomplete)
                document["incomplete"] = Incomplete(**document["incomplete"])
            if not isinstance(document["files"], dict):
                raise InvalidValue("files must be an object")
            for name, blob in document["files"].items():
                _check_keys(f"files[{_show(name)}]", blob, Blob)
                document["files"][name] = Blob(**blob)
            manifest = cls(**document)
            canonical = manifest.to_bytes()
        except InvalidValue as error:
            raise CorruptManifest(f"{path} is not a valid manifest: {error}", path) from error
        if canonical != data:
            raise CorruptManifest(f"{path} is not in the canonical form", path)
        return manifest


def _fields_of(value: Manifest | LoraConfig | Incomplete | Blob) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """The one JSON text of `document`: sorted keys, no spaces, UTF-8."""
    try:
        text = json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except ValueError as error:  # not finite, or a lone surrogate
        raise InvalidValue(f"cannot be written as JSON: {error}") from error


def parse_json(data: bytes, path: str, limit: int = MAX_MANIFEST) -> dict[str, Any]:
    """A JSON object from bytes that anybody may have written, or CorruptManifest naming `path`."""
    if len(data) > limit:
        raise CorruptManifest(f"{path} has {len(data)} bytes, more than {limit}", path)
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CorruptManifest(f"{path} is not valid JSON: {_short(str(error))}", path) from error
    if not isinstance(document, dict):
        raise CorruptManifest(f"{path} is not a JSON object", path)
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_keys(what: str, value: Any, cls: type) -> None:
    expected = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != expected:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InvalidValue(f"{what} must have exactly the keys {sorted(expected)}, got {found}")


def _check_run(run: object) -> None:
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise InvalidValue(
            f"a run id is up to 256 letters, digits, '.', '_', ':' and '-', got {_show(run)}"
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValue(
            "a checkpoint name is 1 to 128 letters, digits, '.', '_' and '-', "
            f"the first a letter or digit, got {_show(name)}"
        )


def _check_manifest(m: Manifest) -> None:
    if not _is_int(m.format_version) or m.format_version != FORMAT_VERSION:
        raise InvalidValue(f"format_version must be {FORMAT_VERSION}, got {m.format_version!r}")
    if m.kind not in CHECKPOINT_KINDS:
        raise InvalidValue(f"kind must be one of {list(CHECKPOINT_KINDS)}, got {_show(m.kind)}")
    _check_run(m.run)
    if m.name is not None:
        _check_name(m.name)
    for key in ("seq", "step", "pending_forward_backwards"):
        _check_count(key, getattr(m, key))
    for key in ("base_model", "base_revision", "owner"):
        _check_text(key, getattr(m, key))
    for key in ("optimizer", "request_id"):
        if getattr(m, key) is not None:
            _check_text(key, getattr(m, key))
    if m.parent is not None:
        check_id(m.parent, "parent")
    _check_time("created", m.created)
    if m.expires is not None:
        _check_time("expires", m.expires)
    _check_flag("public", m.public)
    _check_lora(m.lora)
    if m.incomplete is not None:
        if not isinstance(m.incomplete, Incomplete):
            raise InvalidValue(f"incomplete must be an Incomplete, got {_show(m.incomplete)}")
        _check_count("incomplete.seq", m.incomplete.seq)
        _check_text("incomplete.message", m.incomplete.message)
    _check_mappings(m)


def _check_mappings(m: Manifest) -> None:
    if m.user_metadata is not None:
        _check_mapping("user_metadata", m.user_metadata)
        for key, text in m.user_metadata.items():
            _check_text(f"user_metadata[{_show(key)}]", text)
    _check_mapping("fingerprint", m.fingerprint)
    for key, value in m.fingerprint.items():
        if not isinstance(value, (str, int, float)) or value != value:
            raise InvalidValue(f"fingerprint[{_show(key)}] must be a plain value")
    _check_mapping("files", m.files)
    if len(m.files) > _MAX_FILES:
        raise InvalidValue(f"at most {_MAX_FILES} files, got {len(m.files)}")
    for name, blob in m.files.items():
        check_file_name(name)
        if not isinstance(blob, Blob):
            raise InvalidValue(f"files[{name!r}] must be a Blob, got {_show(blob)}")
        check_id(blob.hash, f"files[{name!r}].hash")
        if not _is_int(blob.size) or not 0 <= blob.size <= MAX_BLOB:
            raise InvalidValue(
                f"files[{name!r}].size must be 0 to {MAX_BLOB}, got {_show(blob.size)}"
            )


def _check_lora(lora: object) -> None:
    if not isinstance(lora, LoraConfig):
        raise InvalidValue(f"lora must be a LoraConfig, got {_show(lora)}")
    _check_count("lora.rank", lora.rank)
    if not _is_int(lora.seed) or abs(lora.seed) > 1 << 64:
        raise InvalidValue(f"lora.seed must be an integer of 64 bits, got {_show(lora.seed)}")
    if not isinstance(lora.alpha, float) or not math.isfinite(lora.alpha):
        raise InvalidValue(f"lora.alpha must be a finite float, got {_show(lora.alpha)}")
    for key in ("train_attn", "train_mlp", "train_unembed"):
        _check_flag(f"lora.{key}", getattr(lora, key))


def _check_mapping(what: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidValue(f"{what} must be a mapping from text, got {_show(value)}")


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidValue(f"{what} must be text, got {_show(value)}")


def _check_count(what: str, value: object) -> None:
    if not _is_int(value) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise InvalidValue(f"{what} must be an integer of at least 0, got {_show(value)}")


def _check_time(what: str, value: object) -> None:
    if not isinstance(value, float) or not math.isfinite(value):
        raise InvalidValue(f"{what} must be seconds since 1970 as a float, got {_show(value)}")


def _check_flag(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidValue(f"{what} must be true or false, got {_show(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: object) -> str:
    return _short(ascii(value))


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
