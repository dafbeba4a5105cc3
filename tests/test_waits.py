"""Whatever waits on the server's side has a limit, or a reason here why it needs none.

A wait has a limit within `asyncio.timeout`, or by an argument that is its timeout. What else may
wait is found by the names below, in every function; awaiting a function of ours is no wait of its
own. A disk cannot be given a limit: what has one is the wait for the thread that reads or writes.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "holdfast"
PACKAGES = ("server", "runs", "catalog", "engine", "store")

WAITS = frozenset(
    (
        *(
            "wait",
            "wait_for",
            "acquire",
            "shield",
            "as_completed",
            "drain",
            "wait_closed",
            "readexactly",
        ),
        *("to_thread", "run_in_executor", "shutdown", "communicate", "recv", "flock"),
    )
)
"""Methods and functions that wait, whatever they are called with."""
WAITS_ALONE = frozenset(("join", "get", "result"))
"""Those that wait when they are called with nothing: `", ".join(names)` does not."""
BLOCKING = frozenset(("asyncio.gather", "stream.read", "receive", "send", "request.body"))
"""Calls that wait by what they are called on, as are puts into a queue, and a pool's `map`."""
LONGEST = 50
"""Characters of a call that are its name in the list below."""
LOCKS = frozenset(("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore"))

