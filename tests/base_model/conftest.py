"""The shipped model's directory, and a model loaded from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import holdfast.engine


@pytest.fixture(scope="session")
def directory() -> Path:
    return Path(holdfast.engine.__file__).parent / "models" / "holdfast-tiny"


@pytest.fixture
def model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)
