"""Commands where only `pip install holdfast` was done, without the packages of the server."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from holdfast.cli.main import SERVER_PACKAGES

PATH = "tinker://7c9e6679-7425-40de-944b-e07fc1f90ae7:train:0/weights/a"
WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from holdfast.cli.main import main
main(prog_name="holdfast")
"""


def call(without: frozenset[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import these packages."""
    program = WITHOUT.format(names=sorted(without))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["key", "list"],
        ["key", "create", "alice"],
        ["doctor"],
        ["checkpoint", "verify", "--all"],
        ["checkpoint", "import", "."],
        ["quickstart"],
    ],
    ids=" ".join,
)
def test_a_command_of_the_server_says_what_to_install(arguments: list[str], tmp_path: Path) -> None:
    check_hint(call(SERVER_PACKAGES, *arguments, "--data-dir", str(tmp_path)))


def test_one_missing_package_is_enough(tmp_path: Path) -> None:
    """The quickstart's own process needs none of it: what it starts does."""
    check_hint(call(frozenset({"uvicorn"}), "quickstart", "--data-dir", str(tmp_path)))


def check_hint(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(
        "Error: this command needs the server: pip install 'holdfast[server]' (there is no module "
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["quickstart", "--help"], ["key", "--help"]]
)
def test_help_needs_nothing(arguments: list[str]) -> None:
    done = call(SERVER_PACKAGES, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_that_asks_a_server_needs_none_of_it() -> None:
    done = call(SERVER_PACKAGES, "checkpoint", "info", PATH, "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "is a server running there?" in done.stderr


def test_another_missing_module_is_not_blamed_on_the_extra(tmp_path: Path) -> None:
    done = call(frozenset({"anyio"}), "serve", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "pip install" not in done.stderr
    assert "ModuleNotFoundError" in done.stderr


def test_the_packages_are_those_of_the_extra() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extra = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]["server"]
    names = {requirement.partition(">")[0].partition("[")[0] for requirement in extra}
    assert names == SERVER_PACKAGES - {
        "starlette",  # comes with FastAPI
        "huggingface_hub",  # comes with transformers
    }
