"""An S3 server that fails, loses responses, refuses, is damaged, or is not there."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from holdfast.store import (
    Corrupt,
    InvalidValue,
    IOFailed,
    Manifest,
    NoAccess,
    NotAStore,
    ObjectStore,
    Store,
    check_url,
    open_store,
)
from holdfast.store.objects import Version, Writer
from holdfast.store.remote import connect
from tests.store.samples import OPTIMIZER, WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage
from tests.support.proxy import Proxy, proxy_to
from tests.support.s3 import S3Server

CONTENT = {WEIGHTS: b"weights", OPTIMIZER: b"optimizer"}


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_to(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def save(store: Store) -> Manifest:
    files = {name: store.put_blob([content]) for name, content in CONTENT.items()}
    manifest = manifest_of(files)
    store.set_name(key_of(manifest), store.publish(manifest))
    return manifest


def load(store: Store) -> None:
    found = store.resolve(key_of(manifest_of({})))
    assert found is not None
    for name, blob in store.read_manifest(found).files.items():
        assert store.read_blob(blob, what=name) == CONTENT[name]


def everything(store: Store) -> None:
    """Each kind of change once."""
    manifest = save(store)
    load(store)
    snapshot = replace(manifest, name=None)
    store.publish(snapshot)
    assert store.discard(snapshot.id)
    assert store.read_manifest(store.amend(key_of(manifest), public=True)).public
    other = replace(manifest, name="other")
    store.set_name(key_of(other), store.publish(other))
    store.delete_name(key_of(other))
    assert store.resolve(key_of(other)) is None
    store.sweep()


def changes(requests: list[str]) -> list[int]:
    """Which of them change something."""
    return [
        n for n, request in enumerate(requests) if request.startswith(("PUT", "POST", "DELETE"))
    ]


@pytest.mark.parametrize(("fault", "each"), [("drop", 1), (500, 5), ("refuse", 5)])
def test_a_response_that_is_lost_changes_nothing(
    s3: S3Server, proxy: Proxy, fault: str | int, each: int
) -> None:
    """At each change in turn: it is repeated, and one that meets itself is done."""
    with open_store(f"s3://{s3.bucket()}") as store:
        everything(store)
        chosen = changes(proxy.requests)
    assert len(chosen) > 20
    for n in chosen[::each]:
        count = itertools.count()
        proxy.fault = lambda method, path: fault if next(count) == n else None  # noqa: B023
        with open_store(f"s3://{s3.bucket()}") as store:
            everything(store)
            assert [key.name for key, _ in store.names()] == ["final"]
            assert list(store.unnamed()) == []


def test_an_upload_in_parts_survives_lost_responses(s3: S3Server, proxy: Proxy) -> None:
    content = bytes(range(256)) * (1 << 16)
    with open_store(f"s3://{s3.bucket()}") as store:
        proxy.requests.clear()
        store.put_blob([content])
        requests = len(proxy.requests)
        for n in range(requests):
            count = itertools.count()
            proxy.fault = lambda method, path: "drop" if next(count) == n else None  # noqa: B023
            blob = store.put_blob([content])
            assert store.read_blob(blob, what="x") == content
    assert any("uploads" in request for request in proxy.requests), "it was not sent in parts"


class Losing(MemoryObjects):
    """Every conditional write is carried out, and its response lost."""

    def create(self, key: str, data: bytes) -> Version | None:
        made = super().create(key, data)
        if made is not None:
            raise IOFailed("lost")
        return made

    def swap(self, key: str, data: bytes, version: Version) -> Version | None:
        made = super().swap(key, data, version)
        if made is not None:
            raise IOFailed("lost")
        return made


def test_a_storage_that_answers_no_conditional_write_is_still_written() -> None:
    objects = Losing(Storage())
    with ObjectStore(objects, writer=Writer(objects, lambda tried: None)) as store:
        everything(store)


def test_a_write_that_meets_another_one_has_failed() -> None:
    objects = MemoryObjects(Storage())
    writer = Writer(objects, lambda tried: None)
    first = writer.create("key", b"ours")
    assert first is not None
    assert writer.create("key", b"theirs") is None
    assert writer.swap("key", b"newer", first) is not None
    assert writer.swap("key", b"theirs", first) is None
    assert writer.swap("other", b"theirs", first) is None


def test_a_storage_that_is_down_is_told(s3: S3Server, proxy: Proxy) -> None:
    with open_store(f"s3://{s3.bucket()}/x") as store:
        proxy.fault = lambda method, path: 503
        with pytest.raises(IOFailed, match=r"^listing s3://bucket-\w+/x/names: .{1,400}$"):
            list(store.names())


# What is told at the start


def test_refused_credentials_are_told(s3: S3Server, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: "forbid"
    with pytest.raises(
        NoAccess, match=r"^reading .*: the storage refuses the credentials \(InvalidAccessKeyId"
    ) as error:
        open_store(f"s3://{s3.bucket()}/x")
    assert "\n" not in str(error.value)


def test_missing_credentials_are_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # Where the machines of a cloud ask for theirs; here nobody answers.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/169.254.169.254")
    with pytest.raises(NoAccess, match=r"no credentials \(for S3 AWS_ACCESS_KEY_ID and AWS_SEC"):
        open_store("s3://some-bucket/x")


def test_a_missing_bucket_is_told(s3: S3Server) -> None:
    with pytest.raises(NotAStore, match=r"^there is no such bucket: NoSuchBucket: The"):
        open_store("s3://no-such-bucket/x")


def test_an_endpoint_that_is_not_there_is_told(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(IOFailed, match=r"^reading s3://some-bucket/x/.*127\.0\.0\.1:9") as error:
        open_store("s3://some-bucket/x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://bucket//x", "ftp://bucket/x", "s3://b/../x", "s3://b/x?y=z", "S3:bucket/"],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidValue, match="is not the address of a store: s3://BUCKET/PREFIX"):
        check_url(url)


def test_a_prefix_that_holds_something_else_is_refused_and_left_alone(s3: S3Server) -> None:
    bucket = s3.bucket()
    objects = connect(f"s3://{bucket}/x")
    objects.create("letter", b"dear")
    with pytest.raises(NotAStore, match="not empty: it holds 'letter'"):
        open_store(f"s3://{bucket}/x")
    with pytest.raises(NotAStore, match="there is no store at"):
        open_store(f"s3://{bucket}/y", create=False)
    assert [found.key for found in objects.list("")] == ["letter"]
    objects.close()


def test_the_package_that_is_missing_is_told() -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from holdfast.store import open_store\n"
        "open_store('s3://bucket/x')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.stderr.splitlines()[-1].endswith(
        "s3://bucket/x needs a package more: pip install 'holdfast[object-store]' "
        "(there is no module obstore)"
    )


# Damage


def test_every_damaged_object_is_refused_by_name(s3: S3Server) -> None:
    """A flipped byte, a truncation, and an object in another's place."""
    url = f"s3://{s3.bucket()}/x"
    objects = connect(url)
    with open_store(url) as store:
        save(store)
    keys = [f.key for where in ("blobs", "manifests", "names") for f in objects.list(where)]
    assert len(keys) == 4
    for key in keys:
        (got,) = objects.get([key])
        assert got is not None
        whole = got.data
        ends = {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}
        flipped = [whole[:n] + bytes([whole[n] ^ 4]) + whole[n + 1 :] for n in ends]
        cut = [whole[:n] for n in ends] + [whole[: whole.rfind(b"\n{") + 1], whole + b"\0"]
        for data in flipped + cut:
            objects.upload(key, [memoryview(data)], len(data))
            with open_store(url) as store, pytest.raises(Corrupt) as error:
                load(store)
            assert error.value.path == f"{url}/{key}"
            assert f"{url}/{key}" in str(error.value)
        objects.upload(key, [memoryview(whole)], len(whole))
    with open_store(url) as store:
        load(store)
    objects.close()
