"""Bringing checkpoints in from outside: our archives, and PEFT adapters of any origin."""

from __future__ import annotations

import dataclasses
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.engine.interface import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_STATE
from holdfast.server.adapters import Adapter, BaseModel, read_adapter, tensors_of
from holdfast.store import (
    Blob,
    Imported,
    InvalidFile,
    LoraConfig,
    Manifest,
    Store,
    StoreError,
    import_archive,
    put_file,
)
from holdfast.store.archive import MANIFEST
from holdfast.store.model import MAX_MANIFEST

_PIECE = 1 << 20
_KNOWN = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, OPTIMIZER_STATE)

Progress = Callable[[int], object]
"""Told how many bytes have been read."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What whoever imports decides."""

    owner: str
    name: str | None = None
    """None: the name it had."""
    ttl_seconds: int | None = None


def import_checkpoint(
    store: Store,
    source: Path,
    wishes: Wishes,
    base: BaseModel | None,
    progress: Progress = lambda done: None,
) -> Manifest:
    """Put a checkpoint's files into the store and make its manifest, for a run of its own.

    `source` is an archive, the directory that one was unpacked to, or a PEFT adapter, as a
    directory or tar; an adapter needs the base model that it belongs to. Nothing is published.
    Raises InvalidFile unless everything holds together.
    """
    found = (
        _read_directory(store, source, progress)
        if source.is_dir()
        else _read_archive(store, source, progress)
    )
    if found.manifest is not None:
        if base is not None:
            raise InvalidFile(
                f"{source} says itself which base model it belongs to "
                f"({found.manifest.base_model!r}); leave --base-model out"
            )
        return _as_it_was(store, found.files, found.manifest, wishes)
    if base is None:
        raise InvalidFile(
            f"{source} does not say which version of its base model it belongs to; name the base "
            "model and the directory of its files (--base-model NAME=DIR)"
        )
    return _adapter(store, found.files, base, wishes)


def size_of(source: Path) -> int:
    """Bytes that an import reads, for a progress bar."""
    if not source.is_dir():
        return source.stat().st_size
    return sum((source / n).lstat().st_size for n in _KNOWN if (source / n).is_file())


# --- Reading ---------------------------------------------------------------------------------


def _read_archive(store: Store, source: Path, progress: Progress) -> Imported:
    with _Counted(source, progress) as file:
        found = import_archive(store, file, what=source.name)
    return found if found.manifest is None else _only_known(found, source.name)


def _read_directory(store: Store, source: Path, progress: Progress) -> Imported:
    present = {entry.name for entry in source.iterdir()}
    files: dict[str, Blob] = {}
    done = 0
    for name in _KNOWN:
        if name in present:
            with _Counted(source / name, progress, before=done) as file:
                files[name] = put_file(store, file.pieces(), file.size, name)
                done += file.size
    manifest = None
    if MANIFEST in present:
        manifest = _read_manifest(source / MANIFEST)
        listed = dict(manifest.files)
        for name in sorted({*listed, *files}):
            if listed.get(name) != files.get(name):
                raise InvalidFile(
                    f"{source / name} is not the file that {MANIFEST} lists: it was changed, or "
                    "one of them was replaced"
                )
        return _only_known(Imported(files, manifest), str(source))
    if "adapter_model.bin" in present and ADAPTER_WEIGHTS not in present:
        raise InvalidFile(
            f"{source} has its weights in adapter_model.bin, which may run code when it is read; "
            "save the adapter with safe_serialization=True"
        )
    # An optimizer's state without a manifest belongs to nothing that is known.
    return Imported({n: blob for n, blob in files.items() if n != OPTIMIZER_STATE}, None)


def _read_manifest(path: Path) -> Manifest:
    with _Counted(path, lambda done: None) as file:
        if file.size > MAX_MANIFEST:
            raise InvalidFile(f"{path} has {file.size} bytes, too many for a manifest")
        data = b"".join(file.pieces())
    try:
        return Manifest.from_bytes(data, str(path))
    except StoreError as error:
        raise InvalidFile(str(error)) from error


def _only_known(found: Imported, what: str) -> Imported:
    strange = sorted(set(found.files) - set(_KNOWN))
    if strange:
        raise InvalidFile(f"{what} holds {strange[0]!r}, which is no part of a checkpoint")
    return found


