"""The wheel holds what an installation needs beside the modules."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
BUILD_SECONDS = 100


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what a checkout has, so that no earlier build's leftovers are in it."""
    directory = tmp_path_factory.mktemp("wheel")
    project = directory / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(SOURCE, project / "src", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "--disable-pip-version-check", "-w", str(directory)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("holdfast-*.whl")
    return zipfile.ZipFile(built)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "pattern", "least"),
    [
        ("the marker of types", "holdfast/py.typed", 1),
        ("the protocol's definition", "holdfast/protocol/*.proto", 1),
        ("the types of its generated code", "holdfast/protocol/*.pyi", 1),
        ("the shipped model", "holdfast/engine/models/holdfast-tiny/*", 6),
        ("the catalog's migrations", "holdfast/catalog/migrations/**/*.py", 2),
        ("every module", "holdfast/**/*.py", 50),
    ],
)
def test_it_is_in_the_wheel_byte_for_byte(
    wheel: zipfile.ZipFile, what: str, pattern: str, least: int
) -> None:
    wanted = {
        path.relative_to(SOURCE).as_posix(): path.read_bytes()
        for path in SOURCE.glob(pattern)
        if path.is_file()
    }
    assert len(wanted) >= least, f"the source has no {what}"
    missing = wanted.keys() - set(wheel.namelist())
    assert not missing, f"{what} is not in the wheel"
    assert all(wheel.read(name) == content for name, content in wanted.items())


def test_it_has_the_package_and_its_metadata_alone(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"holdfast", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in wheel.namelist() if name.endswith((".pyc", ".pth"))]


def test_its_metadata_names_the_command_and_keeps_the_server_optional(
    wheel: zipfile.ZipFile,
) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "holdfast = holdfast.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.MULTILINE)
    always = {name for name, rest in needed if "extra ==" not in rest}
    assert "httpx2" in always
    assert not always & {"torch", "transformers", "numpy"}
