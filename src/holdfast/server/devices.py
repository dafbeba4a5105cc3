"""Which devices cannot be used here, as far as that can be told without torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def why_not(device: str, *, gpus: Path = _NVIDIA, torch: str | None = None) -> str | None:
    """Why no worker can compute on a device; None where it may, which a worker finds out.

    `gpus` has an entry for each GPU that the driver knows, where there is that driver; `torch` is
    the version installed. Which GPUs torch is shown, and in which order, the environment decides:
    never more than there are.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    try:
        torch = torch or version("torch")
    except PackageNotFoundError:
        return None
    if torch.endswith("+cpu"):
        return f"this torch ({torch}) was made for CPUs alone"
    if gpus.is_dir():
        there = len(list(gpus.iterdir()))
        if int(number or 0) >= there:
            return f"this machine has {there} GPU{'' if there == 1 else 's'}, numbered from cuda:0"
    return None
