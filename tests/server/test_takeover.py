"""A catalog on PostgreSQL under a real server, and servers that others take the place of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import tinker

from holdfast.catalog import Catalog, epoch
from holdfast.catalog.database import TAKEN_OVER
from holdfast.store import Store, open_store
from tests.cli.samples import holdfast
from tests.support.postgres import SECRET, Postgres
from tests.support.raw import RawRun, http_client
from tests.support.s3 import S3Server
from tests.support.sdk import ADAM, WAIT, Trace, batch, service_client, trace
from tests.support.server import ServerProcess

STEPS = tuple(range(1, 8))

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def on_postgres(
    postgres: Postgres, models: dict[str, Path], tmp_path: Path
) -> Iterator[tuple[ServerProcess, str]]:
    """A server with a catalog on PostgreSQL, and the catalog's address."""
    address = postgres.database()
    environment = {"HOLDFAST_CATALOG": address}
    with ServerProcess(tmp_path / "server", models=models, environment=environment) as running:
        yield running, address
    assert "Traceback" not in running.log, running.log
    assert SECRET not in running.log


def train(
    server: ServerProcess,
    service: tinker.ServiceClient,
    during: Callable[[int], object] = lambda _seed: None,
) -> Trace:
    """A user's loop; `during` is called while a step was submitted and is not waited for."""
    made = service.create_lora_training_client("small-llama", rank=8, seed=3)
    client = made.result(timeout=WAIT)
    for seed in STEPS:
        gradients = client.forward_backward(batch(seed), "cross_entropy")
        applied = client.optim_step(ADAM)
        during(seed)
        gradients.result(timeout=WAIT)
        applied.result(timeout=WAIT)
        if seed == STEPS[3]:
            client.save_state("middle").result(timeout=WAIT)
    return trace(server, client, (20,))


