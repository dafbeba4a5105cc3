"""`holdfast serve` itself: what it refuses to start with, and what it leaves behind."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from holdfast.cli.server_process import free_port
from holdfast.server import serve
from holdfast.server.data_dir import CannotUse
from holdfast.server.devices import why_not
from holdfast.server.settings import Settings
from tests.support.raw import RawRun
from tests.support.server import ServerProcess

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))


def refusal(
    *args: str,
    env: dict[str, str] | None = None,
    preexec_fn: Callable[[], None] | None = None,
) -> str:
    """What `holdfast serve` prints when it does not start."""
    done = subprocess.run(
        [HOLDFAST, "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
        check=False,
        preexec_fn=preexec_fn,
    )
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_second_server_on_the_same_data_is_refused(server: ServerProcess) -> None:
    message = refusal(f"--data-dir={server.data_dir}", f"--port={free_port()}")
    assert str(server.data_dir) in message
    assert str(server.pid) in message, "it says which process it is"
    assert httpx2.get(f"{server.url}/healthz").status_code == 200


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal(f"--data-dir={tmp_path}", f"--port={port}")
    assert str(port) in message
    assert "--port" in message


def test_a_start_that_is_refused_leaves_no_catalog_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writers() -> int:
        return [thread.name for thread in threading.enumerate()].count("catalog-writer")

    before = writers()
    monkeypatch.setattr(serve, "_configure_log", lambda: None)  # that of these tests stays
    (tmp_path / "store-url").write_text("s3://one/store")
    with pytest.raises(CannotUse, match="s3://one/store"):
        serve.serve(Settings(data_dir=tmp_path, port=0, store="s3://another/store"))
    assert (tmp_path / "catalog.db").exists()
    assert writers() == before


def test_an_address_for_others_needs_keys(tmp_path: Path) -> None:
    message = refusal(f"--data-dir={tmp_path}", "--host=0.0.0.0", "--port=0")
    assert "0.0.0.0" in message
    assert "holdfast key create" in message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nonsense", ("'nonsense'", "NAME=PATH_OR_HUB_ID")),
        ("a=./no-such-directory", ("no-such-directory",)),
        ("../x=.", ("'../x'",)),
        ("a=/tmp", ("config.json",)),
    ],
)
def test_a_wrong_model_is_refused(tmp_path: Path, model: str, words: tuple[str, ...]) -> None:
    message = refusal(f"--data-dir={tmp_path}", f"--model={model}")
    for word in words:
        assert word in message


def test_a_wrong_setting_in_the_config_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "holdfast.toml"
    config.write_text("prot = 9000\n")
    message = refusal(f"--config={config}")
    assert "'prot'" in message
    assert "port" in message


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    """Each value is out of range, so the refusal shows which one was taken."""
    config = tmp_path / "holdfast.toml"
    config.write_text("port = 70001\n")
    file, environment = f"--config={config}", {"HOLDFAST_PORT": "70002"}
    assert "70001" in refusal(file)
    assert "70002" in refusal(file, env=environment)
    assert "70003" in refusal(file, "--port=70003", env=environment)


@pytest.mark.skipif(why_not("cuda:99") is None, reason="only a worker can tell here")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refusal(f"--data-dir={tmp_path / 'data'}", "--device=cuda:99", "--port=0")
    assert "--device cuda:99 cannot be used: this " in message
    assert "'auto' takes what there is" in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("device", "torch", "gpus", "why"),
    [
        ("cuda", "2.9.0+cpu", None, "this torch (2.9.0+cpu) was made for CPUs alone"),
        ("cuda:2", "2.9.0", 2, "this machine has 2 GPUs, numbered from cuda:0"),
        ("cuda", "2.9.0+cu130", 0, "this machine has 0 GPUs, numbered from cuda:0"),
        ("cuda:1", "2.9.0", 2, None),
        ("cuda", "2.9.0+cu130", 1, None),
        ("cuda:7", "2.9.0+rocm6", None, None),  # another driver: a worker finds out
        ("cpu", "2.9.0+cpu", 0, None),
        ("auto", "2.9.0+cpu", 0, None),
    ],
)
def test_a_device_is_refused_only_where_it_cannot_be_there(
    tmp_path: Path, device: str, torch: str, gpus: int | None, why: str | None
) -> None:
    known = tmp_path / "gpus"
    for number in range(gpus or 0):
        (known / f"0000:{number:02d}:00.0").mkdir(parents=True)
    if gpus is not None:
        known.mkdir(exist_ok=True)
    assert why_not(device, gpus=known, torch=torch) == why


def without_privileges() -> None:
    """Before a program is executed: root is bound by the modes of files as everybody is."""
    if os.geteuid() == 0:
        drop = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert drop(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.mark.parametrize("part", ["", "catalog.db", "segments", "store", "store/tmp"])
def test_a_data_directory_that_cannot_be_written_is_refused(tmp_path: Path, part: str) -> None:
    """At the start, not operation by operation."""
    data = tmp_path / "data"
    (data / "store" / "tmp").mkdir(parents=True)
    (data / "segments").mkdir()
    (data / "catalog.db").touch()
    (data / part).chmod(0o500)
    try:
        message = refusal(f"--data-dir={data}", "--port=0", preexec_fn=without_privileges)
    finally:
        (data / part).chmod(0o700)
    why = f"{data / part} cannot be changed" if part else "Permission denied"
    assert f"cannot use the data directory {data}: {why}; name one" in message
    assert "--data-dir" in message


def test_workers_end_with_the_server(own_server: ServerProcess) -> None:
    with RawRun.open(own_server) as run:
        run.result(run.forward_backward(1))
        (worker,) = own_server.worker_pids()
        own_server.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{worker}/cmdline").exists():
            if not Path(f"/proc/{worker}/cmdline").read_bytes():  # a zombie: it has ended
                break
            assert time.monotonic() < deadline, "the worker outlives its server"
            time.sleep(0.05)
        own_server.start()


def test_a_base_model_that_cannot_be_loaded_is_an_answer_and_no_hang(
    models: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    directory = tmp_path / "server"
    with (
        ServerProcess(directory, models={"broken": broken, **models}) as server,
        RawRun.open(server) as run,
    ):
        created = run.create(base_model="broken", model_seq_id=1)
        message = run.failure(created["request_id"])
        assert "'broken'" in message and str(broken) in message
        run.result(run.forward_backward(1))
        assert "Traceback" not in server.log


def test_a_first_base_model_that_cannot_be_loaded_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    with ServerProcess(tmp_path, models={"broken": tmp_path / "model"}) as server:
        deadline = time.monotonic() + 60
        while "base model not loaded" not in server.log:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.05)
        server.stop()  # after whatever else there was to say
        assert server.log.count("base model not loaded") == 1, server.log
        assert f"cannot be loaded from {tmp_path / 'model'}: It looks like" in server.log
        assert "Traceback" not in server.log
