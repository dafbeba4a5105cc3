"""Save, overwrite, delete, copy, expire and collect garbage, crashed at every call."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.store import Blob, MissingManifest, StoreError
from tests.store.crash import PACKAGE, Died, Disk, Process
from tests.store.model import Actor, Clock, Promises, Step, fresh_process, open_on
from tests.store.samples import PLAIN, WEIGHTS, key_of, manifest_of

A = key_of(PLAIN)
B = replace(A, run="other:0", name="copy")
SOON = 2e9 + 10


def save(actor: Actor) -> None:
    actor.save("final", b"first weights")


def save_snapshot(actor: Actor) -> None:
    actor.save(None, b"first weights", seq=8)


def overwrite(actor: Actor) -> None:
    actor.save("final", b"second weights", seq=9)


def copy(actor: Actor) -> None:
    current = actor.store.resolve(A)
    assert current is not None
    manifest = actor.store.read_manifest(current)
    actor.publish(replace(manifest, run=B.run, name=B.name, parent=current))


def limit_life(actor: Actor) -> None:
    current = actor.store.resolve(B)
    assert current is not None
    actor.amend(B, actor.store.read_manifest(current), expires=SOON)


def discard_snapshot(actor: Actor) -> None:
    for manifest_id in list(actor.promises.unnamed):
        actor.discard(actor.promises.manifests[manifest_id])


def delete(actor: Actor) -> None:
    actor.delete(A)


def expire(actor: Actor) -> None:
    actor.clock.wall = max(actor.clock.wall, SOON)


def collect(actor: Actor) -> None:
    actor.sweep(times=6, apart=1900.0)


SCENARIOS: dict[str, list[Step]] = {
    "overwrite and snapshot": [save, save_snapshot, overwrite, discard_snapshot, collect],
    "copy, amend, expire": [save, copy, limit_life, delete, expire, collect],
    "delete and save again": [save, delete, collect, save, save_snapshot],
}


class Case:
    """One run of a scenario up to the call at which its process dies."""

    def __init__(
        self, steps: list[Step], die_at: int | None, without: str | None, *, beside: bool = False
    ) -> None:
        self.disk = Disk()
        self.clock = Clock()
        self.promises = Promises()
        self.process = Process(self.disk, die_at=die_at, without=without)
        if beside:
            self.other = open_on(Process(self.disk, without=without), self.clock)
        self.interrupted: Step | None = None
        self.finished = False
        try:
            store = open_on(self.process, self.clock)
            for step in steps:
                self.interrupted = step
                step(Actor(store, self.promises, self.clock))
            self.finished = True
        except Died:
            pass

    @property
    def state(self) -> object:
        """Equal where nothing happened in between that a crash could show."""
        return self.disk.changes, repr(self.promises.names), repr(self.promises.unnamed)

    def lose_power(self, seed: int, promises: Promises | None = None) -> None:
        for disk in self.disk.outcomes(seed, samples=3):
            (promises or self.promises).check(fresh_process(disk, self.clock), self.clock)


Mode = Callable[[list[Step], int, "str | None"], Case]
Crash = Callable[[Case, int], None]


def lose_power(case: Case, n: int) -> None:
    """The machine loses power at a call."""
    case.lose_power(n)


def kill_and_reopen(case: Case, n: int) -> None:
    """The process is killed; what the next one shows is there after a loss of power as well."""
    store = open_on(Process(case.disk, without=case.process.without), case.clock)
    case.promises.check(store, case.clock)
    case.lose_power(n, case.promises.now(store))


def kill_and_repeat(case: Case, n: int) -> None:
    """The process is killed; another that was running all the time does what it had begun."""
    if case.interrupted is not None:
        case.interrupted(Actor(case.other, case.promises, case.clock))
    case.promises.check(case.other, case.clock)
    case.lose_power(n)


def kill_and_use(case: Case, n: int) -> None:
    """The process is killed; the next one builds on what it finds."""
    actor = Actor(
        open_on(Process(case.disk, without=case.process.without), case.clock),
        case.promises,
        case.clock,
    )
    for manifest in list(case.promises.manifests.values()):
        with suppress(MissingManifest):
            if actor.store.read_manifest(manifest.id).name is not None:
                actor.name(manifest)
    for content_id, content in list(case.promises.contents.items()):
        blob = Blob(content_id, len(content))
        if actor.store.has_blob(blob):
            actor.publish(manifest_of({WEIGHTS: blob}, name=None))
    case.lose_power(n)


def kill_and_collect(case: Case, n: int) -> None:
    """The process is killed; another that was running all the time removes garbage."""
    collect(Actor(case.other, case.promises, case.clock))
    case.promises.check(case.other, case.clock)
    case.lose_power(n)


CRASHES: list[Crash] = [
    lose_power,
    kill_and_reopen,
    kill_and_repeat,
    kill_and_use,
    kill_and_collect,
]
BESIDE = (kill_and_repeat, kill_and_collect)


def run(steps: list[Step], crash: Crash, n: int | None, without: str | None = None) -> Case:
    return Case(steps, n, without, beside=crash in BESIDE)


def crash_everywhere(steps: list[Step], crash: Crash, without: str | None = None) -> int:
    """Run the scenario once for each of its calls; how many crashes differed."""
    last, different = None, 0
    for n in itertools.count():
        case = run(steps, crash, n, without)
        if case.state != last:
            last = case.state
            different += 1
            crash(case, n)
        if case.finished:
            return different
    raise AssertionError


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_nothing_promised_is_lost_whatever_the_call(steps: list[Step], crash: Crash) -> None:
    assert crash_everywhere(steps, crash) > 50


def syncs() -> dict[str, set[tuple[str, int]]]:
    """All syncs that the scenarios come to, each with the lines of code it goes through."""
    found: dict[str, set[tuple[str, int]]] = {}
    for steps in SCENARIOS.values():
        case = Case(steps, None, None)
        found |= case.process.syncs
    return found


def breaks_a_promise(without: str) -> bool:
    try:
        for steps, crash in itertools.product(SCENARIOS.values(), CRASHES):
            for left_out in run(steps, crash, None, without).process.left_out:
                for n in range(left_out, left_out + 15):  # where it most likely shows
                    crash(run(steps, crash, n, without), n)
        # Last those that most likely would have shown it above.
        late = [kill_and_reopen, kill_and_use, kill_and_collect, kill_and_repeat, lose_power]
        if "_sweep" in without:
            late.insert(0, kill_and_collect)
        for crash, steps in itertools.product(late, SCENARIOS.values()):
            crash_everywhere(steps, crash, without)
    except (AssertionError, StoreError):
        return True
    return False


@pytest.mark.parametrize("site", sorted(syncs()))
def test_leaving_out_any_one_sync_breaks_a_promise(site: str) -> None:
    assert breaks_a_promise(site)


def test_the_scenarios_come_to_every_sync_in_the_code() -> None:
    called = set().union(*syncs().values())
    written = {
        (path.name, call.lineno)
        for path in Path(PACKAGE).glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("sync", "sync_dir", "fsync")
        and path.name != "files.py"  # the port itself
    }
    assert written
    assert written <= called