def test_a_script_trains_on_whatever_is_killed_of_server_and_database(
    on_postgres: tuple[ServerProcess, str], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = on_postgres
    done: list[int] = []

    def disturb(seed: int) -> None:
        match seed:
            case 2:
                server.kill_and_restart()
            case 3:
                postgres.restart()
            case 4:
                postgres.stop(signal.SIGQUIT)
                starting.start()
            case 5:
                assert postgres.cut_off(address) > 0
            case _:
                return
        done.append(seed)

    starting = threading.Timer(1.0, postgres.start)
    with service_client(server) as service:
        undisturbed = train(server, service)
        try:
            assert train(server, service, disturb) == undisturbed
        finally:
            starting.join()
    assert done == [2, 3, 4, 5]
    # Commands tell of both runs, and of what was saved of each.
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    told = json.loads(holdfast("run", "list", "--json").stdout)
    assert len(told) == 2
    saved = json.loads(holdfast("checkpoint", "list", "--json").stdout)
    assert {item["path"] for item in saved} >= {
        f"tinker://{item['run']}/weights/middle" for item in told
    }
    examined = holdfast("doctor", "--data-dir", server.data_dir, "--catalog", address, "--json")
    assert json.loads(examined.stdout)["ok"], examined.stdout
    # All of it is in the database, and the directory can do without the password.
    names = {entry.name for entry in server.data_dir.iterdir()}
    assert names == {"lock", "store", "catalog-url"}
    noted = (server.data_dir / "catalog-url").read_text()
    assert noted.strip().rpartition("@")[2] == address.rpartition("@")[2]
    assert noted.startswith("postgresql://holdfast@")


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> tuple[str, str]:
    """The weights after one step and after two, of a run to which nothing happens."""
    with RawRun.open(server) as run:
        run.result(run.forward_backward(1, seed=1))
        run.result(run.optim_step(2))
        first = run.save(3, "a")
        run.result(run.forward_backward(4, seed=2))
        run.result(run.optim_step(5))
        return first, run.save(6, "b")


class Pair:
    """A server, and another one in its place that nothing keeps away in the end."""

    old: ServerProcess
    new: ServerProcess

    def separate(self) -> None:
        """Take away what keeps the new server from the place of the old one, which is suspended."""
        raise NotImplementedError

    def store(self) -> Store:
        raise NotImplementedError

    def catalog(self) -> Catalog:
        raise NotImplementedError


class SameDirectory(Pair):
    """Over the same data directory."""

    def __init__(self, directory: Path, models: dict[str, Path]) -> None:
        self.old = ServerProcess(directory, models=models)
        self.new = ServerProcess(directory, models=models)
        self.new.log_file = directory / "new.log"

    def separate(self) -> None:
        (self.old.data_dir / "lock").unlink()

    def store(self) -> Store:
        return self.new.store()

    def catalog(self) -> Catalog:
        return Catalog.open_file(self.new.data_dir / "catalog.db")


class OtherMachine(Pair):
    """With the catalog on PostgreSQL and the checkpoints in an object storage: on two machines."""

    def __init__(
        self, directory: Path, models: dict[str, Path], postgres: Postgres, url: str
    ) -> None:
        self._postgres, self._url = postgres, url
        self._address = postgres.catalog()
        environment = {"HOLDFAST_CATALOG": self._address}

        def machine(name: str) -> ServerProcess:
            place, args = directory / name, [f"--store={url}"]
            return ServerProcess(place, models=models, args=args, environment=environment)

        self.old, self.new = machine("old"), machine("new")

    def separate(self) -> None:
        refused = refusal(self.new)
        assert f"process {self.old.pid} on " in refused and "is in use" in refused
        assert self._postgres.cut_off(self._address) > 0

    def store(self) -> Store:
        return open_store(self._url)

    def catalog(self) -> Catalog:
        return Catalog.open(self._address)


@pytest.fixture(params=[SameDirectory, OtherMachine])
def pair(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path: Path) -> Iterator[Pair]:
    pair: Pair
    if request.param is SameDirectory:
        pair = SameDirectory(tmp_path / "server", models)
    else:
        s3: S3Server = request.getfixturevalue("s3")
        url = f"s3://{s3.bucket()}/holdfast"
        pair = OtherMachine(tmp_path, models, request.getfixturevalue("postgres"), url)
    try:
        yield pair
    finally:
        pair.old.kill()
        pair.new.stop()


def test_another_server_goes_on_and_the_one_that_comes_back_changes_nothing(
    pair: Pair, undisturbed: tuple[str, str]
) -> None:
    """It was suspended, and all that keeps two servers apart was taken away meanwhile."""
    old, new = pair.old, pair.new
    old.start()
    with http_client(old) as http:
        run = RawRun(old, http)
        run.result(run.forward_backward(1, seed=1))
        run.result(run.optim_step(2))
        first = run.save(3, "a")
        accepted = run.forward_backward(4, seed=2)
    os.kill(old.pid, signal.SIGSTOP)
    pair.separate()
    # What the old server finds when it goes on: a step, a save, a deletion.
    said: list[str] = []
    waiting = [
        threading.Thread(target=lambda call=call: said.append(call()))
        for call in late_calls(old, run)
    ]
    for thread in waiting:
        thread.start()
    new.start()
    with http_client(new) as http:
        run.http, run._server = http, new
        run.result(accepted)
        run.result(run.optim_step(5))
        second = run.save(6, "b")
        os.kill(old.pid, signal.SIGCONT)
        for thread in waiting:
            thread.join(60)
        assert old._process is not None
        assert old._process.wait(60) == TAKEN_OVER, old.log
        assert len(said) == 3 and set(said) <= {"no answer", "503"}, said
        assert (first, second) == undisturbed
        assert run.save(7, "c") == second
    with pair.store() as store:
        assert {key.name for key, _ in store.names(run.model_id)} == {"a", "b", "c"}
    assert "this catalog has been taken over by" in old.log
    assert f"process {new.pid} on " in old.log and "the epoch is 2, and 1 was" in old.log
    assert "Traceback" not in old.log + new.log
    catalog = pair.catalog()
    assert catalog.read_now(epoch.current).number == 2
    catalog.close()


def late_calls(server: ServerProcess, run: RawRun) -> list[Callable[[], str]]:
    """Requests to a server that does not answer now; what came of each."""

    def ask(method: str, path: str, body: dict[str, object] | None = None) -> Callable[[], str]:
        def call() -> str:
            with http_client(server) as http:
                try:
                    return str(http.request(method, path, json=body).status_code)
                except httpx2.TransportError:
                    return "no answer"

        return call

    save = {"model_id": run.model_id, "seq_id": 5, "path": "late"}
    return [
        ask("POST", "forward_backward", run.batch(5, seed=99)),
        ask("POST", "save_weights", save),
        ask("DELETE", f"training_runs/{run.model_id}/checkpoints/weights/a"),
    ]


def refusal(server: ServerProcess) -> str:
    """What a server says that does not start."""
    began = time.monotonic()
    done = subprocess.run(
        server.command(),
        env=server.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and SECRET not in done.stderr + done.stdout
    assert time.monotonic() - began < 30
    return done.stderr
