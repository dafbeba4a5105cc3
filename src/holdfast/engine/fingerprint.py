"""What the bits of a step depend on beside the state: versions, device and kernels."""

from __future__ import annotations

import platform

import peft
import torch
import transformers

Fingerprint = dict[str, str | int | float | bool]


def fingerprint(
    *, device: torch.device, dtype: torch.dtype, attention: str, threads: int, token_budget: int
) -> Fingerprint:
    """Where two fingerprints are equal, the same state and batch give the same bits."""
    found: Fingerprint = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": "mkl" if torch._C.has_mkl else "other",
        "onednn": torch._C._has_mkldnn,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "token_budget": token_budget,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = torch._C._cudnn.getCompileVersion()[0] if torch._C._has_cudnn else 0
    return found
