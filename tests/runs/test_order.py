"""The order of operations alone: what comes up, what is waited for, what is replayed."""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdfast.runs import order as module
from holdfast.runs.order import (
    GAP_LEASE,
    GAP_LEASE_AFTER_REFUSAL,
    GAP_LEASE_ELIXIR,
    GAP_LEASE_ELIXIR_FORWARD,
    REFUSAL_REACHES,
    Accept,
    Entry,
    Gap,
    Order,
    State,
)

EXAMPLES = int(os.environ.get("HOLDFAST_EXAMPLES", "50"))


def submit(order: Order, seq: int, kind: str = "optim_step") -> None:
    order.add(Entry(seq, kind, f"hash {seq}"))


def execute(order: Order, seq: int, state: State = State.DONE) -> None:
    order.begin(seq)
    order.passed(seq)
    order.settle(seq, state)


def executed(*kinds: str, elixir: bool = False) -> Order:
    """An order in which operations of these kinds are done, from 0 on."""
    order = Order(elixir=elixir)
    for seq, kind in enumerate(kinds):
        submit(order, seq, kind)
        execute(order, seq)
    return order


def come_late(order: Order, seq: int, kind: str = "forward_backward", body_hash: str = "h") -> int:
    """The request of a skipped number comes; the position at which it takes effect."""
    position = order.hold()
    order.arrived_late(seq, kind, body_hash)
    order.go_on()
    return position


# --- What comes up --------------------------------------------------------------------------


def test_operations_come_up_in_the_order_of_their_numbers() -> None:
    order = executed("create")
    for seq in (3, 1, 2):
        submit(order, seq)
    for seq in (1, 2, 3):
        due = order.next(0.0)
        assert isinstance(due, Entry) and due.seq == seq
        execute(order, seq)
    assert order.next(0.0) is None


def test_one_operation_runs_at_a_time() -> None:
    order = executed("create")
    submit(order, 1)
    submit(order, 2)
    order.begin(1)
    assert order.next(0.0) is None
    order.passed(1)
    due = order.next(0.0)
    assert isinstance(due, Entry) and due.seq == 2


def test_nothing_is_executed_twice() -> None:
    order = executed("create", "optim_step")
    assert order.next(0.0) is None


# --- Gaps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elixir", "before", "lease"),
    [
        (False, "optim_step", GAP_LEASE),
        (False, "forward", GAP_LEASE),
        (True, "optim_step", GAP_LEASE_ELIXIR),
        (True, "forward", GAP_LEASE_ELIXIR_FORWARD),
    ],
)
def test_a_gap_is_waited_for_as_long_as_its_client_may_fill_it(
    elixir: bool, before: str, lease: float
) -> None:
    order = executed("create", before, elixir=elixir)
    submit(order, 3)
    assert order.next(100.0) == Gap(2, 100.0 + lease)
    assert order.next(105.0) == Gap(2, 100.0 + lease), "the lease must not begin again"


def test_a_missing_number_with_nothing_behind_it_is_no_gap() -> None:
    assert executed("create").next(0.0) is None


def test_a_refusal_shortens_the_wait() -> None:
    order = executed("create")
    submit(order, 2)
    assert order.next(0.0) == Gap(1, GAP_LEASE)
    order.refused()
    assert order.next(1.0) == Gap(1, GAP_LEASE_AFTER_REFUSAL)


def test_a_refusal_explains_no_number_that_was_given_out_long_after_it() -> None:
    kinds = ["optim_step"] * (REFUSAL_REACHES + 1)
    order = executed("create")
    assert order.refused(1) == 1 + REFUSAL_REACHES
    for seq in range(1, 1 + len(kinds)):
        submit(order, seq)
        execute(order, seq)
    submit(order, len(kinds) + 2)
    assert order.next(0.0) == Gap(len(kinds) + 1, GAP_LEASE)
    again = executed("create", *kinds[:-1])
    again.refused_to = order.refused_to  # as after a restart
    submit(again, len(kinds) + 1)
    assert again.next(0.0) == Gap(len(kinds), GAP_LEASE_AFTER_REFUSAL)


def test_the_lease_of_a_gap_runs_only_while_everything_before_it_is_settled() -> None:
    order = executed("create")
    submit(order, 1, "save_weights")
    submit(order, 3)
    order.begin(1)
    order.passed(1)  # copied, still being written
    assert order.next(0.0) is None
    order.settle(1, State.DONE)
    assert order.next(50.0) == Gap(2, 50.0 + GAP_LEASE)


