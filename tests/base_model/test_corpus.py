"""The text the model was trained on is reproducible and never shows the quickstart's task."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.cli import dates


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from tools.base_model import corpus

    return corpus


def test_no_document_shows_the_task(corpus: ModuleType) -> None:
    documents = list(islice(corpus.documents(0), 20_000))
    month = tuple(name[:3].lower() for name in dates.MONTHS)
    written = [text for text in documents if any(name in text.lower() for name in month)]
    assert len(written) > 500  # months do occur, so the next line has something to check
    assert not [text for text in written if corpus.leaks_task(text)]


@pytest.mark.parametrize("month_first", [False, True])
def test_the_guard_sees_the_task(corpus: ModuleType, month_first: bool) -> None:
    for example in dates.DateTask(0).batch(0, 50):
        assert corpus.leaks_task(example.prompt + example.answer)
        assert not corpus.leaks_task(example.prompt)
        assert not corpus.leaks_task(example.answer)


def test_documents_depend_on_the_seed_alone(corpus: ModuleType) -> None:
    first, again, other = (list(islice(corpus.documents(seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
