"""The micro-batch plan: how one operation's sequences are split, ordered and padded.

A pure function of the sequences' lengths and the token budget. Free memory, other runs and
retries have no say in it, because the last bits of gradients depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_BLOCK_ROWS = 12
"""Matrix products of fewer rows take other kernels on CPUs and give other bits."""

MIN_TOKEN_BUDGET = 2 * MIN_BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that go through the model's trunk together, padded at their right ends."""

    indices: tuple[int, ...]
    """Positions of the sequences in the operation, in the order of the micro-batch's rows."""
    lengths: tuple[int, ...]
    """Tokens of each; the first is the longest."""
    blocks: tuple[tuple[int, int], ...]
    """The head's row blocks, [start, stop) over the padded tokens; several only for one sequence
    that is longer than the budget."""

    @property
    def width(self) -> int:
        """The padded length."""
        return self.lengths[0]

    @property
    def padded(self) -> bool:
        return self.lengths[-1] != self.lengths[0]


def plan(lengths: Sequence[int], budget: int) -> list[MicroBatch]:
    """Split sequences of `lengths` (each at least 1) into micro-batches of at most `budget` tokens.

    Longest first, so that little is padding and memory is tight in the first micro-batch if at
    all; equal lengths keep their order. A sequence longer than the budget is alone.
    """
    assert budget >= MIN_TOKEN_BUDGET, budget
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    start = 0
    while start < len(order):
        count = max(1, budget // lengths[order[start]])
        indices = tuple(order[start : start + count])
        sizes = tuple(lengths[i] for i in indices)
        batches.append(MicroBatch(indices, sizes, head_blocks(len(sizes) * sizes[0], budget)))
        start += count
    return batches


def head_blocks(rows: int, budget: int) -> tuple[tuple[int, int], ...]:
    """Cut `rows` into blocks of at most `budget`, none but an only one under MIN_BLOCK_ROWS."""
    blocks = []
    start = 0
    while start < rows:
        stop = min(start + budget, rows)
        if 0 < rows - stop < MIN_BLOCK_ROWS:
            stop = rows - MIN_BLOCK_ROWS
        blocks.append((start, stop))
        start = stop
    return tuple(blocks)