def test_each_gap_has_a_lease_of_its_own() -> None:
    order = executed("create")
    submit(order, 2)
    submit(order, 4)
    assert order.next(0.0) == Gap(1, GAP_LEASE)
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    execute(order, 2)
    assert order.next(500.0) == Gap(3, 500.0 + GAP_LEASE)


def test_numbers_that_are_missing_in_a_row_are_one_gap() -> None:
    order = executed("create")
    submit(order, 4)
    now = 0.0
    for missing in (1, 2, 3):
        assert order.next(now) == Gap(missing, GAP_LEASE)
        now = GAP_LEASE
        order.add(Entry(missing, "missing", None, State.SKIPPED))
        order.next(now)
        order.passed(missing)
    execute(order, 4)
    submit(order, 6)
    assert order.next(now) == Gap(5, now + GAP_LEASE)


def test_a_recovery_begins_the_lease_again() -> None:
    order = executed("create", "optim_step")
    submit(order, 3)
    order.next(0.0)
    order.rewind(0)
    order.passed(1)
    assert order.next(200.0) == Gap(2, 200.0 + GAP_LEASE)


def test_the_reserved_backward_is_waited_for_also_after_a_restart() -> None:
    order = Order(elixir=True, position=1, floor=0)
    order.read_back([Entry(1, "forward", "h", State.DONE), Entry(3, "forward", "h")])
    assert order.next(0.0) == Gap(2, GAP_LEASE_ELIXIR_FORWARD)


# --- Submissions ----------------------------------------------------------------------------


def test_the_same_request_again_is_a_duplicate_and_another_one_a_conflict() -> None:
    order = executed("create")
    submit(order, 1)
    assert order.classify(1, "optim_step", "hash 1") is Accept.DUPLICATE
    assert order.classify(1, "optim_step", "other") is Accept.CONFLICT
    assert order.classify(1, "forward", "hash 1") is Accept.CONFLICT
    assert order.classify(2, "forward", "any") is Accept.NEW


def test_a_full_run_takes_what_the_rest_may_be_waiting_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_UNSETTLED", 3)
    order = executed("create_model")
    for seq in (2, 3):
        submit(order, seq)
    assert not order.is_full(4)
    submit(order, 5)
    assert order.is_full(6) and order.is_full(7)
    assert not order.is_full(1) and not order.is_full(4), "the first part of a batch comes last"
    submit(order, 1)
    for seq in (1, 2):
        assert order.is_full(6)
        execute(order, seq)
    assert not order.is_full(6)


def test_a_run_is_full_of_large_bodies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNSETTLED_BYTES", 1000)
    order = executed("create_model")
    for seq, size in ((1, 999), (2, 500)):
        assert not order.is_full(seq)
        order.add(Entry(seq, "forward", "h", size=size))
    order.add(Entry(3, "forward", "h", State.FAILED, size=5000))
    assert order.is_full(4)
    execute(order, 1)
    assert not order.is_full(4)


def test_a_refused_number_is_taken() -> None:
    order = executed("create")
    order.add(Entry(1, "optim_step", None, State.FAILED))
    assert order.classify(1, "optim_step", "any") is Accept.CONFLICT


def test_a_skipped_number_comes_late_once_and_is_a_duplicate_then() -> None:
    order = executed("create")
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    assert order.was_skipped(1)
    assert order.classify(1, "forward_backward", "h") is Accept.LATE
    assert come_late(order, 1) == 1
    assert not order.was_skipped(1)
    assert order.classify(1, "forward_backward", "h") is Accept.DUPLICATE
    assert order.classify(1, "forward_backward", "other") is Accept.CONFLICT


def test_a_late_request_takes_effect_after_the_operation_under_way() -> None:
    order = executed("create")
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    submit(order, 2)
    order.begin(2)
    assert come_late(order, 1) == 2


def test_a_late_request_takes_effect_after_the_history_that_is_being_replayed() -> None:
    order = executed("create", "forward_backward")
    order.add(Entry(2, "missing", None, State.SKIPPED))
    order.passed(2)
    submit(order, 3)
    execute(order, 3)
    order.rewind(0)
    assert come_late(order, 2) == 3


def test_a_late_request_after_a_restart_does_not_change_what_was_answered_before() -> None:
    order = Order(position=0, floor=-1)
    order.read_back(
        [
            Entry(1, "missing", None, State.SKIPPED),
            Entry(2, "optim_step", "h", State.DONE),
            Entry(3, "save_weights", "h", State.RUNNING),
            Entry(9, "optim_step", None, State.FAILED),  # refused ahead of its turn
        ]
    )
    assert come_late(order, 1) == 2


