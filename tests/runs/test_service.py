"""Runs under every interleaving that a search finds, against a sequential model.

A Hypothesis state machine chooses what clients do and what goes wrong; the world it happens in
(`sim`) has one thread and virtual time, so that an interleaving follows from what was chosen and
a failing one is shrunk to a few steps. The pauses of disk, database and engine come from a seed
that Hypothesis chooses too.

`HOLDFAST_EXAMPLES` sets the number of examples, of 60 steps each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdfast.catalog.tables import operations
from holdfast.engine.interface import ADAPTER_WEIGHTS, OPTIMIZER_STATE, LoraConfig, RunConfig
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import Body, CreateFromState, Load, OptimStep, Save, SaveSampler
from holdfast.runs.engines import DEFAULT_ADAPTER_MEMORY, HUNG_AFTER, LOADING_TAKES
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.journal import Failure, Outcome, RunKey
from holdfast.runs.order import REFUSAL_REACHES
from holdfast.runs.poison import MOST_BEGUN_AGAIN
from holdfast.runs.run import Run
from holdfast.runs.service import Lifetimes
from holdfast.runs.sessions import Session
from holdfast.store import NameKey

from .model import KEPT_AFTER_READ, Done, ModelRun, Names, Op, agree
from .sim import World
from .toy import NAME, ToyState, batch, mixed
from .trouble import Trouble

EXAMPLES = int(os.environ.get("HOLDFAST_EXAMPLES", "25"))
OWNER = "local"
FOR_TWO = 1700
"""Bytes that two of the toy's states take."""
BRIEF = "brief"
"""How names begin that expire after an hour."""
GIVEN_UP = "what is pending fails"
DEFECTS = ("driver failed", "publishing failed", "background work failed", "a defect")

numbers = st.integers(0, 1 << 16)
names = st.sampled_from(["a", "b", "c"])


def steps(rate: float = 0.5) -> OptimStep:
    return OptimStep(rate, 0.9, 0.95, 1e-12, 0.0, 0.0)


async def create_run(
    world: World,
    session: Session,
    number: int,
    lora: Mapping[str, Any],
    *,
    base_model: str = NAME,
    key: str | None = None,
) -> Run:
    """A model as a client creates it; `key` tells a repetition."""
    return await world.runs.create(
        session,
        number,
        base_model=base_model,
        lora=lora,
        optimizer="adamw",
        user_metadata=None,
        idempotency_key=key,
    )


