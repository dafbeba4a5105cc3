"""A campaign of faults against real servers: `scripts/fault-campaign --minutes N --seed S`.

Scripts run side by side, each on a server of its own that is disturbed all the time; each must see
exactly what an undisturbed one saw. The script of seed S is disturbed as any of that seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.disturb import Disturber
from tests.faults.network import Network
from tests.faults.plan import KINDS, POSTGRES_KINDS, Disturbance, Kind, plan
from tests.faults.script import CLIENTS, Client, Nobody, Seen, run_script
from tests.faults.server import FaultyServer
from tests.faults.surroundings import SmallDisk
from tests.support.models import save_small_model
from tests.support.postgres import BINARIES, MISSING, Postgres, postgres_server

_MEGABYTES = 256
"""Of the disk that is filled: several times what a script needs."""
LIMITS = {"HUNG_AFTER": 20.0, "LOADING_TAKES": 30.0, "_WATCH_EVERY": 1.0}
"""Seconds after which a worker that hangs is ended: far less than a user's server waits."""


@dataclass(frozen=True)
class Outcome:
    """What a disturbed script saw, and what was done to it."""

    seen: list[Seen]
    done: Counter[str]
    kills: int
    not_reached: list[str]


class Campaign:
    """A server that is disturbed, and scripts on it."""

    def __init__(
        self,
        directory: Path,
        steps: int,
        clients: Sequence[Client] = CLIENTS,
        *,
        model: Path,
        limits: Mapping[str, float] | None = None,
        disk: SmallDisk | None = None,
        network: bool = False,
        postgres: Postgres | None = None,
        args: Sequence[str] = (),
        quick: bool = True,
    ) -> None:
        self._steps = steps
        self._clients = clients
        self._disk = disk
        self._network = network
        self.server = FaultyServer(
            directory / "server", model, limits=limits, postgres=postgres, args=args, quick=quick
        )

    @property
    def has_disk(self) -> bool:
        """Whether the server's disk is its own, so that it can be full."""
        return self._disk is not None

    def undisturbed(self) -> list[Seen]:
        return run_script(self.server, self._steps, Nobody(), self._clients)

    def disturbed(self, planned: Iterable[Disturbance]) -> Outcome:
        """Run the script once while the server is disturbed as planned."""
        return self._run(lambda disturber: disturber.following(planned))

    def dying_at(self, points: Sequence[str]) -> Outcome:
        """Run the script once while the server dies at each of these fail points."""
        every = len(self._clients) * self._steps // (2 * len(points))
        return self._run(lambda disturber: disturber.dying_at(points, every))

    def _run(self, disturbing: Callable[[Disturber], AbstractContextManager[None]]) -> Outcome:
        with Network(self.server) if self._network else nullcontext() as network:
            disturber = Disturber(self.server, len(self._clients), disk=self._disk, network=network)
            url = None if network is None else network.url
            with disturbing(disturber):
                seen = run_script(self.server, self._steps, disturber, self._clients, url=url)
        return Outcome(seen, disturber.done, disturber.kills, disturber.not_reached)


class Failed(Exception):
    """A script that saw something of what was done to its server."""


@dataclass
class _Series:
    """Scripts one after the other, some at a time, until the time is up or one has failed."""

    root: Path
    first_seed: int
    steps: int
    clients: Sequence[Client]
    kinds: Sequence[Kind]
    model: Path
    on_postgres: bool
    end: float
    """Monotonic time."""
    kills: int = 0
    survived: int = 0
    failed: list[tuple[int, BaseException]] = field(default_factory=list)
    """By the seed of the script."""

    def run(self, at_a_time: int) -> None:
        """Raises the first failure."""
        self._seeds = itertools.count(self.first_seed)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        undisturbed = self.root / "undisturbed"
        with _campaign(undisturbed, self.steps, self.clients, self.model, quick=False) as one:
            self._expected = one.undisturbed()
        with ThreadPoolExecutor(at_a_time) as pool:
            for done in [pool.submit(self._one_after_the_other) for _ in range(at_a_time)]:
                done.result()
        for _, error in self.failed:
            raise error

    def _one_after_the_other(self) -> None:
        while self._going_on():
            with self._lock:
                seed = next(self._seeds)
            try:
                outcome = self._one(seed)
            except BaseException as error:
                self.failed.append((seed, error))
                return
            with self._lock:
                self._count(outcome)

    def _going_on(self) -> bool:
        return time.monotonic() < self.end and not self.failed

    def _one(self, seed: int) -> Outcome:
        network = seed % 2 == 1  # the others reach their server directly
        kinds = [kind for kind in self.kinds if network or kind != "lost answers"]
        with (
            postgres_server() if self.on_postgres else nullcontext() as postgres,
            _campaign(
                self.root / str(seed),
                self.steps,
                self.clients,
                self.model,
                limits=LIMITS,
                network=network,
                postgres=postgres,
            ) as campaign,
        ):
            # At the end it is left alone, so that the script comes to its own.
            planned = itertools.takewhile(lambda _: self._going_on(), plan(seed, kinds))
            outcome = campaign.disturbed(planned)
            if outcome.seen != self._expected:
                raise Failed(f"it saw a difference after {dict(outcome.done)}")
            if "Traceback" in campaign.server.log:
                raise Failed("the log shows a defect")
        shutil.rmtree(self.root / str(seed))
        return outcome

    def _count(self, outcome: Outcome) -> None:
        self.kills += outcome.kills
        self.survived += 1
        rate = self.kills / (time.monotonic() - self._began) * 60
        print(
            f"{self.kills} kills ({rate:.0f} a minute), {self.survived} scripts identical"
            f"  {dict(outcome.done)}",
            flush=True,
        )


