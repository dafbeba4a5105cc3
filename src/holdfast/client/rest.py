"""Runs, checkpoints and sessions as the server lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from holdfast.client.download import Progress, download_archive
from holdfast.client.futures import Future
from holdfast.client.http import Answer, RetryConfig, Server
from holdfast.client.types import (
    CheckpointsListResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from holdfast.protocol.bodies import Body, check_body
from holdfast.protocol.checkpoints import (
    CheckpointInfo,
    CopyWeightsRequest,
    CopyWeightsResponse,
    DeleteCheckpointsRequest,
    DeleteCheckpointsResponse,
    ExternalWeightsUrlsResponse,
    SetTtlRequest,
)
from holdfast.protocol.paths import CheckpointPath, check_run_id
from holdfast.protocol.rest import AssignProjectRequest

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

AccessScope = Literal["owned", "accessible"]


class RestClient:
    """Looks at runs, checkpoints and sessions, and manages checkpoints. Opens no session.

    Each method returns a future; each `_async` form gives its result.

    >>> rest = RestClient()  # doctest: +SKIP
    >>> rest.list_training_runs().result().training_runs[0].last_checkpoint  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> None:
        from holdfast.client.service import connect

        self._server = connect(base_url, api_key, retry=retry_config)

    @classmethod
    def _of(cls, server: Server) -> RestClient:
        made = cls.__new__(cls)
        made._server = server
        return made

    # ---- runs ----

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> Future[TrainingRunsResponse]:
        """Training runs, the last used first.

        >>> rest.list_training_runs(limit=5).result().training_runs  # doctest: +SKIP
        """
        params: dict[str, Any] = {"limit": limit, "offset": offset, "access_scope": access_scope}
        if project_id is not None:
            params["project_id"] = project_id
        return self._get("training_runs", TrainingRunsResponse, params)

    async def list_training_runs_async(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> TrainingRunsResponse:
        """As `list_training_runs`, to its result."""
        return await self.list_training_runs(limit, offset, access_scope, project_id)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> Future[TrainingRun]:
        """One run, with its last checkpoint.

        >>> rest.get_training_run(run_id).result().last_checkpoint.tinker_path  # doctest: +SKIP
        """
        params = {"access_scope": access_scope}
        return self._get(_run_path(training_run_id), TrainingRun, params)

    async def get_training_run_async(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> TrainingRun:
        """As `get_training_run`, to its result."""
        return await self.get_training_run(training_run_id, access_scope)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> Future[TrainingRun]:
        """The run that a checkpoint belongs to.

        >>> rest.get_training_run_by_tinker_path(path).result().base_model  # doctest: +SKIP
        """
        return self.get_training_run(CheckpointPath.parse(tinker_path).run_id, access_scope)

    async def get_training_run_by_tinker_path_async(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> TrainingRun:
        """As `get_training_run_by_tinker_path`, to its result."""
        return await self.get_training_run_by_tinker_path(tinker_path, access_scope)

    # ---- checkpoints ----

    def list_checkpoints(self, training_run_id: str) -> Future[CheckpointsListResponse]:
        """The checkpoints of a run.

        >>> rest.list_checkpoints(run_id).result().checkpoints  # doctest: +SKIP
        """
        return self._get(f"{_run_path(training_run_id)}/checkpoints", CheckpointsListResponse)

    async def list_checkpoints_async(self, training_run_id: str) -> CheckpointsListResponse:
        """As `list_checkpoints`, to its result."""
        return await self.list_checkpoints(training_run_id)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> Future[CheckpointsListResponse]:
        """The checkpoints of all your runs, the newest first.

        >>> rest.list_user_checkpoints().result().checkpoints  # doctest: +SKIP
        """
        return self._get("checkpoints", CheckpointsListResponse, {"limit": limit, "offset": offset})

    async def list_user_checkpoints_async(
        self, limit: int = 100, offset: int = 0
    ) -> CheckpointsListResponse:
        """As `list_user_checkpoints`, to its result."""
        return await self.list_user_checkpoints(limit, offset)

    def get_checkpoint(self, tinker_path: str) -> Future[CheckpointInfo]:
        """Everything known about a checkpoint: its files, their hashes, how it was trained.

        Only Holdfast's own server answers this.

        >>> rest.get_checkpoint(path).result().own_bytes  # doctest: +SKIP
        """
        return self._get(_address(tinker_path), CheckpointInfo)

    async def get_checkpoint_async(self, tinker_path: str) -> CheckpointInfo:
        """As `get_checkpoint`, to its result."""
        return await self.get_checkpoint(tinker_path)

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> Future[str]:
        """Copy a checkpoint into a run of its own, without copying bytes; the copy's path.

        `weights_access_token` is the key of another owner who may read it.

        >>> rest.copy_weights(path, ttl_seconds=86_400).result()  # doctest: +SKIP
        """
        body = check_body(
            CopyWeightsRequest,
            {
                "source_path": path,
                "destination_project_id": destination_project_id,
                "ttl_seconds": ttl_seconds,
            },
        )
        token = "x-tinker-weights-access-token"
        headers = None if weights_access_token is None else {token: weights_access_token}

        async def work() -> str:
            answer = await self._server.call("POST", "copy_weights", body, extra_headers=headers)
            return answer.read(CopyWeightsResponse).tinker_path

        return Future(work(), self._server.runtime)

    async def copy_weights_async(
        self,
        path: str,
        destination_project_id: str | None = None,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        """As `copy_weights`, to its result."""
        return await self.copy_weights(
            path, destination_project_id, ttl_seconds, weights_access_token
        )

    def get_external_weights_urls(self, tinker_path: str) -> Future[ExternalWeightsUrlsResponse]:
        """Where each file of external weights can be fetched for a while, without a key.

        >>> rest.get_external_weights_urls(path).result().urls  # doctest: +SKIP
        """
        address = f"{_address(tinker_path)}/external_weights_urls"
        return self._get(address, ExternalWeightsUrlsResponse)

    async def get_external_weights_urls_async(
        self, tinker_path: str
    ) -> ExternalWeightsUrlsResponse:
        """As `get_external_weights_urls`, to its result."""
        return await self.get_external_weights_urls(tinker_path)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> Future[WeightsInfoResponse]:
        """What a checkpoint needs of a model: base model, LoRA configuration, optimizer.

        >>> rest.get_weights_info_by_tinker_path(path).result().lora_rank  # doctest: +SKIP
        """
        return self._do(
            "POST", "weights_info", _to(WeightsInfoResponse), {"tinker_path": tinker_path}
        )

    async def get_weights_info_by_tinker_path_async(self, tinker_path: str) -> WeightsInfoResponse:
        """As `get_weights_info_by_tinker_path`, to its result."""
        return await self.get_weights_info_by_tinker_path(tinker_path)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> Future[None]:
        """Delete a checkpoint; `checkpoint_id` is as listed, `weights/NAME`.

        >>> rest.delete_checkpoint(run_id, "weights/epoch-1").result()  # doctest: +SKIP
        """
        kind, _, name = checkpoint_id.rpartition("/")
        path = CheckpointPath.of(training_run_id, kind or "weights", name)
        return self.delete_checkpoint_from_tinker_path(str(path))

    async def delete_checkpoint_async(self, training_run_id: str, checkpoint_id: str) -> None:
        """As `delete_checkpoint`, to its end."""
        await self.delete_checkpoint(training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Delete a checkpoint.

        >>> rest.delete_checkpoint_from_tinker_path(path).result()  # doctest: +SKIP
        """
        return self._do("DELETE", _address(tinker_path), _nothing)

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """As `delete_checkpoint_from_tinker_path`, to its end."""
        await self.delete_checkpoint_from_tinker_path(tinker_path)

    def delete_checkpoints(self, tinker_paths: Sequence[str]) -> Future[DeleteCheckpointsResponse]:
        """Delete up to 1,000 checkpoints; one that cannot be deleted does not keep the others.

        Only Holdfast's own server answers this.

        >>> rest.delete_checkpoints(paths).result().failed  # doctest: +SKIP
        """
        body = check_body(DeleteCheckpointsRequest, {"tinker_paths": list(tinker_paths)})
        return self._do("POST", "checkpoints/delete", _to(DeleteCheckpointsResponse), body)

    async def delete_checkpoints_async(
        self, tinker_paths: Sequence[str]
    ) -> DeleteCheckpointsResponse:
        """As `delete_checkpoints`, to its result."""
        return await self.delete_checkpoints(tinker_paths)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Let everybody who can reach the server read a checkpoint.

        >>> rest.publish_checkpoint_from_tinker_path(path).result()  # doctest: +SKIP
        """
        return self._do("POST", f"{_address(tinker_path)}/publish", _nothing)

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """As `publish_checkpoint_from_tinker_path`, to its end."""
        await self.publish_checkpoint_from_tinker_path(tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Take a publication back.

        >>> rest.unpublish_checkpoint_from_tinker_path(path).result()  # doctest: +SKIP
        """
        return self._do("DELETE", f"{_address(tinker_path)}/publish", _nothing)

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """As `unpublish_checkpoint_from_tinker_path`, to its end."""
        await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> Future[None]:
        """Let a checkpoint expire so many seconds from now, or never (None).

        >>> rest.set_checkpoint_ttl_from_tinker_path(path, 86_400).result()  # doctest: +SKIP
        """
        checked = check_body(SetTtlRequest, {"ttl_seconds": ttl_seconds})
        # Spelled out: null takes the expiry away.
        body = {"ttl_seconds": checked.ttl_seconds}
        return self._do("PUT", f"{_address(tinker_path)}/ttl", _nothing, body)

    async def set_checkpoint_ttl_from_tinker_path_async(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> None:
        """As `set_checkpoint_ttl_from_tinker_path`, to its end."""
        await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    def download_checkpoint(
        self, tinker_path: str, directory: str | Path, *, progress: Progress | None = None
    ) -> Future[Path]:
        """Fetch a checkpoint's files into a directory, which is made if need be.

        A download that broke goes on where it stopped, also when it is called again later.
        `progress` is called with bytes done and bytes in all (None when not known).

        >>> rest.download_checkpoint(path, "adapters/epoch-1").result()  # doctest: +SKIP
        """
        address = f"{_address(tinker_path)}/archive"
        return Future(
            download_archive(self._server, address, Path(directory), progress),
            self._server.runtime,
        )

    async def download_checkpoint_async(
        self, tinker_path: str, directory: str | Path, *, progress: Progress | None = None
    ) -> Path:
        """As `download_checkpoint`, to its result."""
        return await self.download_checkpoint(tinker_path, directory, progress=progress)

    # ---- sessions, samplers, models ----

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> Future[ListSessionsResponse]:
        """Ids of sessions, the newest first.

        >>> rest.list_sessions().result().sessions  # doctest: +SKIP
        """
        params = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return self._get("sessions", ListSessionsResponse, params)

    async def list_sessions_async(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> ListSessionsResponse:
        """As `list_sessions`, to its result."""
        return await self.list_sessions(limit, offset, access_scope)

    def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> Future[GetSessionResponse]:
        """The runs and samplers of a session.

        >>> rest.get_session(session_id).result().training_run_ids  # doctest: +SKIP
        """
        params = {"access_scope": access_scope}
        return self._get(f"sessions/{_segment(session_id)}", GetSessionResponse, params)

    async def get_session_async(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> GetSessionResponse:
        """As `get_session`, to its result."""
        return await self.get_session(session_id, access_scope)

    def search_sessions(self, request: SessionSearchRequest) -> Future[SessionSearchResponse]:
        """Sessions by their metadata, name or state.

        >>> rest.search_sessions(SessionSearchRequest(display_name="run 7")).result()
        ... # doctest: +SKIP
        """
        return self._do("POST", "sessions/search", _to(SessionSearchResponse), request)

    async def search_sessions_async(self, request: SessionSearchRequest) -> SessionSearchResponse:
        """As `search_sessions`, to its result."""
        return await self.search_sessions(request)

    def assign_session_project(self, session_id: str, project_id: str) -> Future[None]:
        """Put a session into a project.

        >>> rest.assign_session_project(session_id, "my-project").result()  # doctest: +SKIP
        """
        body = check_body(AssignProjectRequest, {"project_id": project_id})
        return self._do("PUT", f"sessions/{_segment(session_id)}/project", _nothing, body)

    async def assign_session_project_async(self, session_id: str, project_id: str) -> None:
        """As `assign_session_project`, to its end."""
        await self.assign_session_project(session_id, project_id)

    def get_sampler(self, sampler_id: str) -> Future[GetSamplerResponse]:
        """What a sampler samples from.

        >>> rest.get_sampler(sampler.sampling_session_id).result().base_model  # doctest: +SKIP
        """
        return self._get(f"samplers/{_segment(sampler_id)}", GetSamplerResponse)

    async def get_sampler_async(self, sampler_id: str) -> GetSamplerResponse:
        """As `get_sampler`, to its result."""
        return await self.get_sampler(sampler_id)

    def get_server_capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        """The base models that the server has.

        >>> rest.get_server_capabilities().result().supported_models  # doctest: +SKIP
        """
        return self._get("get_server_capabilities", GetServerCapabilitiesResponse)

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """As `get_server_capabilities`, to its result."""
        return await self.get_server_capabilities()

    # ---- how ----

    def _get(
        self, address: str, model: type[M], params: Mapping[str, Any] | None = None
    ) -> Future[M]:
        return self._do("GET", address, _to(model), params=params)

    def _do(
        self,
        method: str,
        address: str,
        read: Callable[[Answer], T],
        body: Body | Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> Future[T]:
        async def work() -> T:
            return read(await self._server.call(method, address, body, params=params))

        return Future(work(), self._server.runtime)


def _to(model: type[M]) -> Callable[[Answer], M]:
    return lambda answer: answer.read(model)


def _nothing(answer: Answer) -> None:
    return None


def _run_path(run_id: str) -> str:
    return f"training_runs/{_segment(check_run_id(run_id))}"


def _segment(text: str) -> str:
    return quote(text, safe=":")


def _address(tinker_path: str) -> str:
    path = CheckpointPath.parse(tinker_path)
    return f"{_run_path(path.run_id)}/checkpoints/{path.kind}/{path.name}"
