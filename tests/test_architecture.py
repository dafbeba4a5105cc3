"""Modules import only along the arrows of the design, and light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "holdfast"

TORCH_FREE_ENGINE = (
    "engine.interface",
    "engine.payload",
    "engine.process",
    "engine.frames",
    "engine.revision",
)

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "protocol": (),
    "store": (),
    "catalog": (),
    "client": ("protocol",),
    "engine": ("store",),
    "runs": ("catalog", "store", "engine.interface", "engine.payload"),
    # The server puts the parts together; what it knows of the engine is free of torch.
    "server": ("protocol", "runs", "catalog", "store", *TORCH_FREE_ENGINE),
    "cli": ("client", "protocol", "server", "runs", "catalog", "store"),
}
"""What each package may import besides itself."""

SHARED = ("failpoints", "threads")
"""Modules of the top level that any package may import."""

HEAVY = ("torch", "transformers", "peft")


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(package: str, names: Iterator[str]) -> list[str]:
    allowed = (package, *SHARED, *MAY_IMPORT[package])
    ours = [name.removeprefix("holdfast.") for name in names if name.startswith("holdfast.")]
    # What the top level offers by its own name is the client's.
    ours = [n if n.partition(".")[0] in (*MAY_IMPORT, *SHARED) else "client" for n in ours]
    return [
        name
        for name in ours
        if not any(name == a or name.startswith(f"{a}.") or a.startswith(name) for a in allowed)
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0]
    if package in MAY_IMPORT:
        assert violations(package, imports(path)) == []


def test_an_import_against_the_arrows_is_found() -> None:
    assert violations("store", iter(["os", "holdfast.store.model", "holdfast.runs.run"])) == [
        "runs.run"
    ]
    assert violations("runs", iter(["holdfast.engine.core"])) == ["engine.core"]


def loaded_by(module: str) -> set[str]:
    """Top-level packages in memory after importing `module` in a fresh interpreter."""
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_api_process_imports_no_torch() -> None:
    # Nor a driver that only some catalogs need.
    assert loaded_by("holdfast.server.serve").isdisjoint({*HEAVY, "psycopg"})


def test_the_client_imports_neither_torch_nor_the_server() -> None:
    loaded = loaded_by("holdfast.client")
    assert loaded.isdisjoint(
        {*HEAVY, "fastapi", "sqlalchemy", "psycopg", "uvicorn", "starlette", "numpy"}
    )


def test_the_command_line_loads_nothing_it_does_not_need() -> None:
    assert loaded_by("holdfast.cli.main").isdisjoint({*HEAVY, "fastapi", "sqlalchemy", "numpy"})
