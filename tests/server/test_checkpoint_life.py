"""A checkpoint's life: copied, exported, shared, expired, deleted, swept; and sessions found."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
import tinker
from safetensors.numpy import load
from tinker.types import SessionSearchRequest

from holdfast.catalog import Catalog
from holdfast.runs.checkpoints import Checkpoints
from holdfast.server.archive import Download
from holdfast.server.auth import Keys
from holdfast.store import Archive, LocalStore, MissingManifest
from tests.store.samples import manifest_of
from tests.support.raw import RawRun, assert_refused
from tests.support.sdk import WAIT, sdk_environment, service_client, step, trace
from tests.support.server import ServerProcess, key_of

KEY = "x-idempotency-key"


@pytest.fixture(scope="module")
def service(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    with service_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A run that has trained a step."""
    client = service.create_lora_training_client("small-llama", rank=4, seed=3).result(timeout=WAIT)
    step(client, 1)
    return client


@pytest.fixture(scope="module")
def rest(service: tinker.ServiceClient) -> Any:
    return service.create_rest_client()


@pytest.fixture(scope="module")
def run(server: ServerProcess) -> Iterator[RawRun]:
    """A run with a checkpoint `source`."""
    with RawRun.open(server) as run:
        run.forward_backward(1)
        run.optim_step(2)
        run.save(3, "source")
        yield run


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    """Those of that run's operations, whichever tests run and in whatever order."""
    return itertools.count(4)


def inodes(server: ServerProcess, path: str) -> list[int]:
    """Of a checkpoint's blobs: writing one again, also the same bytes, makes a new file."""
    folder = server.data_dir / "store" / "blobs"
    return [(folder / blob.hash).stat().st_ino for blob in server.manifest(path).files.values()]


