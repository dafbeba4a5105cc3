"""The quickstart's task: its examples are right, disjoint and a function of seed and step."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.cli import dates
from holdfast.cli.dates import DateTask, Example

SEEDS = st.integers(0, 2**32)


def test_a_date_is_written_in_both_ways() -> None:
    day = date(2024, 3, 3)
    assert dates.example(day) == Example("Date: 3 March 2024\nISO: ", "2024-03-03\n")
    assert dates.example(day, month_first=True).prompt == "Date: March 3, 2024\nISO: "


@given(SEEDS, st.integers(0, 10_000))
def test_answers_are_the_dates_of_their_prompts(seed: int, step: int) -> None:
    for example in DateTask(seed, 5).batch(step, 8):
        text = example.prompt.removeprefix("Date: ").removesuffix("\nISO: ")
        form = "%d %B %Y" if text[0].isdigit() else "%B %d, %Y"
        assert datetime.strptime(text, form).date().isoformat() + "\n" == example.answer
        assert len(dates.encode(example.answer)) == dates.ANSWER_TOKENS


@settings(max_examples=5, deadline=None)
@given(SEEDS)
def test_training_never_shows_a_held_out_date(seed: int) -> None:
    # Half of all dates held out: without the check, a batch would be disjoint once in 2**64.
    task = DateTask(seed, 36_000)
    held_out = {example.answer for example in task.held_out}
    assert len(held_out) == 36_000
    assert not held_out & {example.answer for example in task.batch(0, 64)}


@given(SEEDS)
def test_a_batch_is_a_function_of_seed_and_step(seed: int) -> None:
    task = DateTask(seed)
    batches = [task.batch(step, 8) for step in (7, 8)]
    assert batches[0] != batches[1]
    again = DateTask(seed)
    assert [again.batch(step, 8) for step in (8, 7)] == batches[::-1]
    assert again.held_out == task.held_out
    other = DateTask(seed + 1)
    assert other.held_out != task.held_out
    assert other.batch(7, 8) != batches[0]


def test_a_datum_is_shifted_by_one_and_weighs_the_answer_alone() -> None:
    example = dates.example(date(1999, 12, 31))
    inputs, targets, weights = example.tokens()
    assert len(inputs) == len(targets) == len(weights)
    assert dates.decode([inputs[0], *targets]) == example.prompt + example.answer
    assert inputs[1:] == targets[:-1]
    answer = [target for target, weight in zip(targets, weights, strict=True) if weight]
    assert dates.decode(answer) == example.answer
    assert set(weights) == {0.0, 1.0}


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rates = [dates.learning_rate(step) for step in range(dates.STEPS + 20)]
    assert rates[:6] == pytest.approx([8e-4, 1.6e-3, 2.4e-3, 3.2e-3, 4e-3, 4e-3])
    assert set(rates[4:91]) == {4e-3}
    assert rates[120] == pytest.approx(2e-3)
    assert rates[90:150] == sorted(rates[90:150], reverse=True)
    assert rates[149:] == pytest.approx([4e-4] * 21)


def test_only_the_whole_answer_is_exact() -> None:
    example = dates.example(date(2024, 3, 3))
    for text in ("2024-03-03", "2024-03-03\n", "2024-03-03\nDate: 4"):
        assert dates.is_exact(example, text)
    for text in ("", "2024-03-04", "2024-03-0", "2024-03-031", " 2024-03-03", "\n2024-03-03"):
        assert not dates.is_exact(example, text)
    pair = [example, example]
    assert dates.exact_match(pair, ["2024-03-03", "2024-03-30"]) == 0.5
    with pytest.raises(ValueError, match="1 answers to 2 examples"):
        dates.exact_match(pair, ["2024-03-03"])
    with pytest.raises(ValueError, match="not 0"):
        DateTask(0, 0)


def test_the_task_imports_nothing_heavy() -> None:
    script = "import sys, holdfast.cli.dates; print({m.split('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    for heavy in (b"'torch'", b"'numpy'", b"'httpx2'", b"'pydantic'"):
        assert heavy not in modules
