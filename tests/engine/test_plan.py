"""The plan covers every token once, within the budget, and depends on lengths and budget alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.plan import MIN_BLOCK_ROWS, MIN_TOKEN_BUDGET, MicroBatch, head_blocks, plan

lengths_of = st.lists(st.integers(1, 300), max_size=40)
budgets = st.integers(MIN_TOKEN_BUDGET, 400)


@given(lengths_of, budgets)
def test_every_sequence_is_planned_once_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = plan(lengths, budget)
    assert sorted(i for part in parts for i in part.indices) == list(range(len(lengths)))
    for part in parts:
        assert part.lengths == tuple(lengths[i] for i in part.indices)
        assert part.width == max(part.lengths)
        assert part.blocks[-1][1] == len(part.indices) * part.width
        assert len(part.blocks) == 1 or len(part.indices) == 1
        assert len(part.indices) == 1 or len(part.indices) * part.width <= budget
        assert part.padded == (len(set(part.lengths)) > 1)


@given(st.integers(1, 3000), budgets)
def test_head_blocks_cover_all_rows_without_a_short_tail(rows: int, budget: int) -> None:
    blocks = head_blocks(rows, budget)
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == rows
    sizes = [stop - start for start, stop in blocks]
    assert all(size <= budget for size in sizes)
    assert len(blocks) == 1 or min(sizes) >= MIN_BLOCK_ROWS


def test_a_tail_of_few_rows_takes_some_from_the_block_before() -> None:
    assert head_blocks(100 + 5, 100) == ((0, 93), (93, 105))
    assert head_blocks(100 + 12, 100) == ((0, 100), (100, 112))


def test_longest_first_and_equal_lengths_keep_their_order() -> None:
    assert plan([10, 30, 10, 30, 20], 60) == [
        MicroBatch((1, 3), (30, 30), ((0, 60),)),
        MicroBatch((4, 0, 2), (20, 10, 10), ((0, 60),)),
    ]


def test_a_sequence_over_the_budget_is_alone_and_its_head_runs_in_blocks() -> None:
    assert plan([5, 70], 30) == [
        MicroBatch((1,), (70,), ((0, 30), (30, 58), (58, 70))),
        MicroBatch((0,), (5,), ((0, 5),)),
    ]


def test_nothing_to_plan() -> None:
    assert plan([], 100) == []
