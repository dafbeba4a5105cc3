"""A campaign of faults against a real server: `scripts/fault-campaign --minutes N --seed S`.

Scripts run one after the other on one server, disturbed all the time; each must see exactly what
the first, undisturbed one saw.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disturb import Disturber
from tests.faults.script import Seen, run_script
from tests.support.models import save_small_model
from tests.support.server import ServerProcess


@dataclass(frozen=True)
class Outcome:
    """What a disturbed script saw, and what was done to it."""

    seen: list[Seen]
    done: Counter[str]
    kills: int
    not_reached: list[str]


class Campaign:
    """A server with fail points, its undisturbed trace, and disturbed ones."""

    def __init__(self, directory: Path, steps: int) -> None:
        self._steps = steps
        self._points = directory / "points"
        self._points.mkdir(parents=True)
        model = save_small_model("llama", directory / "model")
        self.server = ServerProcess(
            directory / "server",
            models={"small-llama": model},
            environment={"HOLDFAST_FAILPOINTS": str(self._points)},
        )

    def undisturbed(self) -> list[Seen]:
        return run_script(self.server, self._steps, lambda: None)

    def disturbed(self, seed: int) -> Outcome:
        """Run the script once while the server is disturbed at random."""
        return self._run(Disturber(self.server, self._points, seed))

    def dying_at_every_point(self) -> Outcome:
        """Run the script once while the server dies at each of its fail points."""
        disturber = Disturber(self.server, self._points, 0, only_points=True)
        disturber.arm_every_point()
        return self._run(disturber)

    def _run(self, disturber: Disturber) -> Outcome:
        disturber.start()
        try:
            seen = run_script(self.server, self._steps, disturber.progress)
        finally:
            disturber.stop()
        if disturber.error is not None:
            raise disturber.error
        return Outcome(seen, disturber.done, disturber.kills, disturber.not_reached)


def main() -> int:
    """Run until the time is up or a script saw a difference."""
    parser = argparse.ArgumentParser(prog="fault-campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"seed {options.seed}", flush=True)
    kills = survived = 0
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.steps)
        with campaign.server:
            expected = campaign.undisturbed()
            end = time.monotonic() + 60 * options.minutes
            seed = options.seed
            while time.monotonic() < end:
                try:
                    outcome = campaign.disturbed(seed)
                except BaseException:
                    print(campaign.server.log[-20_000:])
                    print(f"script {seed} failed")
                    raise
                kills += outcome.kills
                if outcome.seen != expected:
                    print(f"script {seed} saw a difference after {dict(outcome.done)}")
                    print(campaign.server.log[-5000:])
                    return 1
                survived += 1
                seed += 1
                print(f"{kills} kills, {survived} scripts identical  {dict(outcome.done)}")
                sys.stdout.flush()
    print(f"seed {options.seed}: {kills} kills, {survived} of {survived} scripts survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
