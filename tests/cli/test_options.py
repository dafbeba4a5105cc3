"""Options of `holdfast serve`: what they and its TOML file may say, and errors that name both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from holdfast.cli.serve import command as serve
from holdfast.runs.checkpoints import LONGEST_TTL, SHORTEST_TTL
from holdfast.server.settings import Settings


def read(tmp_path: Path, text: str, *arguments: str) -> dict[str, Any]:
    """The options that `serve` would get."""
    file = tmp_path / "serve.toml"
    file.write_text(text)
    return serve.make_context("serve", ["--config", str(file), *arguments]).params


@pytest.mark.parametrize(
    "text", ['model = "a=b"', 'model = ["a=b"]', '[model]\na = "b"'], ids=["text", "list", "table"]
)
def test_a_model_is_given_in_any_of_three_ways(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text)["model"] == ("a=b",)


def test_values_are_taken_unless_a_flag_says_otherwise(tmp_path: Path) -> None:
    text = 'port = 9000\nthreads = "3"\ntoken-budget = 64\nhost = "localhost"\ndata_dir = "/d"'
    params = read(tmp_path, text, "--port", "9001")
    assert (params["port"], params["threads"], params["token_budget"]) == (9001, 3, 64)
    assert (params["host"], params["data_dir"]) == ("localhost", Path("/d"))


def test_worker_memory_is_given_in_mib_and_none_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[Settings]()
    monkeypatch.setattr("holdfast.server.serve.serve", found.append)
    (tmp_path / "serve.toml").write_text("worker-memory = 3000")
    with_file = ["--config", str(tmp_path / "serve.toml")]
    for arguments in ([], with_file, [*with_file, "--worker-memory", "2000"]):
        result = CliRunner().invoke(serve, ["--data-dir", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
    environment = {"HOLDFAST_WORKER_MEMORY": "1000"}
    CliRunner().invoke(serve, ["--data-dir", str(tmp_path)], env=environment)
    assert [x.worker_memory >> 20 for x in found] == [0, 3000, 2000, 1000]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model = 3", "model", "3"),
        ("model = [3]", "model", "[3]"),
        ("[model]\na = 3", "model", "{'a': 3}"),
        ('port = "many"', "port", "'many'"),
        ("port = true", "port", "True"),
        ("port = [9000]", "port", "[9000]"),
        ("threads = 2.5", "threads", "2.5"),
        ("host = 3", "host", "3"),
        ("data_dir = 3", "data_dir", "3"),
        ('session-grace = "soon"', "session-grace", "'soon'"),
        ("session-grace = -1", "session-grace", "-1"),
        ("session-grace = true", "session-grace", "True"),
        ("session-grace = 90.5", "session-grace", "90.5"),
    ],
)
def test_a_wrong_value_is_named_with_key_and_file(
    tmp_path: Path, text: str, key: str, value: str
) -> None:
    with pytest.raises(click.BadParameter) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'serve.toml'}, {key}: {value} is not ")
    shown = CliRunner().invoke(serve, ["--config", str(tmp_path / "serve.toml")])
    assert shown.exit_code == 2
    assert "Invalid value for '--config'" in shown.output


def test_a_value_out_of_range_is_refused_unless_a_flag_goes_before_it(tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match="70000 is not in the range"):
        read(tmp_path, "port = 70000")
    assert read(tmp_path, "port = 70000", "--port", "9001")["port"] == 9001


# --- Times -----------------------------------------------------------------------------------

TIMES = {
    "session-grace": ("59", "1m", "1y", "366d"),
    "results-kept": ("1m", "2m", "1y", "366d"),
    "last-state-kept": ("59m", "1h", "10y", "11y"),
    "stop-within": ("0", "1", "1h", "61m"),
}
"""By option: too short, the shortest, the longest, too long."""


def settings_of(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str
) -> list[float]:
    """The times that the server would be started with, in the order of TIMES."""
    found: list[Settings] = []
    monkeypatch.setattr("holdfast.server.serve.serve", found.append)
    done = CliRunner().invoke(serve, arguments, env=environment)
    assert done.exit_code == 0, done.output
    (settings,) = found
    kept = settings.lifetimes
    return [kept.session_grace, kept.results_kept, kept.last_state_kept, settings.stop_within]


def test_times_are_given_as_people_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('session-grace = 7200\nresults_kept = "20m"\nlast-state-kept = "2w"\n')
    arguments = ("--config", str(file), "--session-grace", "90m")
    found = settings_of(monkeypatch, *arguments, HOLDFAST_STOP_WITHIN="45")
    assert found == [5400, 1200, 14 * 86400, 45]
    assert settings_of(monkeypatch, "--config", str(file))[0] == 7200


def test_times_that_are_not_given_are_those_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Settings(tmp_path)
    kept = known.lifetimes
    expected = [kept.session_grace, kept.results_kept, kept.last_state_kept, known.stop_within]
    assert settings_of(monkeypatch) == expected


@pytest.mark.parametrize("option", TIMES)
def test_a_time_is_refused_where_it_could_not_work(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_short, shortest, longest, too_long = TIMES[option]
    for taken in (shortest, longest):
        settings_of(monkeypatch, f"--{option}", taken)
    for refused, words in (
        (too_short, f"less than {shortest}"),
        (too_long, f"more than {longest}"),
    ):
        shown = CliRunner().invoke(serve, [f"--{option}", refused])
        assert shown.exit_code == 2
        assert f"Invalid value for '--{option}': {refused!r} is {words}" in shown.output


def test_a_last_state_is_kept_as_long_as_checkpoints_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for time, limit in (("1h", SHORTEST_TTL), ("10y", LONGEST_TTL)):
        kept = settings_of(monkeypatch, "--last-state-kept", time)[2]
        assert SHORTEST_TTL <= kept <= LONGEST_TTL
        assert abs(kept - limit) <= 10 * 86400


@pytest.mark.parametrize("text", ["soon", "-5m", "1.5h", "5 minutes", "m", "٣m", "9" * 13])
def test_what_is_no_time_is_told_with_times_that_are(text: str) -> None:
    shown = CliRunner().invoke(serve, [f"--session-grace={text}"])
    assert shown.exit_code == 2
    assert f"{text!r} is not a time such as 3600, 90m, 12h, 7d" in shown.output


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("prot", "'prot'; did you mean port or host?"),
        ("adapter_memmory", "'adapter_memmory'; did you mean adapter-memory or "),
        ("xyzzy", "'xyzzy'; known are adapter-memory, catalog, data-dir, "),
    ],
)
def test_an_unknown_key_is_named_with_what_it_may_have_been(
    tmp_path: Path, key: str, words: str
) -> None:
    with pytest.raises(click.BadParameter) as caught:
        read(tmp_path, f"{key} = 1")
    assert words in caught.value.message


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_device_is_taken(tmp_path: Path, device: str) -> None:
    assert read(tmp_path, f'device = "{device}"')["device"] == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda1", ""])
def test_what_is_no_device_is_said_before_anything_starts(tmp_path: Path, device: str) -> None:
    data = tmp_path / "data"
    shown = CliRunner().invoke(serve, ["--device", device, "--data-dir", str(data)])
    assert shown.exit_code == 2
    assert f"{device!r} is not cpu, cuda, cuda:N or auto" in shown.output
    assert not data.exists()