def main() -> int:
    """Run until the time is up or a script saw a difference."""
    parser = argparse.ArgumentParser(prog="fault-campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--client", choices=["sdk", "elixir", "own", "all"], default="all")
    parser.add_argument("--catalog", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument(
        "--disturb",
        choices=sorted({*KINDS, *POSTGRES_KINDS}),
        action="append",
        help="this kind alone, or several of them",
    )
    options = parser.parse_args()
    clients: dict[str, tuple[Client, ...]] = {
        "sdk": ("sdk", "sdk"),
        "elixir": ("elixir", "elixir"),
        "own": ("own", "own"),
        "all": CLIENTS,
    }
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    on_postgres = options.catalog == "postgresql"
    possible = POSTGRES_KINDS if on_postgres else KINDS
    for kind in options.disturb or ():
        if kind not in possible:
            parser.error(f"{kind!r} is nothing for a catalog on {options.catalog}")
    if on_postgres and BINARIES is None:
        parser.error(MISSING)
    kinds: Sequence[Kind] = options.disturb or possible
    if not has_disks(root):
        print("no disk can be made here: a full one is left out", flush=True)
        kinds = [kind for kind in kinds if not kind.endswith("full disk")]
    print(f"seed {options.seed}", flush=True)
    model = save_small_model("llama", root / "model")
    series = _Series(
        root,
        options.seed,
        options.steps,
        clients[options.client],
        kinds,
        model,
        on_postgres,
        time.monotonic() + 60 * options.minutes,
    )
    try:
        # Half of a script's time goes into clients' pauses.
        series.run(max(2, len(os.sched_getaffinity(0))))
    except BaseException:
        told = f"seed {options.seed}: {series.kills} kills, {series.survived} scripts identical"
        print(f"{told}, then one failed; all data and logs are kept in {root}", flush=True)
        for seed, error in series.failed:
            print(f"the same again: --seed {seed}   ({error!r})", flush=True)
        raise
    shutil.rmtree(root)
    print(f"seed {options.seed}: {series.kills} kills, {series.survived} scripts, all identical")
    return 0


@contextmanager
def _campaign(
    directory: Path,
    steps: int,
    clients: Sequence[Client],
    model: Path,
    *,
    limits: Mapping[str, float] | None = None,
    network: bool = False,
    postgres: Postgres | None = None,
    quick: bool = True,
) -> Iterator[Campaign]:
    """A campaign whose server has a disk of its own where one can be made."""
    server = directory / "server"
    disk = None
    with suppress(OSError):
        disk = SmallDisk(server, _MEGABYTES)
    try:
        campaign = Campaign(
            directory,
            steps,
            clients,
            model=model,
            limits=limits,
            disk=disk,
            network=network,
            postgres=postgres,
            quick=quick,
        )
        with campaign.server:
            yield campaign
    finally:
        if disk is not None:
            shutil.copytree(server, directory / "kept")
            disk.remove()
            server.rmdir()
            (directory / "kept").rename(server)


def has_disks(directory: Path) -> bool:
    """Whether this process may make a `SmallDisk`."""
    try:
        SmallDisk(directory / "disk", 1).remove()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