def test_nothing_begins_while_a_late_request_is_journaled() -> None:
    order = executed("create")
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    submit(order, 2)
    assert order.hold() == 1
    assert order.next(0.0) is None
    with pytest.raises(AssertionError):
        order.begin(2)
    order.go_on()
    due = order.next(0.0)
    assert isinstance(due, Entry) and due.seq == 2


def test_what_is_history_is_replayed_also_while_a_late_request_is_journaled() -> None:
    order = executed("create", "forward_backward")
    order.add(Entry(2, "missing", None, State.SKIPPED))
    order.passed(2)
    order.rewind(0)
    assert order.hold() == 2
    due = order.next(0.0)
    assert isinstance(due, Entry) and due.seq == 1
    order.begin(1)


def test_late_marks_fall_where_they_fell_the_first_time() -> None:
    order = executed("create", "optim_step", "optim_step")
    order.add_late_mark(7, 1)
    assert order.late_marks() == []
    order.rewind(0)
    order.passed(1)
    assert order.late_marks() == [7]


# --- Rewinding and forgetting ---------------------------------------------------------------


def test_after_a_rewind_settled_operations_come_up_to_be_replayed() -> None:
    order = executed("create", "forward_backward", "optim_step")
    order.rewind(0)
    due = order.next(0.0)
    assert isinstance(due, Entry) and (due.seq, due.state) == (1, State.DONE)
    order.passed(1)
    due = order.next(0.0)
    assert isinstance(due, Entry) and (due.seq, due.state) == (2, State.DONE)
    assert order.reached == 2


def test_after_a_rewind_what_was_running_is_executed_again() -> None:
    order = executed("create")
    submit(order, 1, "save_weights")
    order.begin(1)
    order.passed(1)
    order.rewind(0)
    due = order.next(0.0)
    assert isinstance(due, Entry) and (due.seq, due.state) == (1, State.ACCEPTED)


def test_forgotten_numbers_are_known_but_not_by_their_content() -> None:
    order = executed("create", "optim_step", "optim_step")
    order.forget(1)
    assert 1 in order
    assert order.classify(1, "optim_step", "hash 1") is Accept.FORGOTTEN
    with pytest.raises(KeyError):
        order[1]
    assert order.classify(2, "optim_step", "other") is Accept.CONFLICT


def test_unsettled_and_skipped_numbers_are_not_forgotten() -> None:
    order = executed("create")
    submit(order, 1, "save_weights")
    order.begin(1)
    order.passed(1)
    order.add(Entry(2, "missing", None, State.SKIPPED))
    order.passed(2)
    order.forget(2)
    assert [entry.seq for entry in order.unsettled] == [1]
    assert order.classify(2, "forward_backward", "h") is Accept.LATE


def test_a_skipped_number_that_the_journal_forgets_is_forgotten() -> None:
    order = executed("create")
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    submit(order, 2)
    execute(order, 2)
    order.forget(2)
    assert order.classify(1, "forward_backward", "h") is Accept.LATE
    order.forget_skipped([1])
    assert 1 in order and not order.was_skipped(1)
    assert order.classify(1, "forward_backward", "h") is Accept.FORGOTTEN


def test_a_skipped_number_that_came_late_is_not_forgotten_as_skipped() -> None:
    order = executed("create")
    order.add(Entry(1, "missing", None, State.SKIPPED))
    order.passed(1)
    order.forget(1)
    come_late(order, 1)
    order.forget_skipped([1])
    assert order.classify(1, "forward_backward", "h") is Accept.DUPLICATE


def test_what_an_order_cannot_rewind_to_is_a_defect() -> None:
    order = executed("create", "optim_step", "optim_step")
    order.forget(1)
    with pytest.raises(AssertionError):
        order.rewind(0)


# --- Every sequence -------------------------------------------------------------------------


