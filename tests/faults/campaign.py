"""A campaign of faults against real servers: `scripts/fault-campaign --minutes N --seed S`.

One script after the other, each on a server of its own that is disturbed all the time; each must
see exactly what an undisturbed one saw. The script of seed S is disturbed as any of that seed.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disturb import KINDS, Disturbance, Disturber, Kind, plan
from tests.faults.script import BASE_MODEL, CLIENTS, Client, Nobody, Seen, run_script
from tests.faults.surroundings import CLOCK, SmallDisk
from tests.support.models import save_small_model
from tests.support.server import ServerProcess

_MEGABYTES = 256
"""Of the disk that is filled: several times what a script needs."""


@dataclass(frozen=True)
class Outcome:
    """What a disturbed script saw, and what was done to it."""

    seen: list[Seen]
    done: Counter[str]
    kills: int
    not_reached: list[str]


class Campaign:
    """A server with fail points and a clock of its own, and scripts on it."""

    def __init__(
        self,
        directory: Path,
        steps: int,
        clients: Sequence[Client] = CLIENTS,
        *,
        model: Path | None = None,
        disk: SmallDisk | None = None,
    ) -> None:
        self._steps = steps
        self._clients = clients
        self._disk = disk
        self._points = directory / "points"
        self._points.mkdir(parents=True)
        self._clock = directory / "clock"
        self.server = ServerProcess(
            directory / "server",
            models={BASE_MODEL: model or save_small_model("llama", directory / "model")},
            environment={
                "HOLDFAST_FAILPOINTS": str(self._points),
                "FAULTS_CLOCK": str(self._clock),
            },
            paths=[CLOCK],
        )

    def undisturbed(self) -> list[Seen]:
        return run_script(self.server, self._steps, Nobody(), self._clients)

    def disturbed(self, planned: Iterable[Disturbance]) -> Outcome:
        """Run the script once while the server is disturbed as planned."""
        disturber = self._disturber()
        return self._run(disturber, disturber.following(planned))

    def dying_at(self, points: Iterable[str]) -> Outcome:
        """Run the script once while the server dies at each of these fail points."""
        disturber = self._disturber()
        return self._run(disturber, disturber.dying_at(points))

    def _disturber(self) -> Disturber:
        return Disturber(self.server, self._points, self._clock, len(self._clients), self._disk)

    def _run(self, disturber: Disturber, disturbing: AbstractContextManager[None]) -> Outcome:
        with disturbing:
            seen = run_script(self.server, self._steps, disturber, self._clients)
        return Outcome(seen, disturber.done, disturber.kills, disturber.not_reached)


class Failed(Exception):
    """A script that saw something of what was done to its server."""


def main() -> int:
    """Run until the time is up or a script saw a difference."""
    parser = argparse.ArgumentParser(prog="fault-campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--client", choices=["sdk", "elixir", "both"], default="both")
    parser.add_argument(
        "--disturb", choices=KINDS, action="append", help="this kind alone, or several of them"
    )
    options = parser.parse_args()
    clients: dict[str, tuple[Client, ...]] = {
        "sdk": ("sdk", "sdk"),
        "elixir": ("elixir", "elixir"),
        "both": CLIENTS,
    }
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    kinds: Sequence[Kind] = options.disturb or KINDS
    if not _has_disks(root):
        print("no disk can be made here: a full one is left out", flush=True)
        kinds = [kind for kind in kinds if kind != "full disk"]
    print(f"seed {options.seed}", flush=True)
    model = save_small_model("llama", root / "model")
    end = time.monotonic() + 60 * options.minutes
    kills = survived = 0
    seed = options.seed
    try:
        with _campaign(root / "undisturbed", options.steps, clients[options.client], model) as one:
            expected = one.undisturbed()
        while time.monotonic() < end:
            seed = options.seed + survived
            with _campaign(root / str(seed), options.steps, clients[options.client], model) as one:
                outcome = one.disturbed(_until(end, plan(seed, kinds)))
                if outcome.seen != expected:
                    raise Failed(f"it saw a difference after {dict(outcome.done)}")
                if "Traceback" in one.server.log:
                    raise Failed("the log shows a defect")
            shutil.rmtree(root / str(seed))
            kills += outcome.kills
            survived += 1
            print(f"{kills} kills, {survived} scripts identical  {dict(outcome.done)}", flush=True)
    except BaseException:
        print(f"seed {options.seed}: {kills} kills, {survived} scripts identical, then one failed")
        print(f"its data and log are kept in {root}; the same again: --seed {seed}", flush=True)
        raise
    shutil.rmtree(root)
    print(f"seed {options.seed}: {kills} kills, {survived} of {survived} scripts survived")
    return 0


def _until(end: float, planned: Iterable[Disturbance]) -> Iterator[Disturbance]:
    """What is planned, while there is time: then the script comes to its end undisturbed."""
    for disturbance in planned:
        if time.monotonic() > end:
            return
        yield disturbance


@contextmanager
def _campaign(
    directory: Path, steps: int, clients: Sequence[Client], model: Path
) -> Iterator[Campaign]:
    """A campaign whose server has a disk of its own where one can be made."""
    server = directory / "server"
    try:
        disk = SmallDisk(server, _MEGABYTES)
    except OSError:
        disk = None
    try:
        campaign = Campaign(directory, steps, clients, model=model, disk=disk)
        with campaign.server:
            yield campaign
    finally:
        if disk is not None:
            shutil.copytree(server, directory / "kept")
            disk.remove()
            server.rmdir()
            (directory / "kept").rename(server)


def _has_disks(directory: Path) -> bool:
    try:
        SmallDisk(directory / "disk", 1).remove()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
