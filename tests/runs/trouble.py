"""Rules of the search for interleavings: what is short, fails or is damaged for a while."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from holdfast.catalog.tables import contents, snapshots
from holdfast.engine.interface import ADAPTER_WEIGHTS
from holdfast.store import Blob, Manifest, MissingManifest

from .sim import World

FULL_FOR = 20.0
"""Seconds: a save tries for a minute."""


class Trouble(RuleBasedStateMachine):
    """What goes wrong around a server, of which its clients notice nothing but the time."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.damaged: set[Blob] = set()

    @property
    def _world(self) -> World:
        assert self.world is not None
        return self.world

    @precondition(lambda self: self._world.clock.now > self._world.full_until + 3 * FULL_FOR)
    @rule(part=st.sampled_from([0.01, 0.2, 1.0]))
    def fill_the_disk(self, part: float) -> None:
        self._world.full_until = self._world.clock.now + part * FULL_FOR

    @rule(reads=st.integers(1, 3))
    def refuse_reads(self, reads: int) -> None:
        self._world.refuse_reads = reads

    @precondition(lambda self: self._world.short_in is None)
    @rule(calls=st.integers(0, 15))
    def memory_is_short_soon(self, calls: int) -> None:
        """Of one call of an engine, which fails."""
        self._world.short_in = calls

    # Far fewer in a row than those after which a new run fails.
    @precondition(lambda self: self._world.unstarted + self._world.unstartable == 0)
    @rule(starts=st.integers(1, 2))
    def let_no_worker_start(self, starts: int) -> None:
        self._world.unstartable = starts

    @rule()
    def let_no_base_model_load(self) -> None:
        self._world.unloadable = 1

    @rule(pick=st.integers(0, 1 << 16))
    def damage_a_snapshot(self, pick: int) -> None:
        """The newest one of a run, where the run can be rebuilt without it."""
        found = list(self._damageable())
        if not found:
            return
        blob = found[pick % len(found)]
        path = self._world.root / "store" / "blobs" / blob.hash
        honest = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(bytes([honest[0] ^ 1]) + honest[1:])
        self.damaged.add(blob)

    def end_of_trouble(self) -> None:
        """From now on all is well."""
        world = self._world
        world.kill_in = world.die_in = world.short_in = None
        world.full_until = 0.0
        world.refuse_reads = world.refuse_commits = world.unstartable = world.unloadable = 0

    def _damageable(self) -> Iterator[Blob]:
        """Weights that the newest snapshot of a run needs, and nothing else does."""
        world = self._world
        fresh = {path.name.partition(".")[0] for path in (world.root / "store/fresh").iterdir()}
        for points, from_start in self._recovery_points():
            newest, *older = points
            if newest is None:
                continue
            blob = newest.files[ADAPTER_WEIGHTS]
            intact = older and older[0] is not None and not self.damaged & set(_blobs(older[0]))
            if not (intact or from_start) or blob in self.damaged or blob.hash in fresh:
                continue
            if sum(blob in _blobs(manifest) for manifest in self._manifests()) == 1:
                yield blob

    def _recovery_points(self) -> Iterator[tuple[list[Manifest | None], bool]]:
        """Of each run: its snapshots, newest first; whether it can be replayed from its start."""
        with self._world.catalog._engine.connect() as connection:
            rows = connection.execute(sa.select(snapshots).order_by(snapshots.c.seq.desc())).all()
            begins = sa.select(contents.c.run_id, contents.c.generation)
            begins = begins.where((contents.c.seq == 0) & (contents.c.part == "body"))
            starts = {tuple(row) for row in connection.execute(begins)}
        runs: dict[tuple[str, int], list[Manifest | None]] = {}
        for row in rows:
            runs.setdefault((row.run_id, row.generation), []).append(self._manifest(row.manifest))
        for key, points in runs.items():
            yield points, key in starts

    def _manifest(self, manifest_id: str) -> Manifest | None:
        try:
            return self._world.store.read_manifest(manifest_id)
        except MissingManifest:  # let go, and its row about to go
            return None

    def _manifests(self) -> Iterator[Manifest]:
        """All that the store holds, those of names and discarded ones included."""
        for directory in ("manifests", "unnamed"):
            for path in (self._world.root / "store" / directory).iterdir():
                manifest = self._manifest(path.name)
                if manifest is not None:
                    yield manifest


def _blobs(manifest: Manifest) -> list[Blob]:
    return list(manifest.files.values())
