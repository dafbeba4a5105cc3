"""The card of the shipped base model, written beside its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Facts:
    """What one training run used and measured."""

    parameters: int
    window: int
    steps: int
    seed: int
    threads: int
    tokens: int
    loss: float
    minutes: float
    python: str
    torch: str
    transformers: str
    reference_sha256: str


def write(directory: Path, facts: Facts) -> None:
    """Write ``MODEL.md`` for the weights that lie in the directory."""
    weights = (directory / "model.safetensors").read_bytes()
    text = f"""# holdfast-tiny

A small byte-level causal language model (Llama architecture) that ships with Holdfast, so that the
quickstart and the tests train something visible without a download. It repeats, copies, looks up
and reformats short text; it knows nothing about the world and is good for nothing else.

| | |
|---|---|
| parameters | {facts.parameters:,} |
| layers, hidden size, heads, MLP size | 4, 192, 6, 512; tied embeddings |
| weights | fp32, {len(weights):,} bytes |
| SHA-256 of `model.safetensors` | `{hashlib.sha256(weights).hexdigest()}` |
| tokens | ids 0 to 255 are UTF-8 bytes; 256 `<|bos|>`, 257 `<|eos|>`, 258 `<|pad|>` |
| longest sequence | {facts.window} tokens |
| held-out loss | {facts.loss:.4f} nats per token |

The tokenizer adds no special token by itself. In training every document stood between `<|bos|>`
and `<|eos|>`, and windows of text began anywhere.

## How it was made

    scripts/train-base-model --steps {facts.steps} --seed {facts.seed} --threads {facts.threads}

{facts.tokens:,} tokens in {facts.minutes:.0f} minutes on two shared CPU cores, with
Python {facts.python}, torch {facts.torch} and transformers {facts.transformers}.
The held-out loss is over documents from another seed; much of it is the generator's own
randomness, which nothing can predict.

## Text and licence

- Documents made by `tools/base_model/corpus.py` (repeats, records, pairs that follow a rule, simple
  stories, numbers): part of this project, Apache-2.0.
- Passages of the Python language reference as CPython {facts.python} carries it in
  `pydoc_data.topics` (SHA-256 of the text: `{facts.reference_sha256}`):
  Copyright Python Software Foundation, all rights reserved; used under the PSF License Agreement
  (PSF-2.0).

The weights are under Apache-2.0, like the project.

The quickstart's task, dates in words to ISO dates, is not in the text: no document holds both the
name of a month and a date in digits, so nothing says that March is 03. The parts of the task are
there: dates in digits change their order (`3/4/1999` to `1999-04-03`), months occur as words.
"""
    (directory / "MODEL.md").write_text(text)