UNLIMITED: dict[str, tuple[str, ...]] = {
    "the request that it is part of: server.answer_limit, ANSWER_TAKES": (
        "runs.copies:copy:asyncio.shield(self._create(copied, asked, idempot…",
        "runs.run:_digest:asyncio.to_thread(journal.digest, body, like)",
        "runs.submitting:__aenter__:self.lock.acquire()",
        "runs.service:_create:self._creating",
        "runs.service:_create:self.checkpoints.creating(model_id)",
        "runs.service:create:asyncio.shield(self._create(session, model_seq_id,…",
        "runs.service:create_from_state:asyncio.shield(self._create(session, model_seq_id,…",
        "runs.service:end_session:asyncio.shield(self._end_session(session_id, reaso…",
        "runs.service:unload:asyncio.shield(self._unload(live))",
        "server.archive:digest:asyncio.shield(found)",
        "server.archive:digest:loop.run_in_executor(self._digesters, download.dig…",
        "server.routes.training:_submit_batch:asyncio.to_thread(read)",
        "server.submit:submit:asyncio.to_thread(body)",
    ),
    "its client, for whom nobody else waits": (
        "server.answer_limit:answered:send(message)",
        "server.answer_limit:received:receive()",
        "server.archive:next:loop.run_in_executor(self._threads, next, chunks, …",
        "server.body_limit:_drain:receive()",
        "server.body_limit:answered:send(message)",
        "server.body_limit:counted:receive()",
        "server.direct:__call__:request.body()",
        "server.routes.service:telemetry:request.stream()",
        "server.routes.training:_submit_batch:request.body()",
    ),
    "something to do, and nobody waits for it": (
        "catalog.beside:_run:self._calls.get()",
        "catalog.database:_next_call:self._calls.get()",
        "engine.frames:read:stream.read(_LENGTHS.size)",
        "engine.frames:read:stream.read(header_size)",
        "engine.frames:read:stream.read(payload_size)",
        "engine.worker:_run:self._frames.get()",
        "engine.worker:_serve:calls.get()",
        "runs.driver:_idle:run.wake.wait()",
        "runs.driver:_stalled:run.wake.wait()",
        "server.serve:_run:self.signals.get()",
        "server.serve:main_loop:self._runs.stopping.begun.wait()",
    ),
    "the worker: ended HUNG_AFTER its last progress, and dead DYING_TAKES later": (
        "engine.frames:read_async:stream.readexactly(_LENGTHS.size)",
        "engine.frames:read_async:stream.readexactly(header_size)",
        "engine.frames:read_async:stream.readexactly(payload_size)",
        "engine.process:_call:answer",
        "engine.process:_call:self._stdin.drain()",
        "engine.process:close:self._reader",
        "engine.process:wait_died:self._died.wait()",
        "engine.worker:reserve:self._changed.wait_for(lambda: self._held == 0 or …",
    ),
    "its start: LOADING_TAKES, as often as one is tried": (
        "engine.process:ready:asyncio.shield(self._ready)",
        "runs.engines:engine:asyncio.wait([starting])",
    ),
    "the operations before it, each on a worker": (
        "runs.engines:computing:self._admits.wait()",
        "runs.engines:engine:asyncio.wait([self._recycling])",
        "runs.gate:_change:self._changed.wait()",
        "runs.poison:executing:gate.alone() if is_quarantined(entry) else gate.am…",
        "runs.samplers:_sample:self._turns.setdefault(sampler.id, asyncio.Lock())",
        "runs.turns:take:waiter.ready",
    ),
    "who asks the store: runs.checkpoints, STORE_TAKES": (
        "runs.checkpoints:_amend:self._changing(key)",
        "runs.checkpoints:delete:self._changing(key)",
        "runs.checkpoints:publish:self._changing(key)",
        "runs.checkpoints:publish:self._discarding",
        "runs.copies:_create:self._checkpoints.creating(copied.run)",
    ),
    "what is copied: written in WRITING_TAKES, published in STORE_TAKES": (
        "runs.publishing:after:asyncio.wait([before])",
        "runs.publishing:after:work",
        "runs.publishing:settled:asyncio.wait([self._tail])",
    ),
    "the catalog, which has to take it; polls are answered meanwhile": (
        "runs.last_state:keep_recovery_point:pauses(1.0, 60.0)",
        "runs.run:finish:asyncio.wait([self._driver])",
        "runs.run:finish:self._submitting.lock",
        "runs.run:forget_skipped:self._submitting.lock",
        "runs.run:patiently:pauses(0.05)",
        "runs.run:recorded:asyncio.wait(list(self._recording.values()))",
    ),
    "the catalog's writer: WRITE_WAITS, WRITE_TAKES": ("runs.run:_journal:write",),
    "nothing: housekeeping, for which nobody waits": (
        "runs.checkpoints:_reconcile:self._changing(key)",
        "runs.checkpoints:discard_orphans:self._discarding",
        "runs.checkpoints:reconcile:asyncio.gather(*(self._reconcile(key) for key in s…",
        "runs.checkpoints:reconcile:self.creating(manifest.run)",
        "runs.checkpoints:sweep:self._changing(key)",
        "runs.service:_close_session:asyncio.gather(end_samplers(), *(self._finish(live…",
        "runs.service:_close_session:self._creating",
        "runs.service:_finish:asyncio.wait([finishing])",
        "runs.service:_remove_segments:asyncio.to_thread(segments.remove, gone)",
        "runs.service:_tried:work",
        "store.object_sweep:sweep:self._lock",
        "store.sweep:sweep:self._lock",
    ),
    "the stop: server.serve._End ends the process, and a worker's parent the worker": (
        "catalog.beside:close:self._thread.join()",
        "catalog.database:close:self._thread.join()",
        "engine.worker:close:self._pool.shutdown()",
        "engine.worker:close:self._thread.join()",
        "runs.engines:close:asyncio.gather(*(host.close() for host in self._ho…",
        "runs.engines:close:asyncio.wait([task])",
        "runs.run:stop:asyncio.wait([self._driver])",
        "runs.samplers:close:asyncio.gather(*tasks, return_exceptions=True)",
        "runs.service:_stop:asyncio.gather(*(live.run.stop(share(0.4)) for liv…",
        "runs.service:_stop:asyncio.gather(*finishing, return_exceptions=True)",
        "runs.service:_stop:asyncio.gather(*self._tasks, return_exceptions=Tru…",
        "server.app:lifespan:asyncio.gather(warm, return_exceptions=True)",
        "server.app:lifespan:asyncio.to_thread(context.reading.close)",
        "server.archive:close:threads.shutdown(cancel_futures=True)",
        "store.object_store:close:self._heart.join()",
        "store.remote:close:self._pool.shutdown()",
    ),
    "the limit of what is given to it": (
        "runs.service:config:self.stopping.wait_for(live.run.outcome(0, timeout…",
        "runs.service:outcome:self.stopping.wait_for(self._outcome(request_id, o…",
        "runs.stopping:wait_for:asyncio.wait([task, done], return_when=asyncio.FIR…",
        "runs.stopping:wait_for:self.done.wait()",
    ),
    "requests to the storage, which have a timeout: store.remote, _CLIENT": (
        "store.object_store:_hold:self._changing_pins",
        "store.object_store:beat:self._changing_pins",
        "store.object_store:pin:self._changing_pins",
        "store.remote:_part:self._parts[number].result()",
        "store.remote:get:self._pool.map(self._get, keys)",
    ),
    "some arithmetic in another thread": (
        "catalog.database:_give_up_late_ones:self._taking",
        "catalog.database:_next_batch:self._taking",
        "engine.worker:release:self._changed",
        "engine.worker:reserve:self._changed",
        "store.transfer:__exit__:self._queue.put(None)",
        "store.transfer:__exit__:self._thread.join()",
        "store.transfer:_work:queue.get()",
        "store.transfer:update:self._queue.put(piece)",
    ),
    "nothing: it is done by then, or no wait": (
        "catalog.deadline:is_over:_until.get()",
        "engine.process:written:self._written.result()",
        "runs.engines:_check:started.result()",
        "runs.service:_finish:finishing.result()",
        "runs.stopping:wait_for:task.result()",
    ),
    "who has called for the examination, and looks on": (
        "runs.doctor:_lost_recovery_points:asyncio.to_thread(is_missing, id)",
        "runs.doctor:_newest_intact:asyncio.to_thread(store.verify, manifest_id)",
        "runs.doctor:examine:asyncio.to_thread(_reach, store)",
        "runs.doctor:examine:asyncio.to_thread(store.verify, progress=progress)",
        "runs.doctor:repair:asyncio.to_thread(_reach, store)",
    ),
}
"""What limits a wait, or makes one harmless -> the waits of which that is true."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Each module of these packages, and its name."""
    for package in PACKAGES:
        for path in sorted((SOURCE / package).rglob("*.py")):
            name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
            yield name, ast.parse(path.read_text())


