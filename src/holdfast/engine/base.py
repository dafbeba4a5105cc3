"""Loads a base model: any causal language model of transformers with safetensors weights."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from holdfast.engine.fingerprint import fingerprint
from holdfast.engine.interface import BaseModelInfo, EngineError
from holdfast.engine.revision import NUMERIC_FILES, revision

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OTHER_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "*.model")


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen base model, in eval mode, without dropout."""

    model: Any
    """The causal language model; PEFT's layers are put into it as slots are made."""
    info: BaseModelInfo
    directory: Path
    device: torch.device
    eos_token_ids: tuple[int, ...]


def load_base(
    name: str,
    source: str,
    *,
    tokenizer_id: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    token_budget: int,
) -> Base:
    """Load the model at `source`, a local directory or a hub id.

    fp32 on CPU, bf16 on an accelerator. Sets torch's compute threads for good: `threads`, or as
    many as suit the model (`suitable_threads`). Raises EngineError (server) when the model cannot
    be loaded.
    """
    directory = _locate(source)
    if tokenizer_id is None and not Path(source).is_dir():
        tokenizer_id = source
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = _device(device)
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(directory)
        _without_dropout(config)
        if threads is None:
            threads = suitable_threads(config.get_text_config().hidden_size, usable_processors())
        torch.set_num_threads(threads)
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
                output_loading_info=True,
            )
        _check_whole(found)
    except Exception as error:  # the libraries have many for files that they cannot use
        why = " ".join(str(error).split())
        raise EngineError(
            "model_not_loadable",
            f"The base model {name!r} cannot be loaded from {directory}: {why}",
            "server",
        ) from error
    model.to(target)
    model.eval()
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    text = config.get_text_config()
    info = BaseModelInfo(
        name=name,
        revision=revision(directory),
        architecture=type(model).__name__,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_sequence_length=int(getattr(text, "max_position_embeddings", 1 << 20)),
        tokenizer_id=tokenizer_id,
        fingerprint=fingerprint(
            device=target,
            dtype=dtype,
            attention=str(model.config._attn_implementation),
            threads=threads,
            token_budget=token_budget,
        ),
    )
    return Base(model, info, directory, target, _eos_token_ids(model))


def _check_whole(found: Mapping[str, Any]) -> None:
    """Raises ValueError unless every weight was there: others are drawn, anew at each start."""
    lacking = sorted(found["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"its weights lack {lacking[0]!r}{more} that its config.json asks for")
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"its weights have {name!r} in shape {tuple(there)}, and its config.json asks for "
            f"{tuple(wanted)}"
        )


def suitable_threads(hidden_size: int, processors: int) -> int:
    """Threads that make a model of this width faster, of those there are.

    Waking a thread for a matrix product costs some 20 µs, as much as a processor needs for a
    product of 512 rows and a width of 64. A second thread pays from a width of about 128 on;
    the work, hence the threads worth having, grows with the width's square.
    """
    return max(1, min(processors, hidden_size**2 >> 13))


def usable_processors(quota: Path = _CPU_QUOTA) -> int:
    """Processors that this process may use; in a container those that it is granted.

    `quota` is a cgroup's cpu.max: the microseconds that it may run ("max": any) in each period.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    try:
        granted, period = quota.read_text().split()
        return max(1, min(count, int(granted) // int(period)))
    except (OSError, ValueError):
        return count


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' advice to interactive users out of the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _device(name: str) -> torch.device:
    """Raises EngineError for one that this machine has not, or that this torch cannot use."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(
            "model_not_loadable",
            f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}. This torch"
            f" ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices; 'auto' takes"
            " what there is.",
            "server",
        ) from None
    return device


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EngineError(
                "model_not_loadable",
                f"{source!r} has no config.json: it is no model directory.",
                "server",
            )
        return path.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[*NUMERIC_FILES, *_OTHER_FILES]))
    except Exception as error:  # The hub's client raises errors of several libraries.
        raise EngineError(
            "model_not_loadable",
            f"{source!r} is no directory here, and as a hub id it could not be fetched: {error}",
            "server",
        ) from error


def _without_dropout(config: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(part, key, 0.0)


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()