class Orders(RuleBasedStateMachine):
    """An order against a list: which numbers took effect, in which order, and how often.

    The model keeps what is known of each number, and the list of effects since the state was that
    of number -1. A rewind cuts the list; replay must extend it to what it had been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order = Order()
        self.known: dict[int, str] = {}
        """accepted, done, failed, skipped, late or gone, by number"""
        self.effects: list[int] = []
        self.longest: list[int] = []
        self.saving: set[int] = set()
        self.running: int | None = None
        self.floor = -1
        self.time = 0.0
        self.submit(0)

    @rule(ahead=st.integers(0, 3))
    def submit(self, ahead: int) -> None:
        seq = max(self.known, default=-1) + 1 + ahead
        self._enter(seq)

    @rule(which=st.integers(0, 20))
    def fill(self, which: int) -> None:
        missing = [n for n in range(max(self.known)) if n not in self.known]
        if missing:
            self._enter(missing[which % len(missing)])

    def _enter(self, seq: int) -> None:
        kind = "save" if seq % 3 == 2 else "step"
        assert self.order.classify(seq, kind, f"hash {seq}") is Accept.NEW
        self.order.add(Entry(seq, kind, f"hash {seq}"))
        self.known[seq] = "accepted"

    @rule(ahead=st.integers(0, 2))
    def refuse(self, ahead: int) -> None:
        seq = max(self.known) + 1 + ahead
        self.order.refused()
        self.order.add(Entry(seq, "step", None, State.FAILED))
        self.known[seq] = "failed"

    @rule(which=st.integers(0, 20))
    def send_again(self, which: int) -> None:
        seq = sorted(self.known)[which % len(self.known)]
        kind = "save" if seq % 3 == 2 else "step"
        found = self.order.classify(seq, kind, f"hash {seq}")
        match self.known[seq]:
            case "skipped":
                assert found is Accept.LATE
            case _ if seq <= self.floor and seq not in self.saving:
                assert found is Accept.FORGOTTEN
            case "failed":
                assert found is Accept.CONFLICT
            case _:
                assert found is Accept.DUPLICATE
                assert self.order.classify(seq, kind, "other") is Accept.CONFLICT

    @rule(which=st.integers(0, 20))
    def come_late(self, which: int) -> None:
        skipped = [n for n, what in self.known.items() if what == "skipped"]
        if skipped:
            seq = skipped[which % len(skipped)]
            kind = "save" if seq % 3 == 2 else "step"
            at = come_late(self.order, seq, kind, f"hash {seq}")
            expected = len(self.longest) - 1
            if self.running == len(self.longest):
                expected += 1  # after the operation under way
            assert at == expected
            self.known[seq] = "late"

    @precondition(lambda self: self.running is None)
    @rule()
    def begin(self) -> None:
        due = self.order.next(self.time)
        if not isinstance(due, Entry):
            return
        assert due.seq == len(self.effects), "out of order"
        if due.state.settled:
            self._effect(due.seq)
            self.order.passed(due.seq)
        else:
            self.order.begin(due.seq)
            self.running = due.seq

    @precondition(lambda self: self.running is not None)
    @rule()
    def finish(self) -> None:
        seq, self.running = self.running, None
        assert seq is not None
        self._effect(seq)
        self.order.passed(seq)
        if self.order[seq].kind == "save":
            self.saving.add(seq)
        else:
            self.order.settle(seq, State.DONE)
            self.known[seq] = "done"

    @precondition(lambda self: self.saving)
    @rule()
    def save_is_written(self) -> None:
        seq = min(self.saving)
        self.saving.remove(seq)
        self.order.settle(seq, State.DONE)
        self.known[seq] = "done"

    @precondition(lambda self: self.running is None)
    @rule(seconds=st.sampled_from([1.0, 6.0, 400.0]))
    def wait(self, seconds: float) -> None:
        before = self.order.next(self.time)
        self.time += seconds
        due = self.order.next(self.time)
        if not isinstance(due, Gap):
            return
        assert not self.saving and due.seq == len(self.effects) and due.seq not in self.known
        assert any(n > due.seq for n in self.known)
        if isinstance(before, Gap) and due.due <= self.time:
            self.order.add(Entry(due.seq, "missing", None, State.SKIPPED))
            self.known[due.seq] = "skipped"

    @rule(back=st.integers(0, 10))
    def lose_the_state(self, back: int) -> None:
        first_open = min(self.saving, default=len(self.effects))
        position = max(self.floor, min(len(self.effects) - 1 - back, first_open - 1))
        self.order.rewind(position)
        del self.effects[position + 1 :]
        self.running = None
        self.saving = {n for n in self.saving if n <= position}

    @precondition(lambda self: self.effects)
    @rule(back=st.integers(0, 5))
    def forget(self, back: int) -> None:
        first_open = min(self.saving, default=len(self.effects))
        position = min(len(self.effects) - 1 - back, first_open - 1)
        if position > self.floor:
            self.order.forget(position)
            self.floor = position

    @rule(which=st.integers(0, 20))
    def remove_a_skipped_row(self, which: int) -> None:
        gone = [n for n, what in self.known.items() if what == "skipped" and n <= self.floor]
        if gone:
            seq = gone[which % len(gone)]
            self.order.forget_skipped([seq])
            self.known[seq] = "gone"

    @rule()
    def restart(self) -> None:
        """Build another order from what a journal has, as a killed server's successor does."""
        state = {
            "accepted": State.ACCEPTED,
            "done": State.DONE,
            "failed": State.FAILED,
            "late": State.FAILED,
            "skipped": State.SKIPPED,
        }
        entries = [
            Entry(
                n,
                "save" if n % 3 == 2 else "step",
                None if what in ("failed", "skipped") else f"hash {n}",
                state[what],
            )
            for n, what in sorted(self.known.items())
            if n > self.floor or what in ("accepted", "skipped")
        ]
        first_open = min(self.saving, default=len(self.effects))
        position = max(self.floor, min(len(self.effects), first_open) - 1)
        self.order = Order(position=position, floor=self.floor)
        self.order.read_back(entries)
        del self.effects[position + 1 :]
        self.running = None
        self.saving.clear()
        # An unsettled save is copied once more. What was answered stays history.
        reached = self.order.reached + 1
        assert all(self.known[n] != "done" for n in range(reached, len(self.longest)))
        # Refused ones whose turn comes next count as passed: nothing was answered in between.
        assert all(self.known[n] != "accepted" for n in range(len(self.longest), reached))
        self.longest = list(range(reached))

    def _effect(self, seq: int) -> None:
        self.effects.append(seq)
        if len(self.effects) > len(self.longest):
            self.longest.append(seq)

    @invariant()
    def every_number_took_effect_once_and_in_order(self) -> None:
        assert self.effects == list(range(len(self.effects)))
        assert self.order.position == len(self.effects) - 1
        settled = ("done", "failed", "skipped", "late", "gone")
        assert all(self.known[n] in settled or n in self.saving for n in self.effects)

    def teardown(self) -> None:
        """Whatever happened, everything that was accepted comes up in the end."""
        for _ in range(10 * (len(self.known) + max(self.known) + 2)):
            if self.running is not None:
                self.finish()
            elif self.saving:
                self.save_is_written()
            elif isinstance(self.order.next(self.time), Gap):
                self.wait(400.0)
            elif self.order.next(self.time) is None:
                break
            else:
                self.begin()
        assert "accepted" not in self.known.values(), self.known


