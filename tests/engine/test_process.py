"""A worker process answers as the engine in this process does, and its end hangs nobody."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.engine import process
from holdfast.engine.interface import AdamParams, EngineError, WorkerDied
from holdfast.engine.payload import SampleRequest
from holdfast.engine.process import WorkerProcess
from holdfast.store import Store
from tests.engine.conftest import MakeCore
from tests.engine.helpers import BUDGET, NAME, make_batch, run_config
from tests.support.preloaded import quick_starts

pytestmark = pytest.mark.anyio

STEP = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)
BODY = make_batch(0).encode()
LONG = make_batch(1, (120,) * 60).encode()


@asynccontextmanager
async def started(source: Path, store: Path) -> AsyncIterator[WorkerProcess]:
    worker = await WorkerProcess.start(
        name=NAME, source=str(source), store=store, threads=1, token_budget=BUDGET
    )
    try:
        yield worker
    finally:
        await worker.close()


@pytest.fixture
def small(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("qwen3")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from what has loaded their libraries."""
    for name, value in quick_starts().items():
        monkeypatch.setenv(name, value)


async def test_answers_are_those_of_the_engine(
    small: Path, make_core: MakeCore, store: Store, tmp_path: Path
) -> None:
    """The same bytes from either; then a kill -9, and a new worker goes on from the save."""
    core = make_core()
    core.create("run", run_config())
    request = SampleRequest(make_batch(0).data[0].tokens, max_tokens=5, stop=[], seed=1).encode()
    async with started(small, tmp_path / "store") as worker:
        info = await worker.ready()
        assert info.fingerprint == core.base.info.fingerprint
        assert info == core.base.info
        assert str(tmp_path) not in repr(info)
        assert await worker.create("run", run_config()) == core._runs["run"].info
        for seq in range(2):
            answer = await worker.forward_backward("run", seq, BODY)
            assert answer == core.forward_backward("run", seq, BODY)
            assert await worker.optim_step("run", STEP) == core.optim_step("run", STEP)
        # Sent without waiting, executed in that order; the capture sees nothing of what follows.
        async with asyncio.TaskGroup() as group:
            first = group.create_task(worker.forward_backward("run", 3, BODY))
            saved = group.create_task(worker.capture("run"))
            group.create_task(worker.forward_backward("run", 4, BODY))
            stepped = group.create_task(worker.optim_step("run", STEP))
        assert first.result() == core.forward_backward("run", 3, BODY)
        copy = core.copy_state("run", optimizer=True)
        core.forward_backward("run", 4, BODY)
        assert stepped.result() == core.optim_step("run", STEP)
        captured = await saved.result().written()
        assert captured.state == copy.info == saved.result().state
        assert captured.state.pending_forward_backwards == 1
        assert captured.files == {n: store.put_blob(parts) for n, parts in copy.files.items()}
        assert await worker.sample(captured.files, request) == core.sample(captured.files, request)
        assert await worker.sample(None, request) == core.sample(None, request)
        for call, code in (
            (worker.forward_backward("run", 5, b"{}"), "invalid_batch"),
            (worker.optim_step("run", STEP), "incomplete_gradients"),
            (worker.forward("gone", 5, BODY), "unknown_run"),
            (worker.capture("gone"), "unknown_run"),
            (
                worker.restore(
                    "run",
                    run_config(),
                    {n: type(b)("0" * 64, 5) for n, b in captured.files.items()},
                    optimizer=True,
                ),
                "missing_blob",
            ),
        ):
            with pytest.raises(EngineError) as caught:
                await call
            assert caught.value.code == code
        os.kill(worker.pid, signal.SIGKILL)
        assert await worker.wait_died() == -signal.SIGKILL
    async with started(small, tmp_path / "store") as worker:
        state = await worker.restore("run", run_config(), captured.files, optimizer=True)
        assert state == captured.state
        assert await worker.forward_backward("run", 4, BODY)
        assert await worker.optim_step("run", STEP) == stepped.result()
        again = await (await worker.capture("run")).written()
        wanted = core.copy_state("run", optimizer=True).files
        assert again.files == {name: store.put_blob(parts) for name, parts in wanted.items()}
        await worker.drop("run")


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
async def test_a_kill_ends_every_call(delay: float, small: Path, tmp_path: Path) -> None:
    """While loading, while computing, and with answers on their way."""
    async with started(small, tmp_path / "store") as worker:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(worker.create("run", run_config()))]
        if delay:
            await tasks[0]
        tasks += [asyncio.create_task(worker.forward("run", i, LONG)) for i in range(20)]
        tasks.append(asyncio.create_task(worker.capture("run")))
        await asyncio.sleep(delay)
        worker.kill()
        worker.kill()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[-1], WorkerDied)
            assert all(isinstance(r, bytes | WorkerDied) for r in results[1:])
            assert await worker.wait_died() == -signal.SIGKILL
            assert worker.dead and worker.in_flight == 0
            with pytest.raises(WorkerDied, match="-9"):
                await worker.forward("run", 0, BODY)
            if not delay:
                with pytest.raises(WorkerDied):
                    await worker.ready()


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or shutil.which("ps") is None,
    reason="the system does not tell",
)
async def test_its_memory_is_what_ps_says(small: Path, tmp_path: Path) -> None:
    async with started(small, tmp_path / "store") as worker:
        await worker.ready()
        await worker.create("run", run_config())
        ps = ["ps", "-o", "rss=", "-p", str(worker.pid)]
        listed = await asyncio.to_thread(subprocess.check_output, ps, text=True)
        memory = worker.resident_memory
        assert memory is not None and memory > 100 << 20  # torch alone takes more
        assert memory == pytest.approx(int(listed) << 10, rel=0.02)
        worker.kill()
        await worker.wait_died()
        assert worker.resident_memory is None


