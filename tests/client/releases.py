"""The scenario through releases of the official SDK, each in its own environment.

    python -m tests.client.releases 0.25.0 0.22.7

`scripts/test-sdk-releases` makes the environments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.server import ServerProcess

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("scenario.py")


def run(python: Path, client: str, server: ServerProcess, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-W", "ignore", SCRIPT, "--client", client, "--url", server.url, *more],
        env={**os.environ, "TINKER_TELEMETRY": "0", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise SystemExit(f"{python} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [name for name in expected if name != "path" and expected[name] != found.get(name)]


def main(releases: list[str]) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ServerProcess(Path(folder)) as server:
        ours = run(Path(sys.executable), "holdfast", server)
        for release in releases:
            python = ROOT / ".venv" / "sdk" / release / "bin" / "python"
            found = run(python, "tinker", server)
            report = {"the scenario": differences(ours, found)}
            crossed = {name: ours[name] for name in ("resumed", "cold")}
            theirs = run(python, "tinker", server, "--path", ours["path"])
            report["our checkpoint in it"] = differences(crossed, theirs)
            back = run(Path(sys.executable), "holdfast", server, "--path", found["path"])
            report["its checkpoint in ours"] = differences(crossed, back)
            for what, names in report.items():
                wrong += bool(names)
                print(
                    f"tinker {release}: {what}: {'equal' if not names else f'DIFFERS in {names}'}"
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