class _Counted:
    """A plain file, opened without following a link, that says how far it was read."""

    def __init__(self, path: Path, progress: Progress, *, before: int = 0) -> None:
        self._path = path
        self._progress = progress
        self._done = before

    def __enter__(self) -> _Counted:
        if self._path.is_symlink():
            raise InvalidFile(
                f"{self._path} is a symbolic link; import a directory of plain files, such as "
                "`cp -rL` makes of it"
            )
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.fdopen(os.open(self._path, flags), "rb")
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise InvalidFile(f"{self._path} is not a plain file")
        self.size = status.st_size
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._done += len(data)
        self._progress(self._done)
        return data

    def pieces(self) -> Iterator[bytes]:
        while piece := self.read(_PIECE):
            yield piece


# --- Manifests -------------------------------------------------------------------------------


def _as_it_was(
    store: Store, files: Mapping[str, Blob], manifest: Manifest, wishes: Wishes
) -> Manifest:
    """The manifest that came along, for another run; it must say the same as the files."""
    adapter = read_adapter(store, files)
    lora = manifest.lora
    _agree(adapter, manifest)
    if (OPTIMIZER_STATE in files) != (manifest.optimizer is not None):
        raise InvalidFile(
            f"{MANIFEST} says that the optimizer is {manifest.optimizer!r}, and there is "
            f"{'an' if OPTIMIZER_STATE in files else 'no'} {OPTIMIZER_STATE}"
        )
    if OPTIMIZER_STATE in files:
        _, said = tensors_of(store, files[OPTIMIZER_STATE], OPTIMIZER_STATE)
        if said.get("optimizer") != manifest.optimizer or said.get("step") != manifest.step:
            raise InvalidFile(f"{OPTIMIZER_STATE} and {MANIFEST} disagree on optimizer and step")
    now = time.time()
    return dataclasses.replace(
        manifest,
        run=_new_run(),
        name=wishes.name or manifest.name or f"step-{manifest.step}",
        lora=lora,
        owner=wishes.owner,
        created=now,
        expires=None if wishes.ttl_seconds is None else now + wishes.ttl_seconds,
        public=False,
        parent=manifest.id,
        request_id=None,
    )


def _agree(adapter: Adapter, manifest: Manifest) -> None:
    lora = manifest.lora
    pairs: list[tuple[str, object, object]] = [
        ("rank", adapter.rank, lora.rank),
        ("alpha", adapter.alpha, lora.alpha),
        ("train_attn", adapter.attn, lora.train_attn),
        ("train_mlp", adapter.mlp, lora.train_mlp),
        ("train_unembed", adapter.unembed, lora.train_unembed),
    ]
    if adapter.said:
        pairs += [
            ("base model", adapter.said.get("base_model"), manifest.base_model),
            ("base revision", adapter.said.get("base_revision"), manifest.base_revision),
        ]
    for what, in_file, said in pairs:
        if in_file != said:
            raise InvalidFile(
                f"{ADAPTER_WEIGHTS} and {MANIFEST} disagree on the {what}: "
                f"{str(in_file)[:80]} and {str(said)[:80]}"
            )


def _adapter(store: Store, files: Mapping[str, Blob], base: BaseModel, wishes: Wishes) -> Manifest:
    """A manifest for an adapter that another program made."""
    adapter = read_adapter(store, files)
    said = {key: adapter.said.get(key) for key in ("base_model", "base_revision")}
    ours = {"base_model": base.name, "base_revision": base.revision}
    if adapter.said and said != ours:
        raise InvalidFile(
            f"{ADAPTER_WEIGHTS} was trained on {said['base_model']!s:.80} "
            f"({said['base_revision']!s:.16}), not on {base.name} ({base.revision:.16})"
        )
    trainable = base.check(adapter)
    now = time.time()
    return Manifest(
        kind="training" if trainable else "sampler",
        run=_new_run(),
        name=wishes.name or "imported",
        seq=0,
        step=0,
        base_model=base.name,
        base_revision=base.revision,
        lora=LoraConfig(adapter.rank, 0, adapter.alpha, adapter.attn, adapter.mlp, adapter.unembed),
        optimizer=None,
        owner=wishes.owner,
        created=now,
        expires=None if wishes.ttl_seconds is None else now + wishes.ttl_seconds,
        files={name: files[name] for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)},
    )


def _new_run() -> str:
    return f"{uuid.uuid4().hex}:train:0"
