"""The text the shipped base model is trained on: generated documents and Python's own reference.

Everything here is made by this file (and so carries this project's licence) except the passages
from ``pydoc_data.topics``, the language reference inside CPython (PSF-2.0).

The documents teach what a formatting task needs: repeat what stands above, copy a field, swap
fields and delimiters, pad a number, look a word up. The quickstart's task is kept out: no document
holds both the name of a month and a date written as digits, see `leaks_task`.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from random import Random

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Ada", "Alan", "Amina", "Boris", "Chen", "Clara", "Dora", "Emil", "Femi", "Grace", "Hana",
    "Igor", "Ines", "Jonas", "Kofi", "Lena", "Mira", "Nils", "Olga", "Pavel", "Rosa", "Sami",
    "Tara", "Uma", "Vera", "Yusuf", "Zoe",
)  # fmt: skip
CITIES = (
    "Accra", "Bergen", "Cairo", "Delhi", "Essen", "Florence", "Geneva", "Hanoi", "Izmir", "Kyoto",
    "Lagos", "Lima", "Malmo", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Turin", "Vienna",
)  # fmt: skip
NOUNS = (
    "apple", "bell", "boat", "book", "bridge", "cat", "chair", "clock", "coat", "cup", "dog",
    "door", "field", "fish", "garden", "hat", "hill", "horse", "house", "island", "key", "lamp",
    "letter", "map", "moon", "mouse", "nest", "paper", "pear", "pencil", "river", "road", "rope",
    "sail", "ship", "shoe", "stone", "street", "table", "tower", "train", "tree", "wall", "window",
)  # fmt: skip
ADJECTIVES = (
    "big", "black", "blue", "brave", "bright", "cold", "dark", "empty", "fast", "green", "happy",
    "heavy", "kind", "late", "light", "little", "long", "new", "old", "quiet", "red", "round",
    "short", "slow", "small", "strong", "tall", "warm", "white", "wide", "yellow", "young",
)  # fmt: skip
VERBS = (
    "bought", "carried", "dropped", "drew", "followed", "forgot", "found", "held", "hid", "kept",
    "lost", "made", "moved", "opened", "painted", "saw", "sold", "took", "washed", "wanted",
)  # fmt: skip
FIELDS = ("name", "city", "year", "item", "count", "code", "color", "id", "owner", "place")
WORDS = NOUNS + ADJECTIVES + VERBS

Pairs = list[tuple[str, str]]


def leaks_task(text: str) -> bool:
    """Whether a document holds a month's name beside a date in digits, the quickstart's task."""
    named = any(month[:3].lower() in text.lower() for month in MONTHS)
    return named and re.search(r"\d+([-/.])\d+\1\d+", text) is not None


# Pieces ------------------------------------------------------------------------------------------


def _syllables(rng: Random) -> str:
    return "".join(
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))
    )


def _scramble(rng: Random) -> str:
    alphabet = rng.choice(
        ("abcdefghijklmnopqrstuvwxyz", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    )
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 8)))


def _number(rng: Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 4)))


def _year(rng: Random) -> str:
    return str(rng.randint(1800, 2199))


def _token(rng: Random) -> str:
    return rng.choice((_syllables, _scramble, _number, _year, lambda r: r.choice(WORDS)))(rng)


def _phrase(rng: Random) -> str:
    return rng.choice((" ", " ", "-", ", ")).join(_token(rng) for _ in range(rng.randint(1, 4)))


def _written_date(rng: Random) -> str:
    day, month, year = rng.randint(1, 28), rng.choice(MONTHS), _year(rng)
    return rng.choice(
        (f"{day} {month} {year}", f"{month} {day}, {year}", f"{day} {month[:3]} {year}")
    )


def _sentence(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    forms = (
        f"{who} {rng.choice(VERBS)} the {thing}.",
        f"{who} and {other} {rng.choice(VERBS)} a {thing} in {rng.choice(CITIES)}.",
        f"The {thing} was {rng.choice(ADJECTIVES)}.",
        f"There were {rng.randint(2, 99)} {rng.choice(NOUNS)}s on the {rng.choice(NOUNS)}.",
        f"On {_written_date(rng)} {who} went to {rng.choice(CITIES)}.",
        f"It was a {rng.choice(ADJECTIVES)} {rng.choice(WEEKDAYS)} in {rng.choice(MONTHS)}.",
        f"{who} gave {other} the {thing}.",
    )
    return rng.choice(forms)


# Pairs of one hidden rule ------------------------------------------------------------------------


def _copy(rng: Random) -> Callable[[], tuple[str, str]]:
    def pair() -> tuple[str, str]:
        text = _phrase(rng)
        return text, text

    return pair


def _letters(rng: Random) -> Callable[[], tuple[str, str]]:
    change: Callable[[str], str] = rng.choice(
        (str.upper, str.lower, str.title, lambda s: s[::-1], lambda s: "-".join(s), lambda s: s[:3])
    )

    def pair() -> tuple[str, str]:
        text = rng.choice((_syllables, _scramble, lambda r: r.choice(WORDS + NAMES)))(rng)
        return text, change(text)

    return pair


def _pad(rng: Random) -> Callable[[], tuple[str, str]]:
    width = rng.randint(2, 4)

    def pair() -> tuple[str, str]:
        number = str(rng.randrange(10 ** rng.randint(1, width)))
        return number, number.zfill(width)

    return pair


def _reorder(rng: Random) -> Callable[[], tuple[str, str]]:
    count = rng.randint(2, 4)
    order = rng.sample(range(count), rng.randint(1, count))
    before, after = (
        rng.choice((" ", ", ", "/", ".", ":", ";")),
        rng.choice(("-", " ", "/", "_", ":")),
    )
    kinds = [rng.choice((_syllables, _scramble, _number, _year)) for _ in range(count)]

    def pair() -> tuple[str, str]:
        fields = [kind(rng) for kind in kinds]
        return before.join(fields), after.join(fields[i] for i in order)

    return pair


def _digit_dates(rng: Random) -> Callable[[], tuple[str, str]]:
    before, after = rng.choice(("/", ".", " ")), rng.choice(("-", "-", "/", "."))
    orders = ("dmy", "mdy", "ymd")
    source, target = rng.choice(orders), rng.choice((*orders, "ymd"))
    width = rng.choice((1, 2, 2))

    def pair() -> tuple[str, str]:
        parts = {"d": rng.randint(1, 28), "m": rng.randint(1, 12), "y": rng.randint(1800, 2199)}
        return (
            before.join(str(parts[part]) for part in source),
            after.join(str(parts[part]).zfill(width) for part in target),
        )

    return pair


def _lookup(rng: Random) -> Callable[[], tuple[str, str]]:
    keys = rng.sample(WORDS + NAMES + CITIES, rng.randint(2, 4))
    table = {key: rng.choice((_number, _scramble, lambda r: r.choice(WORDS)))(rng) for key in keys}

    def pair() -> tuple[str, str]:
        key = rng.choice(keys)
        return key, table[key]

    return pair


def _sum(rng: Random) -> Callable[[], tuple[str, str]]:
    def pair() -> tuple[str, str]:
        left, right = rng.randrange(20), rng.randrange(20)
        return f"{left} + {right}", str(left + right)

    return pair


RULES = (_copy, _copy, _letters, _pad, _reorder, _reorder, _digit_dates, _lookup, _sum)


def _show_pairs(rng: Random) -> str:
    pair = rng.choice(RULES)(rng)
    pairs = [pair() for _ in range(rng.randint(2, 6))]
    if rng.random() < 0.5:
        left, right = rng.choice(
            (("In", "Out"), ("Q", "A"), ("from", "to"), (_syllables(rng), _syllables(rng)),
             (rng.choice(WORDS).title(), rng.choice(WORDS).title()))
        )  # fmt: skip
        return "".join(f"{left}: {x}\n{right}: {y}\n" for x, y in pairs)
    arrow = rng.choice((" -> ", " => ", " = ", ": ", "\t", " | "))
    return "".join(f"{x}{arrow}{y}\n" for x, y in pairs)


# Documents ---------------------------------------------------------------------------------------


def _repeats(rng: Random) -> str:
    text = " ".join(_token(rng) for _ in range(rng.randint(2, 6)))
    return rng.choice(("\n", " ", " | ")).join([text] * rng.randint(2, 4)) + "\n"


def _record(rng: Random) -> str:
    keys = rng.sample(FIELDS, rng.randint(2, 5))
    values = {key: _token(rng) for key in keys}
    values |= {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "year": _year(rng)}
    style = rng.randrange(4)
    if style == 0:
        head = "; ".join(f"{key}: {values[key]}" for key in keys)
    elif style == 1:
        head = "{" + ", ".join(f'"{key}": "{values[key]}"' for key in keys) + "}"
    elif style == 2:
        head = " ".join(f"{key}={values[key]}" for key in keys)
    else:
        head = ",".join(keys) + "\n" + ",".join(values[key] for key in keys)
    asked = rng.sample(keys, rng.randint(1, len(keys)))
    return head + "\n" + "".join(f"{key}? {values[key]}\n" for key in asked)


def _story(rng: Random) -> str:
    return " ".join(_sentence(rng) for _ in range(rng.randint(2, 6))) + "\n"


def _question(rng: Random) -> str:
    who, verb, thing, city = (rng.choice(part) for part in (NAMES, VERBS, NOUNS, CITIES))
    questions = ((f"Who {verb} it?", who), ("What was it?", thing), ("Where?", city))
    asked = rng.sample(questions, rng.randint(1, 3))
    text = f"{who} {verb} a {rng.choice(ADJECTIVES)} {thing} in {city}."
    return text + "\n" + "".join(f"{question} {answer}\n" for question, answer in asked)


def _counting(rng: Random) -> str:
    start, step = rng.randrange(200), rng.choice((1, 1, 2, 5, 10))
    return " ".join(str(start + step * i) for i in range(rng.randint(5, 12))) + "\n"


def _calendar(rng: Random) -> str:
    names = rng.choice((MONTHS, WEEKDAYS))
    first = rng.randrange(len(names))
    run = [names[(first + i) % len(names)] for i in range(rng.randint(2, 6))]
    return rng.choice((", ", "\n", " ")).join(run) + "\n"


def _dated_note(rng: Random) -> str:
    date = _written_date(rng)
    return rng.choice((f"Date: {date}\n{_sentence(rng)}\n", f"{date}\n{date}\n", f"Due: {date}\n"))


def reference() -> str:
    """The language reference inside this Python, in the order of its topics."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


_REFERENCE = reference()


def _passage(rng: Random) -> str:
    start = _REFERENCE.index("\n", rng.randrange(len(_REFERENCE) - 1000)) + 1
    return _REFERENCE[start : start + rng.randint(200, 600)]


DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (_show_pairs, 40),
    (_repeats, 15),
    (_record, 10),
    (_question, 6),
    (_story, 8),
    (_counting, 3),
    (_calendar, 2),
    (_dated_note, 4),
    (_passage, 6),
)


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same ones for the same seed; none of them shows the task."""
    rng = Random(seed)
    makers = [maker for maker, _ in DOCUMENTS]
    shares = [share for _, share in DOCUMENTS]
    while True:
        text = rng.choices(makers, shares)[0](rng)
        if not leaks_task(text):
            yield text