def contexts_of_ours() -> set[str]:
    """Names of context managers, functions and classes, whose own waits are looked at."""
    return {
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and _makes_a_context(node)
    }


def _makes_a_context(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(getattr(part, "name", "") == "__aenter__" for part in node.body)
    return any(ast.unparse(d).endswith("contextmanager") for d in node.decorator_list)


class Waits(ast.NodeVisitor):
    """Finds the waits without a limit in a module, as MODULE:FUNCTION:CALL."""

    def __init__(self, module: str, tree: ast.Module, ours: set[str]) -> None:
        self.found: set[str] = set()
        self._module = module
        self._ours = ours
        self._locks = _made_of(LOCKS, tree)
        self._contexts = _made_of(ours, tree)
        self._function: list[str] = []
        self._is_limited = False
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Within a limit something is only defined: it waits where it is called.
        is_limited, self._is_limited = self._is_limited, False
        self._function.append(node.name)
        self.generic_visit(node)
        self._function.pop()
        self._is_limited = is_limited

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if ast.unparse(item.context_expr) in self._locks:
                self._note(item.context_expr)
        self.generic_visit(node)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        is_limited = self._is_limited
        for item in node.items:
            entered = item.context_expr
            if _is_limit(entered):
                self._is_limited = True
            elif not self._is_of_ours(entered):
                self._note(entered)
        self.generic_visit(node)
        self._is_limited = is_limited

    def _is_of_ours(self, entered: ast.expr) -> bool:
        if isinstance(entered, ast.Call):
            return _last_name(entered.func) in self._ours
        return ast.unparse(entered) in self._contexts

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._note(node.iter)
        self.generic_visit(node)

    def visit_Await(self, node: ast.Await) -> None:
        if not isinstance(node.value, ast.Call):  # a future, a task, a coroutine
            self._note(node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _waits(node) and not _has_timeout(node):
            self._note(node)
        self.generic_visit(node)

    def _note(self, node: ast.expr) -> None:
        if not self._is_limited:
            text = ast.unparse(node)
            text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
            self.found.add(":".join((self._module, *self._function[-1:], text)))


def _made_of(classes: Collection[str], tree: ast.Module) -> set[str]:
    """What is assigned an object of one of these classes."""
    return {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and _last_name(node.value.func) in classes
    }


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _is_limit(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("asyncio.timeout")


def _waits(node: ast.Call) -> bool:
    text, name = ast.unparse(node.func), _last_name(node.func)
    if name in WAITS or (name == "pauses" and "within" not in {k.arg for k in node.keywords}):
        return True
    if name in WAITS_ALONE and isinstance(node.func, ast.Attribute):
        return not node.args and not node.keywords
    return text in BLOCKING or text.endswith(("_queue.put", "_pool.map"))


def _has_timeout(node: ast.Call) -> bool:
    if any(k.arg == "timeout" and ast.unparse(k.value) != "None" for k in node.keywords):
        return True
    # As a thread's event and condition take it; asyncio's own functions take what is waited for.
    text = ast.unparse(node.func)
    if text.endswith(".wait") and not text.startswith("asyncio."):
        return bool(node.args)
    if text.endswith(".wait_for"):
        return len(node.args) > 1
    return "LOCK_NB" in ast.unparse(node)


def found() -> set[str]:
    """The waits without a limit in all modules."""
    ours = contexts_of_ours()
    return {wait for name, tree in trees() for wait in Waits(name, tree, ours).found}


def test_every_wait_has_a_limit_or_a_reason() -> None:
    listed = {wait for waits in UNLIMITED.values() for wait in waits}
    there = found()
    assert sorted(there - listed) == [], "give it a timeout, or say what limits it"
    assert sorted(listed - there) == [], "it is not there any more: take it out of the list"
    assert sum(map(len, UNLIMITED.values())) == len(listed), "a wait is listed twice"


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("await event.wait()", True),
        ("async with asyncio.timeout(1): await event.wait()", False),
        ("async with limit, asyncio.timeout(1): await event.wait()", True),
        ("await asyncio.wait([task])", True),
        ("await asyncio.wait([task], timeout=1)", False),
        ("await asyncio.wait([task], timeout=None)", True),
        ("await asyncio.wait_for(task, 1)", False),
        ("await asyncio.gather(*tasks)", True),
        ("await task", True),
        ("await ours()", False),
        ("async with self._lock: pass", True),
        ("async with held(): pass", False),
        ("async with asyncio.Lock(): pass", True),
        ("async for piece in stream: pass", True),
        ("thread.join()", True),
        ("thread.join(timeout=1)", False),
        ("', '.join(names)", False),
        ("queue.get()", True),
        ("condition.wait_for(is_free)", True),
        ("event.wait(1)", False),
        ("fcntl.flock(fd, fcntl.LOCK_EX)", True),
        ("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", False),
        ("pauses(0.1)", True),
        ("pauses(0.1, within=60)", False),
        # What is defined within a limit need not be called there.
        ("async with asyncio.timeout(1):\n  async def f(): await event.wait()", True),
    ],
)
def test_a_wait_without_a_limit_is_found(code: str, is_found: bool) -> None:
    body = textwrap.indent(code, "    ")
    tree = ast.parse(f"async def g():\n{body}")
    assert bool(Waits("module", tree, {"held"}).found) == is_found


def test_a_lock_is_known_by_its_making() -> None:
    tree = ast.parse("a = threading.Lock()\nb = open(path)\nwith a: pass\nwith b: pass")
    assert Waits("module", tree, set()).found == {"module:a"}


def test_a_context_of_ours_is_known_by_its_making() -> None:
    made = "self.a = Ours()\nself.b = Theirs()"
    tree = ast.parse(f"{made}\nasync def g():\n  async with self.a, self.b: pass")
    assert Waits("module", tree, {"Ours"}).found == {"module:g:self.b"}
