"""The quickstart's task: written dates to ISO 8601, as examples, batches and a score.

    3 March 2024   ->  2024-03-03
    March 3, 2024  ->  2024-03-03

Everything is a function of the seed, and a batch is a function of the seed and its step, so that a
resumed run draws what the uninterrupted run drew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)
STOP = "\n"
# Every answer is an ISO date and the stop: the most tokens a sample can need.
ANSWER_TOKENS = len("2024-03-03") + len(STOP)

# The recipe that teaches the shipped model the task: LoRA on every linear layer and lm_head.
STEPS, BATCH, RANK = 150, 48, 16
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.99, 1e-12, 0.0


def learning_rate(step: int) -> float:
    """The learning rate of a step, counted from 0.

    Five steps of warm-up to 4e-3, level until step 90, then down a line to a tenth of it at the end
    of the recipe, where it stays for whoever trains on.
    """
    return 4e-3 * max(0.1, min(1.0, (step + 1) / 5, (STEPS - step) / (0.4 * STEPS)))


@dataclass(frozen=True, slots=True)
class Example:
    """A question as the model sees it and the answer it should give, its stop included."""

    prompt: str
    answer: str

    def tokens(self) -> tuple[list[int], list[int], list[float]]:
        """Input tokens, target tokens and weights of one datum, each of the same length.

        The shipped model's token ids are the bytes of the text. Targets are the inputs shifted by
        one; the weight is 1 on the answer and 0 on the prompt.
        """
        prompt, answer = encode(self.prompt), encode(self.answer)
        tokens = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        return tokens[:-1], tokens[1:], weights


def encode(text: str) -> list[int]:
    """Token ids of the shipped byte-level model."""
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    """Text of sampled tokens; special tokens (256 and above) are dropped."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def example(day: date, *, month_first: bool = False) -> Example:
    """The example of one date, written ``3 March 2024`` or ``March 3, 2024``."""
    month = MONTHS[day.month - 1]
    text = f"{month} {day.day}, {day.year}" if month_first else f"{day.day} {month} {day.year}"
    return Example(f"Date: {text}\nISO: ", day.isoformat() + STOP)


class DateTask:
    """Training batches and a held-out set that share no date.

    ``held_out`` has ``size`` examples of ``size`` different dates, drawn from `seed`.
    """

    def __init__(self, seed: int, size: int = 50) -> None:
        days = (LAST - FIRST).days + 1
        if not 0 < size < days:
            raise ValueError(f"a held-out set has 1 to {days - 1} dates, not {size}")
        rng = Random(f"held-out {seed}")
        self._seed = seed
        self._held_out = [FIRST + timedelta(n) for n in rng.sample(range(days), size)]
        self._kept_out = frozenset(self._held_out)
        self.held_out = tuple(
            example(day, month_first=rng.random() < 0.5) for day in self._held_out
        )

    def batch(self, step: int, size: int) -> list[Example]:
        """The ``size`` training examples of a step; the same ones whenever it is asked for."""
        rng = Random(f"batch {self._seed} {step}")
        days = (LAST - FIRST).days + 1
        examples: list[Example] = []
        while len(examples) < size:
            day = FIRST + timedelta(rng.randrange(days))
            month_first = rng.random() < 0.5
            if day not in self._kept_out:
                examples.append(example(day, month_first=month_first))
        return examples


def is_exact(example: Example, text: str) -> bool:
    """Whether a sampled text, up to its first stop, is the whole answer."""
    return text.split(STOP, 1)[0] + STOP == example.answer


def exact_match(examples: Sequence[Example], texts: Sequence[str]) -> float:
    """The share of sampled texts that are exact, 0 to 1."""
    if len(examples) != len(texts) or not examples:
        raise ValueError(f"{len(texts)} answers to {len(examples)} examples")
    return sum(map(is_exact, examples, texts)) / len(examples)