def address(path: str) -> str:
    """Of a checkpoint, under /api/v1/."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"training_runs/{run}/checkpoints/{kind}/{name}"


# --- Copies ----------------------------------------------------------------------------------


def test_a_copy_shares_every_byte_and_resumes_exactly(
    server: ServerProcess, service: tinker.ServiceClient, client: tinker.TrainingClient, rest: Any
) -> None:
    path = client.save_state("to-copy", user_metadata={"lr": "3"}).result(timeout=WAIT).path
    before = inodes(server, path)
    copy = rest.copy_weights(path, "my-project", ttl_seconds=3600).result(timeout=WAIT)
    assert inodes(server, path) == inodes(server, copy) == before
    assert copy != path
    mine, theirs = server.manifest(path), server.manifest(copy)
    assert dict(theirs.files) == dict(mine.files)
    assert theirs.user_metadata == {"lr": "3"}
    assert theirs.parent == mine.id
    assert theirs.expires is not None and mine.expires is None
    original = service.create_training_client_from_state_with_optimizer(path).result(timeout=WAIT)
    copied = service.create_training_client_from_state_with_optimizer(copy).result(timeout=WAIT)
    assert trace(server, original, [2]) == trace(server, copied, [2])


def test_the_run_of_a_copy_is_listed_and_cannot_be_trained(
    run: RawRun, server: ServerProcess
) -> None:
    copy = run.ok("copy_weights", {"source_path": f"tinker://{run.model_id}/weights/source"})
    run_id = key_of(copy["tinker_path"]).run
    found = run.http.get(f"training_runs/{run_id}").json()
    assert found["base_model"] == "small-llama"
    assert found["last_checkpoint"]["tinker_path"] == copy["tinker_path"]
    listed = run.http.get("training_runs?limit=1000").json()["training_runs"]
    assert run_id in [item["training_run_id"] for item in listed]
    refusal = run.refused("optim_step", {"model_id": run_id, "seq_id": 1, "adam_params": {}})
    assert "cannot be trained" in refusal.json()["message"]
    session = run.http.get(f"sessions/{run_id.partition(':')[0]}").json()
    assert session["training_run_ids"] == [run_id]


def test_the_same_idempotency_key_gives_the_same_copy(run: RawRun) -> None:
    body = {"source_path": f"tinker://{run.model_id}/weights/source"}
    first, again = (
        run.http.post("copy_weights", json=body, headers={KEY: "copy-1"}).json() for _ in range(2)
    )
    other = run.http.post("copy_weights", json=body, headers={KEY: "copy-2"}).json()
    assert first == again
    assert first != other
    # What became of the copy meanwhile does not matter: it is not made a second time.
    assert run.http.delete(address(first["tinker_path"])).status_code == 204
    assert run.http.post("copy_weights", json=body, headers={KEY: "copy-1"}).json() == first
    assert run.http.get(address(first["tinker_path"])).status_code == 404


def test_a_copy_into_a_session_takes_its_number(run: RawRun) -> None:
    body = {
        "source_path": f"tinker://{run.model_id}/weights/source",
        "session_id": run.session_id,
        "model_seq_id": 7,
    }
    copy = run.http.post("copy_weights", json=body, headers={KEY: "seven"}).json()["tinker_path"]
    assert copy == f"tinker://{run.session_id}:train:7/weights/source"
    # The number is taken: by a model that lives, or by a copy.
    model = {"session_id": run.session_id, "base_model": "small-llama", "lora_config": {"rank": 4}}
    taken = run.refused("create_model", {**model, "model_seq_id": 7})
    assert taken.json()["code"] == "model_exists"
    assert run.refused("copy_weights", {**body, "model_seq_id": 0}).json()["code"] == "model_exists"
    assert run.http.get(address(copy)).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_path": "tinker://nowhere/weights/x"}, "not found"),
        ({"source_path": "weights/x"}, "does not begin with"),
        ({"ttl_seconds": 60}, "one hour"),
        ({"session_id": "no-such-session", "model_seq_id": 1}, "no-such-session"),
        ({"session_id": "S"}, "go together"),
        ({"session_id": "S", "model_seq_id": 1, "destination_project_id": "P"}, "takes"),
    ],
)
def test_a_copy_that_cannot_be_made_says_why(
    run: RawRun, change: dict[str, Any], message: str
) -> None:
    body = {"source_path": f"tinker://{run.model_id}/weights/source", **change}
    assert message in run.refused("copy_weights", body).json()["message"]


def test_a_copy_keeps_its_kind(run: RawRun, numbers: Iterator[int]) -> None:
    body = {"model_id": run.model_id, "seq_id": next(numbers), "path": "s"}
    saved = run.submitted("save_weights_for_sampler", body)
    path = run.result(saved)["path"]
    copy = run.ok("copy_weights", {"source_path": path})["tinker_path"]
    assert key_of(copy).kind == "sampler_weights"


def test_only_who_may_read_a_checkpoint_can_copy_it(tmp_path: Path) -> None:
    data = tmp_path / "server" / "data"
    data.mkdir(parents=True)
    catalog = Catalog.open_file(data / "catalog.db")
    ann, bob = (asyncio.run(Keys(catalog).create(owner)) for owner in ("ann", "bob"))
    catalog.close()
    with LocalStore(data / "store") as store:
        blob = store.put_blob([b"weights"])
        manifest = manifest_of({"f": blob}, run="R", name="x", owner="ann")
        assert manifest.key is not None
        store.set_name(manifest.key, store.publish(manifest))
    body = {"source_path": "tinker://R/weights/x"}
    with (
        ServerProcess(tmp_path / "server") as server,
        httpx2.Client(base_url=f"{server.url}/api/v1/", timeout=30) as http,
    ):

        def copy(key: str | None = None, token: str | None = None) -> httpx2.Response:
            sent = {"x-api-key": key, "x-tinker-weights-access-token": token}
            headers = {name: value for name, value in sent.items() if value is not None}
            return http.post("copy_weights", json=body, headers=headers)

        assert copy().status_code == 401
        assert assert_refused(copy(bob)).status_code == 404
        assert http.get(address(body["source_path"]), headers={"x-api-key": bob}).status_code == 404
        lent = copy(bob, ann)
        assert lent.status_code == 200
        assert server.manifest(lent.json()["tinker_path"]).owner == "bob"
        assert copy(bob, "tml-nobody").status_code == 401
        publish = f"{address(body['source_path'])}/publish"
        assert http.post(publish, headers={"x-api-key": bob}).status_code == 404
        assert http.post(publish, headers={"x-api-key": ann}).status_code == 204
        public = copy(bob)
        assert public.status_code == 200
        # Reading is not owning.
        deleted = http.delete(address(body["source_path"]), headers={"x-api-key": bob})
        assert deleted.status_code == 403
        mine = http.get("checkpoints", headers={"x-api-key": bob}).json()["checkpoints"]
        paths = {lent.json()["tinker_path"], public.json()["tinker_path"]}
        assert {item["tinker_path"] for item in mine} == paths
        assert not any(item["public"] for item in mine)
        assert ann not in server.log


# --- External weights ------------------------------------------------------------------------


def test_external_weights_are_fetched_file_by_file(
    server: ServerProcess, client: tinker.TrainingClient, rest: Any
) -> None:
    path = client.save_weights_external("ext", ttl_seconds=7200).result(timeout=WAIT).path
    assert path == f"tinker://{client.model_id}/external_weights/ext"
    manifest = server.manifest(path)
    assert set(manifest.files) == {"adapter_model.safetensors", "adapter_config.json"}
    answer = rest.get_external_weights_urls(path).result(timeout=WAIT)
    assert set(answer.urls) == set(manifest.files)
    for name, url in answer.urls.items():
        whole = httpx2.get(url)
        assert whole.content == server.store().read_blob(manifest.files[name], what=name)
        part = httpx2.get(url, headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, whole.content[10:20])
        assert part.headers["repr-digest"] == whole.headers["repr-digest"]
        # The address is for one file of one checkpoint.
        other = next(u for n, u in answer.urls.items() if n != name)
        swapped = httpx2.URL(url).copy_set_param("token", httpx2.URL(other).params["token"])
        assert httpx2.get(swapped).status_code == 403
    weights = load(httpx2.get(answer.urls["adapter_model.safetensors"]).content)
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    listed = rest.list_checkpoints(client.model_id).result(timeout=WAIT).checkpoints
    (found,) = [c for c in listed if c.tinker_path == path]
    assert found.checkpoint_type == "external"
    # Weights alone: training does not continue from them.
    with pytest.raises(tinker.RequestFailedError, match="/weights/"):
        client.load_state_with_optimizer(path).result(timeout=WAIT)
    rest.delete_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    with pytest.raises(tinker.NotFoundError):
        rest.get_external_weights_urls(path).result(timeout=WAIT)


def test_the_official_download_command_works(
    server: ServerProcess, client: tinker.TrainingClient, tmp_path: Path
) -> None:
    from click.testing import CliRunner
    from tinker.cli.__main__ import main_cli

    path = client.save_state("to-download").result(timeout=WAIT).path
    with sdk_environment(server):
        done = CliRunner().invoke(
            main_cli, ["checkpoint", "download", path, "--output", str(tmp_path)]
        )
    assert done.exit_code == 0, done.output
    (weights,) = tmp_path.rglob("adapter_model.safetensors")
    stored = server.manifest(path).files["adapter_model.safetensors"]
    assert weights.read_bytes() == server.store().read_blob(stored, what="weights")


def test_encryption_is_refused_and_not_forgotten(run: RawRun, numbers: Iterator[int]) -> None:
    body = {
        "model_id": run.model_id,
        "seq_id": next(numbers),
        "path": "secret",
        "age_encryption_recipients": ["age1qqqq"],
    }
    refusal = run.refused("save_weights_external", body)
    assert "does not encrypt" in refusal.json()["message"]
    run.save(next(numbers), "after")  # the number is settled


def test_other_kinds_have_no_address_per_file(run: RawRun) -> None:
    path = f"tinker://{run.model_id}/weights/source"
    answer = assert_refused(run.http.get(f"{address(path)}/external_weights_urls"))
    assert "archive" in answer.json()["message"]


# --- What is known, and how large it is ------------------------------------------------------


def test_own_bytes_are_those_that_deleting_gives_back(server: ServerProcess) -> None:
    # A rank of its own: an equal configuration is the same file.
    with RawRun.open(server, rank=6) as run:
        run.forward_backward(1)
        run.optim_step(2)
        run.save(3, "a")
        a = f"tinker://{run.model_id}/weights/a"
        files = server.manifest(a).files
        size = sum(blob.size for blob in files.values())

        def info(path: str) -> dict[str, Any]:
            found = run.http.get(address(path)).json()
            assert isinstance(found, dict)
            return found

        assert (info(a)["size_bytes"], info(a)["own_bytes"]) == (size, size)
        copy = run.ok("copy_weights", {"source_path": a})["tinker_path"]
        assert info(a)["own_bytes"] == info(copy)["own_bytes"] == 0
        assert info(copy)["files"] == {
            name: {"size": blob.size, "hash": blob.hash} for name, blob in files.items()
        }
        saved = run.submitted(
            "save_weights_for_sampler", {"model_id": run.model_id, "seq_id": 4, "path": "b"}
        )
        run.result(saved)
        run.http.delete(address(copy))
        # The optimizer's state is all that a sampler of the same weights does not have.
        assert info(a)["own_bytes"] == files["optimizer.safetensors"].size
        (session,) = run.ok("sessions/search", {"session_id": run.session_id})["sessions"]
        assert session["checkpoints_count"] == 2
        assert session["checkpoint_storage_bytes"] == size


def test_many_are_deleted_at_once(run: RawRun, numbers: Iterator[int]) -> None:
    for name in ("x1", "x2"):
        run.save(next(numbers), name)
    paths = [f"tinker://{run.model_id}/weights/{name}" for name in ("x1", "x2", "x3")]
    answer = run.ok("checkpoints/delete", {"tinker_paths": [*paths, "no path"]})
    assert answer["deleted"] == paths[:2]
    assert "not found" in answer["failed"][paths[2]]
    assert "does not begin with" in answer["failed"]["no path"]
    assert run.http.get(address(paths[0])).status_code == 404
    assert run.http.get(address(f"tinker://{run.model_id}/weights/source")).status_code == 200


# --- Expiry ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_has_expired_is_hidden_then_removed(tmp_path: Path) -> None:
    clock = [time.time(), 0.0]
    store = LocalStore(tmp_path / "store", wall=lambda: clock[0], monotonic=lambda: clock[1])
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    checkpoints = Checkpoints(store, catalog)
    blob = store.put_blob([b"weights"])
    for name, expires in (("kept", None), ("gone", clock[0] + 0.05)):
        manifest = manifest_of({"f": blob}, name=name, run="R", owner="o", expires=expires)
        await checkpoints.publish(manifest)
    await anyio.sleep(0.1)  # the index goes by the real clock
    clock[0] += 1
    listed, total = await checkpoints.page("o")
    assert ([row.name for row in listed], total) == (["kept"], 1)

    async def rows() -> int:
        found = await checkpoints.differences()
        return len(found.gone)

    await checkpoints.sweep()
    assert await rows() == 1  # hidden by the store, still in the index
    clock[1] += 3700
    report = await checkpoints.sweep()
    assert [key.name for key in report.names] == ["gone"]
    assert await rows() == 0
    assert store.has_blob(blob)  # shared with what is kept
    store.close()
    catalog.close()


def test_a_download_goes_on_when_its_checkpoint_is_deleted(tmp_path: Path) -> None:
    clock = [0.0]
    store = LocalStore(tmp_path / "store", monotonic=lambda: clock[0])
    blobs = {name: store.put_blob([name.encode() * 1000]) for name in ("a", "b", "c")}
    manifest = manifest_of(blobs)
    assert manifest.key is not None
    store.set_name(manifest.key, store.publish(manifest))
    whole = b"".join(Archive(store, manifest).read())

    def sweep() -> None:
        for _ in range(6):
            clock[0] += 7200
            store.sweep()

    download = Download(store, manifest)
    pieces = download.read(0, download.size)
    read = next(pieces)
    store.delete_name(manifest.key)
    sweep()
    assert read + b"".join(pieces) == whole
    # It was the download that kept it.
    sweep()
    with pytest.raises(MissingManifest):
        next(download.read(0, download.size))
    store.close()


def test_the_server_sweeps(models: dict[str, Path], tmp_path: Path) -> None:
    lifetimes = {"between_sweeps": 0.2}
    with ServerProcess(tmp_path, models=models, settings={"lifetimes": lifetimes}) as server:
        damaged = server.data_dir / "store" / "names" / "r@weights@x"
        damaged.write_bytes(b"not a name record")
        state = server.data_dir / "store" / "sweep.json"
        deadline = time.monotonic() + 20
        seen: set[int] = set()
        while len(seen) < 3:
            assert time.monotonic() < deadline, server.log
            if state.exists():
                seen.add(state.stat().st_mtime_ns)
            time.sleep(0.05)
        assert str(damaged) in server.log


# --- Sessions --------------------------------------------------------------------------------


def test_sessions_are_found_by_what_is_known_of_them(server: ServerProcess) -> None:
    mark = hashlib.sha256(str(time.time()).encode()).hexdigest()[:12]
    ids = []
    with RawRun.open(server) as run:
        for n in range(5):
            body: dict[str, Any] = {
                "tags": [],
                "user_metadata": {"mark": mark, "n": str(n)},
                "display_name": f"Sweep {mark} number-{n}",
                "project_id": "even" if n % 2 == 0 else None,
            }
            ids.append(run.ok("create_session", body)["session_id"])
        run.http.post(f"sessions/{ids[0]}/finish", json={"reason": {"type": "errored"}})

        def found(**query: Any) -> list[str]:
            query.setdefault("user_metadata", {"mark": mark})
            return [s["session_id"] for s in run.ok("sessions/search", query)["sessions"]]

        assert found() == ids[::-1]
        assert found(user_metadata={"mark": mark, "n": "3"}) == [ids[3]]
        assert found(display_name=f"NUMBER sweep {mark}") == ids[::-1]
        assert found(display_name="100%") == []
        assert found(project_ids=["even"]) == [ids[4], ids[2], ids[0]]
        assert found(project_ids=["default"]) == [ids[3], ids[1]]
        assert found(session_id=ids[1]) == [ids[1]]
        assert found(session_id=ids[1], display_name="NUMBER-2 sweep") == [ids[2], ids[1]]
        assert found(statuses=[{"type": "active"}]) == ids[:0:-1]
        errored = {"type": "client_finished", "reasons": ["errored"]}
        assert found(statuses=[errored]) == [ids[0]]
        assert found(statuses=[{"type": "failed"}]) == []
        assert found(owner={"type": "user", "owner_urns": ["somebody"]}) == []
        put = run.http.put(f"sessions/{ids[1]}/project", json={"project_id": "even"})
        assert put.status_code == 204
        assert found(project_ids=["even"]) == [ids[4], ids[2], ids[1], ids[0]]
        assert_refused(run.http.put("sessions/none/project", json={"project_id": "even"}))


@pytest.mark.filterwarnings("ignore:.*is experimental:tinker.ExperimentalWarning")
def test_the_official_client_pages_through_sessions(service: tinker.ServiceClient) -> None:
    rest = service.create_rest_client()
    request = SessionSearchRequest(limit=2)
    seen: list[str] = []
    while True:
        page = rest.search_sessions(request).result(timeout=WAIT)
        assert len(page.sessions) <= 2
        seen += [s.session_id for s in page.sessions]
        if page.next_cursor is None:
            break
        request = SessionSearchRequest(limit=2, cursor=page.next_cursor)
    assert len(seen) == len(set(seen)) >= 5
