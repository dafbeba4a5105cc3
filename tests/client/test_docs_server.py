"""The code of the guide, of the README and of the page about servers runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ServerProcess

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "persistence.md"
README = ROOT / "README.md"
SERVER = ROOT / "docs" / "server.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def code() -> str:
    found = blocks(GUIDE)
    assert len(found) >= 8
    return "\n".join(found)


def readme(server: ServerProcess) -> str:
    """The README's program, with this server's address in place of the usual one."""
    (program,) = blocks(README)
    usual = "http://127.0.0.1:8000"
    assert program.count(usual) == 1
    return program.replace(usual, server.url)


def run(server: ServerProcess, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script],
        env={
            "HOLDFAST_BASE_URL": server.url,
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": "tml-local",
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
        },
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.timeout(120)
def test_the_guides_code_runs_from_top_to_bottom(server: ServerProcess) -> None:
    done = run(server, code())
    assert done.returncode == 0, done.stderr
    assert re.search(r"^checkpoint_not_found user ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.timeout(120)
def test_its_assertions_are_meant(server: ServerProcess) -> None:
    """The weights-only load in place of the other makes the guide fail."""
    changed = code().replace("load_state_with_optimizer(path)", "load_state(path)", 1)
    assert changed != code()
    done = run(server, changed)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr


@pytest.mark.timeout(120)
def test_the_readmes_code_trains_saves_and_resumes(server: ServerProcess) -> None:
    done = run(server, readme(server))
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in done.stdout.splitlines()]
    assert [int(number) for number, _ in shown] == list(range(10))
    losses = [float(loss) for _, loss in shown]
    assert losses[-1] < losses[0]


@pytest.mark.timeout(120)
def test_the_readmes_program_fails_where_its_checkpoint_is_not(server: ServerProcess) -> None:
    changed = readme(server).replace("with_optimizer(path)", 'with_optimizer(path + "x")')
    assert changed != readme(server)
    done = run(server, changed)
    assert done.returncode != 0
    assert "NotFoundError" in done.stderr


ENDED = """
import holdfast

def losses(client, texts):
    \"\"\"A step on each text, through either client.\"\"\"
    package = holdfast if isinstance(client, holdfast.TrainingClient) else tinker
    found = []
    for text in texts:
        tokens = list(text)
        datum = package.Datum(
            model_input=package.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        forward = client.forward_backward([datum], "cross_entropy")
        client.optim_step(package.AdamParams(learning_rate=1e-2)).result()
        found.append(forward.result().metrics["loss:sum"])
    return found

def trained(texts):
    with holdfast.ServiceClient() as service:
        client = service.create_lora_training_client("holdfast-tiny", rank=4, seed=1).result()
        return client.model_id, losses(client, texts)

run_id, _ = trained([b"one", b"two"])
_, uninterrupted = trained([b"one", b"two", b"three", b"four"])
"""
"""A run whose session has ended, as `run_id`, and what another one showed that went on."""

SHOW = """
assert path == f"tinker://{run_id}/weights/auto.4"
print(losses(client, [b"three", b"four"]) == uninterrupted[2:])
"""


@pytest.mark.timeout(120)
def test_a_last_state_is_resumed_by_either_client(server: ServerProcess) -> None:
    official, own = blocks(SERVER)
    done = run(server, "".join([ENDED, official, SHOW, own, SHOW]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.timeout(120)
def test_it_would_not_go_on_from_there_without_its_optimizer(server: ServerProcess) -> None:
    _, own = blocks(SERVER)
    cold = own.replace("_with_optimizer", "")
    assert cold != own
    done = run(server, "".join([ENDED, cold, SHOW]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
