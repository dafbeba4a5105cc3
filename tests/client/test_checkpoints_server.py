"""Checkpoints looked after through our own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from holdfast import ServiceClient, TrainingClient
from holdfast.client.rest import RestClient
from holdfast.errors import NotFoundError, RequestError
from holdfast.protocol.rest import SessionSearchRequest
from tests.support.server import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def training(server: ServerProcess) -> Iterator[TrainingClient]:
    with ServiceClient(base_url=server.url, api_key="tml-x") as service:
        yield service.create_lora_training_client("holdfast-tiny", rank=4).result(60)


@pytest.fixture(scope="module")
def rest(server: ServerProcess) -> RestClient:
    return RestClient(base_url=server.url, api_key="tml-x")


def test_external_weights_have_an_address_per_file(
    server: ServerProcess, training: TrainingClient, rest: RestClient
) -> None:
    path = training.save_weights_external("out", ttl_seconds=3600).result(60).path
    answer = rest.get_external_weights_urls(path).result(60)
    files = server.manifest(path).files
    assert answer.urls.keys() == files.keys()
    for name, url in answer.urls.items():
        assert len(httpx2.get(url).content) == files[name].size
    with pytest.raises(RequestError, match="archive"):
        rest.get_external_weights_urls(training.save_state("s").result(60).path).result(60)


@pytest.mark.anyio
async def test_a_copy_is_described_and_deleted(training: TrainingClient, rest: RestClient) -> None:
    path = (await training.save_state("source")).path
    copy = await rest.copy_weights_async(path, "project", ttl_seconds=7200)
    mine, theirs = await rest.get_checkpoint_async(path), await rest.get_checkpoint_async(copy)
    assert theirs.files == mine.files
    assert (theirs.parent, theirs.own_bytes) == (mine.manifest, 0)
    assert theirs.expires_at is not None
    found = await rest.search_sessions_async(SessionSearchRequest(project_ids=["project"]))
    session = theirs.tinker_path.removeprefix("tinker://").partition(":")[0]
    assert [item.session_id for item in found.sessions] == [session]
    await rest.assign_session_project_async(session, "other")
    found = await rest.search_sessions_async(SessionSearchRequest(project_ids=["project"]))
    assert found.sessions == []
    done = await rest.delete_checkpoints_async([copy, copy + "-not"])
    assert (done.deleted, list(done.failed)) == ([copy], [copy + "-not"])
    with pytest.raises(NotFoundError):
        await rest.get_checkpoint_async(copy)