def test_every_number_takes_effect_once_in_its_order() -> None:
    _search(EXAMPLES)


def _search(examples: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        Orders,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _search_finds_something() -> None:
    """A defect is found, whichever it is; making the example small is left out."""
    with pytest.raises((AssertionError, KeyError)):
        _search(300, [Phase.generate])


def test_the_search_finds_an_order_that_forgets_what_was_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rewind(order: Order, position: int) -> None:
        order.position = position  # and what was running stays so for ever

    monkeypatch.setattr(Order, "rewind", rewind)
    _search_finds_something()


def test_the_search_finds_an_order_that_skips_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Order.next

    def hasty(order: Order, now: float) -> Entry | Gap | None:
        due = honest(order, now)
        if isinstance(due, Gap):
            order.add(Entry(due.seq, "missing", None, State.SKIPPED))
            return honest(order, now)
        return due

    monkeypatch.setattr(Order, "next", hasty)
    _search_finds_something()


def test_what_failed_when_it_came_up_is_history_after_a_restart() -> None:
    """A save before it is taken again, also when the run ends."""
    order = Order()
    order.read_back(
        [
            Entry(0, "create", "a", State.DONE),
            Entry(1, "save_weights", "b"),
            Entry(2, "forward_backward", None, State.FAILED),
            Entry(3, "optim_step", "c", State.FAILED),
            Entry(4, "optim_step", None, State.FAILED),
            Entry(5, "optim_step", "d"),
        ]
    )
    assert order.reached == 4


@pytest.mark.parametrize(
    "later",
    [
        Entry(2, "optim_step", None, State.FAILED),
        Entry(2, "optim_step", "c", State.FAILED, late=True),
        Entry(2, "optim_step", "c", State.FAILED),
        Entry(3, "optim_step", "c", State.FAILED),
    ],
    ids=["refused", "late", "overtaken", "beyond a gap"],
)
def test_what_failed_before_it_came_up_is_no_history(later: Entry) -> None:
    order = Order()
    first = [Entry(0, "create", "a", State.DONE), Entry(1, "save_weights", "b")]
    order.read_back([*first, later], overtaken={2} if later.body_hash else ())
    assert order.reached == 0