async def test_progress_shows_that_it_computes(small: Path, tmp_path: Path) -> None:
    async with started(small, tmp_path / "store") as worker:
        await worker.create("run", run_config())
        task = asyncio.create_task(
            worker.forward_backward("run", 0, make_batch(1, (120,) * 600).encode())
        )
        seen = set()
        while not task.done():
            await asyncio.sleep(0.05)
            seen.add(worker.last_progress)
        await task
        assert len(seen) > 2
        assert worker.in_flight == 0
        idle = worker.last_progress
        await asyncio.sleep(0.1)
        assert worker.last_progress == idle
        os.kill(worker.pid, signal.SIGSTOP)  # A hang: the time of progress stands still.
        stuck = asyncio.create_task(worker.forward("run", 1, LONG))
        await asyncio.sleep(0.1)
        begun = worker.last_progress
        assert begun > idle
        await asyncio.sleep(1.0)
        assert worker.last_progress == begun and worker.in_flight == 1
        worker.kill()
        with pytest.raises(WorkerDied):
            await stuck


def alter(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Workers that are started from now on execute this first."""
    monkeypatch.undo()
    start = asyncio.create_subprocess_exec

    async def altered(program: str, *_: str, **how: Any) -> asyncio.subprocess.Process:
        main = "from holdfast.engine import worker; worker.main()"
        return await start(program, "-c", f"{code}\n{main}", **how)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", altered)


BREAKS = """
import torch
def breaks(*args, **kwargs):
    raise RuntimeError("a kernel broke")
torch.Tensor.addcdiv_ = breaks
"""


async def test_a_step_that_breaks_off_ends_the_worker(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before it is answered; nobody goes on with half of a step, or saves it."""
    alter(monkeypatch, BREAKS)
    async with started(small, tmp_path / "store") as worker:
        await worker.create("run", run_config())
        async with asyncio.timeout(60):
            before, step, after = await asyncio.gather(
                worker.forward_backward("run", 0, BODY),
                worker.optim_step("run", STEP),
                worker.capture("run"),
                return_exceptions=True,
            )
            assert await worker.wait_died() == 1
        assert isinstance(before, bytes)
        assert isinstance(step, WorkerDied) and isinstance(after, WorkerDied)


SLOW = """
import time
from holdfast.store import files, transfer
transfer.CHUNK = 1024
def slow(honest):
    def call(self, data):
        time.sleep(0.05 if len(data) == 1024 else 0)
        return honest(self, data)
    return call
files._LocalWriteFile.write = slow(files._LocalWriteFile.write)
files._LocalReadFile.readinto = slow(files._LocalReadFile.readinto)
"""


async def test_a_slow_storage_shows_progress(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a state is written, and while it is read; one that stands still shows none."""
    alter(monkeypatch, SLOW)
    async with started(small, tmp_path / "store") as worker:
        await worker.create("run", run_config())
        writing = asyncio.create_task((await worker.capture("run")).written())
        assert await _signs_of_life(worker, writing) > 2
        files = (await writing).files
        call = worker.restore("run", run_config(), files, optimizer=True)
        assert await _signs_of_life(worker, asyncio.create_task(call)) > 2
        with (tmp_path / "store/sweep.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            standing = asyncio.create_task((await worker.capture("run")).written())
            begun = worker.last_progress
            await asyncio.sleep(1.5)
            assert worker.last_progress == begun and not standing.done()
        assert await _signs_of_life(worker, standing) > 2


async def _signs_of_life(worker: WorkerProcess, until: asyncio.Task[Any]) -> int:
    """How often it has shown one while that was under way, from its call on."""
    seen = set()
    while not until.done():
        await asyncio.sleep(0.05)
        if not until.done():
            seen.add(worker.last_progress)
    return len(seen)


@pytest.mark.usefixtures("quickly")
async def test_a_cancelled_call_leaves_the_others_their_answers(
    small: Path, tmp_path: Path
) -> None:
    async with started(small, tmp_path / "store") as worker:
        await worker.create("run", run_config())
        tasks = [asyncio.create_task(worker.forward("run", i, BODY)) for i in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert results[0] == results[2] == results[3] == await worker.forward("run", 9, BODY)


async def test_a_worker_finishes_its_saves_before_it_closes(small: Path, tmp_path: Path) -> None:
    worker = await WorkerProcess.start(
        name=NAME, source=str(small), store=tmp_path / "store", threads=1, token_budget=BUDGET
    )
    await worker.create("run", run_config())
    capture = await worker.capture("run")
    await worker.close()
    await worker.close()
    assert len((await capture.written()).files) == 3
    assert await worker.wait_died() == 0


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
async def test_a_base_model_that_cannot_be_loaded(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "model")
    async with started(tmp_path / "model", tmp_path / "store") as worker:
        with pytest.raises(EngineError) as caught:
            await worker.ready()
        assert (caught.value.code, caught.value.category) == ("model_not_loadable", "server")
        assert "model" in caught.value.message
        with pytest.raises(WorkerDied):
            await worker.create("run", run_config())


@pytest.mark.usefixtures("quickly")
async def test_a_device_that_is_not_there(small: Path, tmp_path: Path) -> None:
    device = "cuda:99"
    worker = await WorkerProcess.start(
        name=NAME,
        source=str(small),
        store=tmp_path / "store",
        device=device,
        threads=1,
        token_budget=BUDGET,
    )
    try:
        with pytest.raises(
            EngineError, match=f"The device '{device}' cannot be used here"
        ) as caught:
            await worker.ready()
        assert caught.value.code == "model_not_loadable"
        assert "'auto' takes what there is" in caught.value.message
    finally:
        await worker.close()


PARENT = """
import asyncio, sys
from pathlib import Path
from holdfast.engine.process import WorkerProcess
async def main():
    worker = await WorkerProcess.start(
        name="m", source=sys.argv[1], store=Path(sys.argv[2]), threads=1, token_budget=256)
    if sys.argv[3] == "loaded":
        await worker.ready()
    print(worker.pid, flush=True)
    await asyncio.sleep(60)
assert "torch" not in sys.modules
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["loading", "loaded"])
def test_a_worker_ends_with_its_parent(when: str, small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(small), str(tmp_path / "store"), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_calls_to_a_dying_worker_end_as_its_death_whatever_the_event_loop() -> None:
    """Its pipe is closed, its end not yet noticed: the loop of the server refuses writes then."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import time; time.sleep(60)",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    worker = WorkerProcess(process)
    calls = [asyncio.create_task(worker.forward("run", 0, b""))]
    await asyncio.sleep(0)
    worker.kill()
    while not worker.dead:
        calls.append(asyncio.create_task(worker.forward("run", len(calls), b"")))
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {WorkerDied}


EVERY_LOOP = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


@EVERY_LOOP
async def test_a_killed_worker_whose_end_nothing_shows_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs in the kernel: its pipes stay open."""
    monkeypatch.setattr(process, "DYING_TAKES", 0.5)
    pipe, pid = asyncio.subprocess.PIPE, tmp_path / "pid"
    code = "import os, sys, time; os.fork() or open(sys.argv[1], 'w').write(f'{os.getpid()}')"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)", str(pid)]
    worker = WorkerProcess(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
    calls = [
        asyncio.create_task(worker.drop("run")),
        asyncio.create_task(worker.forward("run", 1, bytes(4 << 20))),  # more than a pipe holds
    ]
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        await asyncio.sleep(0.05)
    assert not any(call.done() for call in calls)
    async with asyncio.timeout(10):
        worker.kill()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {WorkerDied}
        assert await worker.wait_died() == -signal.SIGKILL
        await worker.close()
    await asyncio.sleep(0.1)
    os.kill(int(pid.read_text()), signal.SIGKILL)  # who held the pipes
    await asyncio.sleep(0.1)


@pytest.mark.usefixtures("quickly")
async def test_a_write_that_hangs_is_waited_for_no_longer_while_the_training_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(small, tmp_path / "store") as worker:
        await worker.create("run", run_config())
        with (tmp_path / "store/sweep.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            monkeypatch.setattr(process, "WRITING_TAKES", limit := 3.0)
            hung = [await worker.capture("run") for _ in range(3)]
            began = time.monotonic()
            for capture in hung:
                with pytest.raises(EngineError, match="has not taken a copied state") as caught:
                    await capture.written()
                assert (caught.value.code, caught.value.category) == ("io_failed", "server")
            # Not one after the other: each was given up so long after it was copied.
            assert time.monotonic() - began < 2 * limit
            assert await worker.forward("run", 0, BODY)
            monkeypatch.undo()
            last = asyncio.create_task((await worker.capture("run")).written())
            await asyncio.sleep(0.5)
            assert not last.done()
        assert (await last).files  # as soon as it is taken