class Clients(Trouble):
    """What clients do, what happens to the server, and what must be true of the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = structlog.testing.capture_logs()
        self.events = self.logs.__enter__()
        self.sessions: list[Session] = []
        self.all: list[ModelRun] = []
        self.names: Names = {}
        self.deaths_since_quiet = 0
        self.hangs_loading = False
        """A worker may be hanging that has not loaded its base model yet."""
        self.count = 0
        self.other_numerics = False
        self.hours = 0
        self.ended_at: dict[str, float] = {}

    @initialize(
        seed=numbers,
        client=st.sampled_from(["python", "elixir"]),
        memory=st.sampled_from([DEFAULT_ADAPTER_MEMORY, FOR_TWO, 1]),
    )
    def begin(self, seed: int, client: str, memory: int = DEFAULT_ADAPTER_MEMORY) -> None:
        # Sweeps would take most of the time, when hours pass.
        lifetimes = Lifetimes(between_sweeps=1000.0)
        self.world = World(seed, lifetimes=lifetimes, adapter_memory=memory)
        self.open_session(client)
        self.create(0, 1)

    # --- Sessions and runs -------------------------------------------------------------------

    @precondition(lambda self: len(self.sessions) < 2)
    @rule(client=st.sampled_from(["python", "elixir"]))
    def open_session(self, client: str) -> None:
        self.count += 1
        key = f"session {self.count}"
        self.sessions.append(
            self._do(
                lambda: self._world.runs.sessions.create(
                    OWNER,
                    client=client,
                    idempotency_key=key,
                    sdk_version=None,
                    tags=[],
                    user_metadata=None,
                    project_id=None,
                    display_name=None,
                )
            )
        )

    @precondition(lambda self: self.sessions and len(self.all) < 5)
    @rule(pick=numbers, rank=st.sampled_from([1, 1, 2]))
    def create(self, pick: int, rank: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        self.count += 1
        number, key = self.count, f"create {self.count}"
        lora: dict[str, Any] = {"rank": rank, "seed": pick}

        async def call() -> Run:
            return await create_run(self._world, session, number, lora, key=key)

        run = self._do(call)
        assert self._do(call).key == run.key, "a repeated creation made another run"
        config = RunConfig(NAME, LoraConfig(rank=rank, seed=pick))
        self._add_run(run, session, bodies.Create.of(config))

    @precondition(lambda self: self.sessions and len(self.all) < 5 and self._stable())
    @rule(
        pick=numbers,
        optimizer=st.booleans(),
        exists=st.sampled_from([True, True, False]),
        beside=st.integers(0, 4),
    )
    def create_from_state(self, pick: int, optimizer: bool, exists: bool, beside: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        stable = self._stable()
        key = stable[pick % len(stable)]
        name = key.name if exists else "nowhere"
        body = CreateFromState(key.run, key.kind, name, optimizer, [OWNER])
        self.count += 1
        number, idempotency = self.count, f"create {self.count}"
        run = self._do(
            lambda: self._world.runs.create_from_state(
                session, number, body, user_metadata=None, idempotency_key=idempotency
            )
        )
        model = self._add_run(run, session, body)
        if not exists or key.kind != "weights":
            model.ending = "creation_failed"
            self._do_beside(model, beside, pick, _nothing)

    @precondition(lambda self: self._failed())
    @rule(pick=numbers)
    def create_again(self, pick: int) -> None:
        """Under the number of a creation that failed."""
        failed = self._failed()
        before = failed[pick % len(failed)]
        session = next(s for s in self.sessions if before.id.startswith(s.id))
        number = int(before.id.rpartition(":")[2])
        self.count += 1
        key = f"create {self.count}"
        lora: dict[str, Any] = {"rank": 1, "seed": pick}

        async def call() -> Run:
            return await create_run(self._world, session, number, lora, key=key)

        run = self._do(call)
        assert run.key == RunKey(before.id, before.generation + 1)
        config = RunConfig(NAME, LoraConfig(rank=1, seed=pick))
        self._add_run(run, session, bodies.Create.of(config))

    def _failed(self) -> list[ModelRun]:
        """Runs whose creation is known to have failed, and that were not created again."""
        newest = {run.id: run for run in self.all}
        open_ = tuple(session.id for session in self.sessions)
        return [
            run
            for run in newest.values()
            if run.id.startswith(open_) and run.ending == "creation_failed" and run.ops[0].seen
        ]

    def _add_run(self, run: Run, session: Session, body: Body) -> ModelRun:
        model = ModelRun(run.key.id, session.client, self.names, run.key.generation)
        model.add(Op(0, body.kind, body, request_id=run.key.request_id(0)), self._now)
        self.all.append(model)
        return model

    # --- Operations --------------------------------------------------------------------------

    @precondition(lambda self: self._open())
    @rule(
        pick=numbers,
        kind=st.sampled_from([bodies.FORWARD_BACKWARD] * 3 + [bodies.FORWARD]),
        x=numbers,
        odd=st.sampled_from([None] * 8 + ["fail", "oom", "kills", "ends", "not_finite"]),
    )
    def compute(self, pick: int, kind: str, x: int, odd: str | None) -> None:
        code = {"fail": "invalid_datum", "oom": "out_of_memory"}.get(odd or "")
        if odd == "kills" and self.deaths_since_quiet:
            odd = None  # deaths by chance would fail its neighbours
        body = batch(
            x,
            fail=code,
            kills=odd == "kills",
            ends=odd == "ends",
            not_finite=odd == "not_finite",
        )
        self._submit(self._pick(pick), kind, body)

    @precondition(lambda self: self._open())
    @rule(pick=numbers, rate=st.sampled_from([0.1, 0.1, 0.2, -1.0]))
    def optim_step(self, pick: int, rate: float) -> None:
        self._submit(self._pick(pick), bodies.OPTIM_STEP, steps(rate))

    @precondition(lambda self: self._open())
    @rule(pick=numbers, count=st.integers(2, 5))
    def train(self, pick: int, count: int) -> None:
        run = self._pick(pick)
        for i in range(count):
            self._submit(run, bodies.FORWARD_BACKWARD, batch(pick + i))
            self._submit(run, bodies.OPTIM_STEP, steps())

    @precondition(lambda self: self._open())
    @rule(pick=numbers, name=names, overwrite=st.booleans(), sampler=st.sampled_from([0, 0, 1]))
    def save(self, pick: int, name: str, overwrite: bool, sampler: int) -> None:
        run = self._pick(pick)
        key = NameKey(run.id, "sampler_weights" if sampler else "weights", name)
        if self._foreign_readers(key):
            return
        if sampler:
            self._submit(run, bodies.SAVE_SAMPLER, SaveSampler(name))
        else:
            self._submit(run, bodies.SAVE_WEIGHTS, Save(name, None, overwrite))

    @precondition(lambda self: self._open())
    @rule(pick=numbers, name=names, optimizer=st.booleans())
    def load_own(self, pick: int, name: str, optimizer: bool) -> None:
        run = self._pick(pick)
        self._submit(run, bodies.LOAD_WEIGHTS, Load(run.id, "weights", name, optimizer, [OWNER]))

    @precondition(lambda self: self._open() and self._stable())
    @rule(pick=numbers, which=numbers, optimizer=st.booleans())
    def load_any(self, pick: int, which: int, optimizer: bool) -> None:
        stable = self._stable()
        key = stable[which % len(stable)]
        body = Load(key.run, key.kind, key.name, optimizer, [OWNER])
        self._submit(self._pick(pick), bodies.LOAD_WEIGHTS, body)

    @precondition(lambda self: self._stable())
    @rule(which=numbers)
    def delete(self, which: int) -> None:
        stable = [k for k in self._stable() if not self._readers(k)]
        if not stable:
            return
        key = stable[which % len(stable)]
        try:
            self._do(lambda: self._world.runs.checkpoints.delete(key, OWNER))
        except RunError as error:  # deleted by an attempt that was killed before it answered
            assert error.code == "checkpoint_not_found" and self._world.kills
        del self.names[key]

    @precondition(lambda self: self._open())
    @rule(pick=numbers)
    def save_for_a_while(self, pick: int) -> None:
        run = self._pick(pick)
        self.count += 1
        body = Save(f"{BRIEF}.{self.count}", 3600)
        self._submit(run, bodies.SAVE_WEIGHTS, body)

    # --- Samplers ----------------------------------------------------------------------------

    @precondition(lambda self: self.sessions and self._published())
    @rule(pick=numbers, which=numbers)
    def sample(self, pick: int, which: int) -> None:
        """Of a checkpoint's weights; whoever loses a request sends it again."""
        session = self.sessions[pick % len(self.sessions)]
        published = self._published()
        key = published[which % len(published)]
        manifest_id = self._world.store.resolve(key)
        assert manifest_id is not None
        weights = self._world.store.read_manifest(manifest_id).files[ADAPTER_WEIGHTS].hash
        self.count += 1
        number, body = self.count, b"prompt %d" % which
        sampler = self._do(
            lambda: self._world.runs.samplers.create_from_path(session.id, OWNER, number, key, None)
        )

        async def ask() -> Outcome:
            samplers, seq = self._world.runs.samplers, 0
            while True:
                seq += 1
                samplers.submit(sampler, seq, body, body)
                with suppress(RunError):
                    for _ in range(100):
                        self._beat()
                        found = await samplers.outcome(sampler.id, seq, 30.0)
                        if found is not None:
                            return found
                    raise AssertionError("the sample does not end")

        found = self._do(ask)
        assert found.result == b"%d" % mixed("sample", weights, body), found

    @precondition(lambda self: self.sessions and self._published())
    @rule(pick=numbers, which=numbers, count=st.integers(1, 10))
    def sample_without_waiting(self, pick: int, which: int, count: int) -> None:
        """Beside whatever comes."""
        session = self.sessions[pick % len(self.sessions)]
        published = self._published()
        key = published[which % len(published)]
        self.count += 1
        number = self.count

        async def ask() -> None:
            samplers = self._world.runs.samplers
            sampler = await samplers.create_from_path(session.id, OWNER, number, key, None)
            for seq in range(1, count + 1):
                samplers.submit(sampler, seq, b"prompt", b"prompt")

        self._do(ask)

    # --- Disorder ----------------------------------------------------------------------------

    @precondition(lambda self: self._open())
    @rule(pick=numbers)
    def leave_a_gap(self, pick: int) -> None:
        run = self._pick(pick)
        self._submit(run, bodies.FORWARD_BACKWARD, batch(pick), seq=run.highest + 2)

    @precondition(lambda self: self._open())
    @rule(
        pick=numbers,
        which=numbers,
        kind=st.sampled_from([bodies.FORWARD_BACKWARD, bodies.OPTIM_STEP]),
    )
    def fill_a_gap(self, pick: int, which: int, kind: str) -> None:
        run = self._pick(pick)
        open_ = run.holes + [n for n in run.ops if run.skipped(n)]
        if open_:
            body: bytes | Body = steps() if kind == bodies.OPTIM_STEP else batch(which)
            self._submit(run, kind, body, seq=open_[which % len(open_)])

    @precondition(lambda self: self._open())
    @rule(
        pick=numbers,
        which=numbers,
        kind=st.sampled_from([bodies.FORWARD_BACKWARD, bodies.OPTIM_STEP]),
        gap=st.booleans(),
    )
    def refuse(self, pick: int, which: int, kind: str, gap: bool) -> None:
        run = self._pick(pick)
        open_ = run.holes + [n for n in run.ops if run.skipped(n)]
        seq = open_[which % len(open_)] if gap and open_ else run.highest + 1
        failure = Failure("invalid_datum", f"request {seq} is no good")

        async def call() -> None:
            await (await self._world.runs.live(run.id, OWNER)).refuse(seq, kind, failure)

        started = self._now
        run.refused_to = max(run.refused_to, max(seq, run.highest) + REFUSAL_REACHES)
        self._do(call)
        op = Op(seq, kind, b"", "refused", self._request_id(run, seq), refused_at=started)
        self._enter(run, op, started)

    @precondition(lambda self: self._open())
    @rule(pick=numbers, which=numbers)
    def duplicate(self, pick: int, which: int) -> None:
        run = self._pick(pick)
        # What was refused is refused again, before it comes here.
        sent = [op for op in run.ops.values() if op.body and op.seq]
        if sent:
            op = sent[which % len(sent)]
            assert self._send(run, op) == op.request_id

    @precondition(lambda self: self._open())
    @rule(pick=numbers, which=numbers)
    def conflict(self, pick: int, which: int) -> None:
        run = self._pick(pick)
        sent = [op for op in run.ops.values() if op.fate != "missing" and op.seq]
        if not sent:
            return
        op = sent[which % len(sent)]
        other = Op(op.seq, bodies.FORWARD_BACKWARD, batch(-which - 1))
        try:
            answer = self._send(run, other)
        except RunError as error:
            assert error.code == "sequence_conflict"
        else:
            # The row goes some time after its outcome was read, or was the answer itself.
            assert answer == op.request_id
            since = self._kept_since(op)
            assert since is not None and self._now - since >= KEPT_AFTER_READ - 1

    # --- What happens to the server ----------------------------------------------------------

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.1, 0.5, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self._world.let(seconds)

    @precondition(lambda self: self._may_end())
    @rule(points=st.integers(0, 40))
    def kill_soon(self, points: int) -> None:
        self._world.kill_in = points

    @precondition(lambda self: self._may_end())
    @rule()
    def kill(self) -> None:
        self._world.kill()

    @precondition(lambda self: self._may_end())
    @rule(within=st.sampled_from([20.0, 20.0, 1.0, 0.1]))
    def restart(self, within: float = 20.0) -> None:
        self._world.restart(within)

    @precondition(lambda self: self._open() and self._may_end())
    @rule(pick=numbers, beside=st.integers(1, 6), within=st.sampled_from([20.0, 0.1]))
    def restart_while_asked(self, pick: int, beside: int, within: float) -> None:
        """What is refused because the server stops is not there, what is taken is done."""
        run, runs = self._pick(pick), self._world.runs
        sent = self._next_requests(run, beside, pick)
        accepted, refused = set(), set()

        async def ask() -> None:
            for op in sent:
                assert isinstance(op.body, bytes)
                try:
                    live = await runs.live(run.id, OWNER)
                    assert await live.submit(op.seq, op.kind, op.body) == op.request_id
                    accepted.add(op.seq)
                except Unavailable:
                    refused.add(op.seq)
                await asyncio.sleep(0.005)

        started = self._now
        self._world.restart(within, beside=ask)
        for op in sent:
            if op.seq in accepted or self._in_journal(run, op.seq) is not None:
                assert op.seq not in refused, f"{op} was refused, and taken all the same"
                self._enter(run, op, started)

    @precondition(lambda self: self.deaths_since_quiet < 2)
    @rule(points=st.integers(0, 20))
    def kill_the_worker_soon(self, points: int) -> None:
        if self._world.die_in is None:
            self.deaths_since_quiet += 1
            self._world.die_in = points

    @precondition(lambda self: self.deaths_since_quiet < 2)
    @rule()
    def kill_the_worker(self) -> None:
        self.deaths_since_quiet += 1
        self._world.kill_worker()

    @precondition(lambda self: self.deaths_since_quiet < 2)
    @rule()
    def hang_the_worker(self) -> None:
        """It answers nothing more: noticed once there is something to do."""
        self.deaths_since_quiet += 1
        if self._world.lives:
            self.hangs_loading |= self._world.runs.engines[NAME].state != "ready"
            self._world.lives[-1].hang()

    @rule()
    def recycle_the_worker(self) -> None:
        """As if it had grown too much."""

        async def begin() -> None:
            self._world.runs.engines[NAME].recycle()

        self._do(begin)

    @rule()
    def change_the_numerics(self) -> None:
        """The next worker computes on something else, which changes no integer."""
        self.other_numerics = True
        self._world.fingerprint = {"toy": self._world.fingerprint["toy"] + 1}

    @rule(seconds=st.sampled_from([-2 * 86400.0, -5.0, 3600.0, 86400.0]))
    def the_clock_jumps(self, seconds: float) -> None:
        """The system's clock, which nothing that is waited for goes by."""
        self._world.clock.wall += seconds

    @precondition(lambda self: self.hours < 3)
    @rule()
    def pass_an_hour(self) -> None:
        """What expires or is garbage goes in sweeps that are an hour apart."""
        self.hours += 1  # each takes as long as many other steps
        self._world.short_in = None
        for seconds in (30.0, *[1000.0] * 4):
            self._beat()
            self._world.let(seconds)
            self._note_shortages()

    @rule(commits=st.integers(1, 3))
    def refuse_commits(self, commits: int) -> None:
        self._world.refuse_commits = commits

    # --- Answers -----------------------------------------------------------------------------

    @precondition(lambda self: self.all)
    @rule(pick=numbers, which=numbers, timeout=st.sampled_from([0.0, 0.05, 2.0]))
    def poll(self, pick: int, which: int, timeout: float) -> None:
        run = self.all[pick % len(self.all)]
        asked = [op for op in run.ops.values() if op.request_id]
        op = asked[which % len(asked)]
        outcome, _ = self._poll(op, timeout)
        if outcome is not None:
            self._check(run, op, outcome)
            if which % 2:
                self._world.runs.delivered(op.request_id)
                op.read_at = op.read_at or self._now

    @rule()
    def everything_ends(self) -> None:
        """Nothing waits for ever: each future has its outcome after the leases at the latest."""
        self.all_end()
        if not any(worker.hangs for worker in self._world.lives[-1:]):  # with nothing to do, still
            self.deaths_since_quiet = 0
            self.hangs_loading = False
        self._world.die_in = self._world.short_in = None

    def all_end(self) -> None:
        """Wait for every outcome, and check it."""
        for run in self.all:
            limit = self._now + 120 + 400 * (len(run.holes) + 1) + 60 * (1 + len(self.all))
            limit += self.deaths_since_quiet * (HUNG_AFTER + 60)
            limit += LOADING_TAKES if self.hangs_loading else 0
            for op in list(run.ops.values()):
                while op.request_id and op.seen is None:
                    outcome, note = self._poll(op, 30.0)
                    if outcome is not None:
                        self._check(run, op, outcome)
                    assert self._now < limit, f"{op} of {run.id} does not end ({note})"

    # --- Ends --------------------------------------------------------------------------------

    @precondition(lambda self: self._open() and len(self.all) > 1)
    @rule(pick=numbers, beside=st.integers(0, 4))
    def unload(self, pick: int, beside: int) -> None:
        run = self._pick(pick)
        if self._uncertain_readers(run):
            return
        run.ending = "model_unloaded"
        self._do_beside(run, beside, pick, partial(self._unload, run))

    async def _unload(self, run: ModelRun) -> None:
        if run.asked_to_end:  # by an attempt that was killed: what it began is not taken back
            await asyncio.sleep(3.0)
        run.asked_to_end = True
        await self._world.runs.unload(run.id, OWNER)

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(pick=numbers, beside=st.integers(0, 4))
    def end_session(self, pick: int, beside: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        mine = [run for run in self.all if run.id.startswith(session.id)]
        if any(self._uncertain_readers(run) for run in mine):
            return
        self.sessions.remove(session)
        open_ = [run for run in mine if run.ending is None]
        for run in mine:
            run.ending = run.ending or "session_ended"
        self.ended_at[session.id] = self._now

        async def end() -> None:
            await self._world.runs.end_session(session.id, "success")

        if open_:
            self._do_beside(open_[pick % len(open_)], beside, pick, end)
        else:
            self._do(end)
        self._world.let(1.0)

    def teardown(self) -> None:
        if self.world is None:
            self.close()
            return
        try:
            self.end_of_trouble()
            self.everything_ends()
            for run in self._open():
                self._submit(run, bodies.SAVE_WEIGHTS, Save("at.the.end"))
            self.everything_ends()
            self._check_checkpoints()
            self._check_logs()
            waiting = self._world.runs.samplers._waiting
            until = self._now + 10.0 + HUNG_AFTER + 60  # a worker that hangs is found by then
            while waiting and self._now < until:
                self._world.let(10.0)
            assert len(waiting) == 0
        finally:
            self.close()

    def close(self) -> None:
        """Leave the simulated world."""
        if self.world is not None:
            self.world.close()
        self.logs.__exit__(None, None, None)

    # --- Checks ------------------------------------------------------------------------------

    def _check(self, run: ModelRun, op: Op, found: Outcome) -> None:
        code = None if found.failure is None else found.failure.code
        if code == "result_expired":
            since = self._kept_since(op)
            assert since is not None and self._now - since >= KEPT_AFTER_READ - 1
            op.seen = op.seen or found
            return
        if op.seen is not None:
            assert found == op.seen, f"{op} had another outcome before"
            return
        op.seen = found
        if op.fate not in (
            "accepted",
            "short",
        ):  # settled when it came, whatever is still open before it
            assert code == op.refusal, f"{op} has the outcome {found}"
            return
        if run.ending is not None and code == run.ending:
            run.cut = op.seq if run.cut is None else min(run.cut, op.seq)
            assert run.cut > run.at, f"{op} was overtaken, a later one was not"
            return
        assert run.cut is None or op.seq < run.cut, f"{op} came after what the end overtook"
        expected = run.interpret(op.seq, self._now)
        if isinstance(expected, Done) and self.other_numerics:
            expected.fields.pop("same_numerics", None)
        assert agree(expected, found), f"{run.id} {op}\nfound {found}\nexpected {expected}"

    def _note_shortages(self) -> None:
        """Tell the model which operations failed for want of memory, before that is forgotten."""
        if not self._world.shortages:
            return
        runs = {(run.id, run.generation): run for run in self.all}
        found = sa.select(operations).where(operations.c.state == "failed")
        with self._world.catalog._engine.connect() as connection:
            rows = connection.execute(found).all()
        for row in rows:
            op = runs[row.run_id, row.generation].ops.get(row.seq)
            if op is None or op.fate != "accepted" or row.error["code"] != "out_of_memory":
                continue
            if not (isinstance(op.body, bytes) and b"out_of_memory" in op.body):
                op.fate = "short"
        short = [op for run in self.all for op in run.ops.values() if op.fate == "short"]
        # One shortage fails one operation; or all that wait for a recovery, if for the last time.
        given_up = any(str(event["event"]).startswith(GIVEN_UP) for event in self.events)
        assert given_up or len(short) <= self._world.shortages, f"there was memory for one: {short}"

    def _check_checkpoints(self) -> None:
        store = self._world.store
        for key, saved in self.names.items():
            manifest_id = store.resolve(key)
            if manifest_id is None and key.name.startswith(BRIEF):
                continue
            assert manifest_id is not None, f"{key} is lost"
            manifest = store.read_manifest(manifest_id)
            assert manifest.seq == saved.seq
            self._check_state(key, saved.state, saved.optimizer)
        runs = {run.id: run for run in self.all}
        for key, _ in store.names():
            if key in self.names or self._never_told(runs[key.run], key):
                continue
            assert key.name.startswith("auto."), f"{key} should not be there"
            run, position = runs[key.run], int(key.name.removeprefix("auto."))
            assert run.cut is None or position < run.cut
            run.interpret(position, self._now)
            self._check_state(key, run.history[position], optimizer=True)
            self._check_that_it_is_the_last(run, position)

    def _check_that_it_is_the_last(self, run: ModelRun, position: int) -> None:
        """Nothing that was done is missing in a run's last state.

        What was refused takes effect in its turn, which perhaps did not come any more. What was
        asked about only when its outcome had expired was perhaps overtaken.
        """
        last = max(seq for seq in run.ops if run.cut is None or seq < run.cut)
        run.interpret(last, self._now)
        after = [run.ops[seq] for seq in range(position + 1, last + 1)]
        if any(op.fate in ("refused", "late") or _expired(op.seen) for op in after):
            return
        states = [_without_wording(run.history[seq]) for seq in (position, last)]
        assert states[0] == states[1], f"{run.id} was at {last}, and {position} was kept"

    def _never_told(self, run: ModelRun, key: NameKey) -> bool:
        """Whether a save of that name was asked about only when its outcome had expired."""
        return any(
            isinstance(op.body, (Save, SaveSampler))
            and op.body.name == key.name
            and _expired(op.seen)
            for op in run.ops.values()
        )

    def _check_state(self, key: NameKey, expected: ToyState, optimizer: bool) -> None:
        store = self._world.store
        manifest_id = store.resolve(key)
        assert manifest_id is not None
        manifest = store.read_manifest(manifest_id)
        assert (OPTIMIZER_STATE in manifest.files) == optimizer
        rest = None
        if optimizer:
            rest = store.read_blob(manifest.files[OPTIMIZER_STATE], what="optimizer")
            assert manifest.step == expected.step
            assert manifest.pending_forward_backwards == expected.pending
        found = ToyState.decode(
            store.read_blob(manifest.files[ADAPTER_WEIGHTS], what="weights"), rest
        )
        wanted = expected if optimizer else expected.cold()
        assert _without_wording(found) == _without_wording(wanted), f"{key} holds another state"

    def _check_logs(self) -> None:
        for event in self.events:
            if any(defect in str(event["event"]) for defect in DEFECTS):
                raise AssertionError(f"a defect was met: {event}") from event.get("exc_info")

    # --- Helpers -----------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._world.clock.now

    def _kept_since(self, op: Op) -> float | None:
        """Since when an outcome has been kept for a while only: it was read, its session ended.

        A refusal answers the submission itself, and leaves no future to be kept.
        """
        ended = self.ended_at.get(op.request_id.partition(":")[0])
        known = [at for at in (op.read_at, op.refused_at, ended) if at is not None]
        return min(known, default=None)

    def _beat(self) -> None:
        """The heartbeats of all clients."""
        for session in self.sessions:
            self._world.runs.sessions.seen(session.id)

    async def _go_on_beating(self) -> None:
        while True:
            self._beat()
            await asyncio.sleep(60.0)

    def _do(self, call: Callable[[], Any]) -> Any:
        return self._world.do(call)

    def _poll(self, op: Op, timeout: float) -> tuple[Outcome | None, str | None]:
        self._beat()
        try:
            found: tuple[Outcome | None, str | None] = self._do(
                lambda: self._world.runs.outcome(op.request_id, OWNER, timeout)
            )
            self._note_shortages()
        except RunError as error:
            # Of a run that has ended, numbers are forgotten.
            if error.code != "request_not_found" or self._kept_since(op) is None:
                raise
            key = RunKey(op.request_id.rpartition(":")[0])
            return journal.expired(key, op.seq), None
        return found

    def _open(self) -> list[ModelRun]:
        return [run for run in self.all if run.ending is None]

    def _pick(self, pick: int) -> ModelRun:
        return self._open()[pick % len(self._open())]

    def _stable(self) -> list[NameKey]:
        """Names that nothing under way can change."""
        stays = [k for k in self.names if not k.name.startswith(BRIEF)]
        return [k for k in stays if not self._writers(k)]

    def _published(self) -> list[NameKey]:
        """Those of them that are there for somebody who does not wait for the run's order.

        The outcome of a later operation may be there before that of a save.
        """
        open_ = [op for run in self.all for op in run.ops.values() if op.seen is None]
        saved = {op.body.name for op in open_ if isinstance(op.body, (Save, SaveSampler))}
        return [key for key in self._stable() if key.name not in saved]

    def _writers(self, key: NameKey) -> bool:
        """Whether a save to that name is still to be interpreted."""
        return any(
            isinstance(op.body, (Save, SaveSampler)) and op.body.name == key.name
            for run in self.all
            if run.id == key.run
            for op in run.ops.values()
            if op.seq > run.at and (run.cut is None or op.seq < run.cut)
        )

    def _readers(self, key: NameKey) -> bool:
        """Whether an operation that reads the name is still to be interpreted."""
        return any(
            isinstance(op.body, (Load, CreateFromState)) and op.body.key == key
            for run in self.all
            for op in run.ops.values()
            if op.seq > run.at
        )

    def _foreign_readers(self, key: NameKey) -> bool:
        return any(
            isinstance(op.body, (Load, CreateFromState)) and op.body.key == key
            for run in self.all
            if run.id != key.run
            for op in run.ops.values()
            if op.seq > run.at
        )

    def _uncertain_readers(self, run: ModelRun) -> bool:
        return any(self._foreign_readers(k) for k in self.names if k.run == run.id)

    def _request_id(self, run: ModelRun, seq: int) -> str:
        return RunKey(run.id, run.generation).request_id(seq)

    def _send(self, run: ModelRun, op: Op) -> str:
        body = op.body if isinstance(op.body, bytes) else op.body.encode()

        async def call() -> str:
            live = await self._world.runs.live(run.id, OWNER)
            return await live.submit(op.seq, op.kind, body)

        answer = self._do(call)
        assert isinstance(answer, str)
        return answer

    def _submit(
        self, run: ModelRun, kind: str, body: bytes | Body, *, seq: int | None = None
    ) -> None:
        seq = run.highest + 1 if seq is None else seq
        op = Op(seq, kind, body, request_id=self._request_id(run, seq))
        started = self._now
        assert self._send(run, op) == op.request_id
        self._enter(run, op, started)

    def _next_requests(self, run: ModelRun, count: int, x: int) -> list[Op]:
        numbers = range(run.highest + 1, run.highest + 1 + count)
        return [
            Op(n, bodies.FORWARD_BACKWARD, batch(x + n), request_id=self._request_id(run, n))
            for n in numbers
        ]

    def _do_beside(
        self, run: ModelRun, count: int, x: int, call: Callable[[], Awaitable[None]]
    ) -> None:
        """Send requests while something happens that ends the run. What it takes has an outcome."""
        sent = self._next_requests(run, count, x)
        accepted = set()

        async def send(op: Op) -> None:
            assert isinstance(op.body, bytes)
            while op.seq not in accepted:
                try:
                    live = await self._world.runs.live(run.id, OWNER)
                    assert await live.submit(op.seq, op.kind, op.body) == op.request_id
                    accepted.add(op.seq)
                except Unavailable:
                    await asyncio.sleep(0.1)
                except RunError as error:
                    assert error.code in (run.ending, "model_unloaded", "model_failed")
                    return

        async def both() -> None:
            sending = [asyncio.create_task(send(op)) for op in sent]
            beating = asyncio.create_task(self._go_on_beating())
            try:
                await call()
            finally:
                beating.cancel()
                await asyncio.gather(*sending)

        started = self._now
        self._do(both)
        for op in sent:
            # One that was taken when the server was killed was perhaps not answered.
            if op.seq in accepted or self._in_journal(run, op.seq) is not None:
                self._enter(run, op, started)

    def _may_end(self) -> bool:
        """Whether no operation would be blamed for it if the server ended once more."""
        with self._world.catalog._engine.connect() as connection:
            blamed = sa.select(sa.func.max(operations.c.begun_again)).where(
                operations.c.settled.is_(None) & operations.c.body_hash.is_not(None)
            )
            return (connection.scalar(blamed) or 0) < MOST_BEGUN_AGAIN - 1

    def _in_journal(self, run: ModelRun, seq: int) -> sa.Row[Any] | None:
        with self._world.catalog._engine.connect() as connection:
            return connection.execute(
                sa.select(operations.c.mark_at).where(
                    (operations.c.run_id == run.id)
                    & (operations.c.generation == run.generation)
                    & (operations.c.seq == seq)
                )
            ).one_or_none()

    def _enter(self, run: ModelRun, op: Op, started: float) -> None:
        """Tell the model of a number; ask the journal whether one that was missing came late."""
        gone = run.skipped(op.seq)
        waited = started - run.following[op.seq] if op.seq in run.following else 0.0
        sure = not gone and waited < run.lease(op.seq) - 1
        row = self._in_journal(run, op.seq)
        assert row is not None, f"{op} was answered and is not in the journal"
        if row.mark_at is None:
            assert not gone, f"{op} had been skipped, and was taken all the same"
            run.add(op, started)
        else:
            assert not sure, f"{op} was skipped after {waited} s"
            if op.fate != "refused":
                op.refusal = "arrived_late"
            run.following.pop(op.seq, None)
            run.came_late(op, row.mark_at)


async def _nothing() -> None:
    """The run ends by itself."""


def _expired(seen: Outcome | None) -> bool:
    return seen is not None and seen.failure is not None and seen.failure.code == "result_expired"


def _without_wording(state: ToyState) -> tuple[Any, ...]:
    mark = None if state.mark is None else state.mark.seq
    return (
        state.config.lora.rank,
        state.weights,
        state.moment,
        state.step,
        state.grads,
        state.pending,
        state.not_finite,
        mark,
    )


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_runs_keep_their_promises_under_every_interleaving() -> None:
    run_state_machine_as_test(
        Clients,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=60,
            # The default search is the same every time; a longer one looks where none has been.
            derandomize="HOLDFAST_EXAMPLES" not in os.environ,
            database=None,
            # What explains a failure traces every line, which takes half of the time; and to find
            # a short one takes longer than the whole test command may.
            phases=[Phase.generate] if "CI" in os.environ else [Phase.generate, Phase.shrink],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
