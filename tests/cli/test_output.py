"""Tables, as terminals of several widths show them."""

from __future__ import annotations

import pytest
from rich.console import Console

from holdfast.cli import output

ID = "2a065e3f838f44ae9eff403ad4c6d83b:train:0"


def lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> list[str]:
    """A table with a run's id, on a terminal of that width."""
    monkeypatch.setattr(output, "_console", lambda: Console(width=width, emoji=False))
    columns = ("run", "state", "position", "base model", "last request (UTC)")
    row = (ID, "live", 12, "meta-llama/Llama-3.1-8B", "2024-03-01 10:20")
    output.print_table(columns, [row], right="position", whole="run")
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_an_id_can_be_copied_as_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    shown = lines(monkeypatch, capsys, width)
    assert any(line.startswith(f"{ID} ") for line in shown)
    assert max(map(len, shown)) <= width


def test_on_a_narrow_terminal_nothing_of_it_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines(monkeypatch, capsys, 50)
    assert max(map(len, shown)) <= 50
    first = [line.partition(" ")[0] for line in shown]
    assert ID in "".join(first)
