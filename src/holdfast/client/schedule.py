"""Checkpointing as a habit: save now and then, keep the last few, resume where it stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from holdfast.client.futures import Future
from holdfast.client.rest import RestClient
from holdfast.client.service import ServiceClient
from holdfast.client.training import TrainingClient
from holdfast.client.types import Checkpoint, OptimizerConfig, SaveWeightsResponse
from holdfast.protocol.errors import (
    AuthenticationError,
    ConflictError,
    ConnectionFailedError,
    HoldfastError,
    NotFoundError,
    RequestError,
    RetryLaterError,
)
from holdfast.protocol.paths import check_user_name

log = logging.getLogger("holdfast.client")

NAME_KEY = "holdfast.name"
STEP_KEY = "holdfast.step"
_PAGE = 100


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A durable checkpoint of a schedule."""

    path: str
    step: int
    """Steps done when it was saved: the step to go on with."""
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """A training script's run, new or resumed."""

    name: str
    training_client: TrainingClient
    start_step: int
    """The first step to do: 0 for a new run."""
    checkpoint: SavedCheckpoint | None
    """What it was resumed from."""
    saved: tuple[SavedCheckpoint, ...] = ()
    """Every checkpoint of this name, the oldest first."""


class CheckpointSchedule:
    """Saves every so many steps or seconds, without stalling the loop.

    Call `step_done` right after each optim_step. The save is submitted behind it and written
    beside what follows; when it is durable, and not before, older ones are deleted down to
    `keep_last`. Those for which `keep` says true are never deleted.

    >>> schedule = CheckpointSchedule(resumed, every_steps=50, keep_last=2)  # doctest: +SKIP
    >>> for step in range(resumed.start_step, 1000):  # doctest: +SKIP
    ...     client.forward_backward(batches[step], "cross_entropy")
    ...     client.optim_step(AdamParams(learning_rate=1e-4))
    ...     schedule.step_done(step)
    >>> schedule.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        run: Resumed | TrainingClient,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = 3,
        keep: Callable[[SavedCheckpoint], bool] | None = None,
        prefix: str = "step",
    ) -> None:
        if every_steps is None and every_seconds is None:
            raise RequestError("when to save? give every_steps, every_seconds or both")
        if every_steps is not None and every_steps < 1:
            raise RequestError(f"every_steps is {every_steps}: at least 1")
        if every_seconds is not None and every_seconds <= 0:
            raise RequestError(f"every_seconds is {every_seconds}: above 0")
        if keep_last is not None and keep_last < 1:
            raise RequestError(f"keep_last is {keep_last}: at least 1, or None to keep all")
        check_user_name(f"{prefix}-000000")
        resumed = run if isinstance(run, Resumed) else None
        self._client = run.training_client if isinstance(run, Resumed) else run
        self._name = None if resumed is None else resumed.name
        self._saved: list[SavedCheckpoint] = [] if resumed is None else list(resumed.saved)
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._keep_last = keep_last
        self._keep = keep
        self._prefix = prefix
        self._rest = RestClient._of(self._client._server)
        self._last_step = 0 if resumed is None else resumed.start_step
        self._last_time = time.monotonic()
        self._done_steps = self._last_step
        self._pending: Future[SavedCheckpoint | None] | None = None
        self._uncertain: int | None = None
        """The step whose save ended with an error and may be durable all the same."""
        self.error: HoldfastError | None = None
        """Why the last save failed; None when it succeeded."""

    @property
    def saved(self) -> Sequence[SavedCheckpoint]:
        """The durable checkpoints that have not been deleted, the oldest first."""
        return tuple(self._saved)

    def step_done(self, step: int) -> Future[SavedCheckpoint | None] | None:
        """Say that step `step`, counted from 0, is done; save if it is time.

        Returns the save's future when one was submitted. While one is under way no other begins.

        >>> schedule.step_done(step)  # doctest: +SKIP
        """
        self._done_steps = step + 1
        if self._pending is not None and not self._pending.done():
            return None
        steps = self._done_steps - self._last_step
        waited = time.monotonic() - self._last_time
        due = (self._every_steps is not None and steps >= self._every_steps) or (
            self._every_seconds is not None and waited >= self._every_seconds
        )
        return self._save() if due and steps > 0 else None

    def finish(self, timeout: float | None = None) -> SavedCheckpoint | None:
        """Save what no checkpoint holds yet, and wait until it is durable.

        Returns the newest checkpoint. Raises the save's error.

        >>> schedule.finish().path  # doctest: +SKIP
        """
        if self._pending is not None:
            self._pending.result(timeout)
        if self._done_steps > self._last_step or self.error is not None:
            self._save().result(timeout)
        return self._newest()

    async def finish_async(self, timeout: float | None = None) -> SavedCheckpoint | None:
        """As `finish`."""
        if self._pending is not None:
            await self._pending.result_async(timeout)
        if self._done_steps > self._last_step or self.error is not None:
            await self._save().result_async(timeout)
        return self._newest()

    def _newest(self) -> SavedCheckpoint | None:
        if self.error is not None:
            raise self.error
        return self._saved[-1] if self._saved else None

    def _save(self) -> Future[SavedCheckpoint | None]:
        step = self._done_steps
        saving = self._client.save_state(
            f"{self._prefix}-{step:06d}", user_metadata=self._metadata(step)
        )
        self._last_time = time.monotonic()
        previous, self._last_step = self._last_step, step
        self._pending = Future(self._settle(saving, step, previous), self._client._server.runtime)
        return self._pending

    def _metadata(self, step: int) -> dict[str, str]:
        name = {} if self._name is None else {NAME_KEY: self._name}
        return {STEP_KEY: str(step), **name}

    async def _settle(
        self, saving: Future[SaveWeightsResponse], step: int, previous: int
    ) -> SavedCheckpoint | None:
        try:
            made = await self._made(saving, step)
        except HoldfastError as error:
            if not isinstance(error, ConflictError):
                self._uncertain = step
            log.error("the checkpoint after step %d was not saved: %s", step, error.message)
            self.error = error
            self._last_step = previous  # so the next step tries again
            return None
        self.error = None
        self._saved.append(made)
        for old in await asyncio.to_thread(self._surplus):
            try:
                await self._rest.delete_checkpoint_from_tinker_path(old.path)
            except NotFoundError:
                pass
            except HoldfastError as error:
                log.warning("%s was not deleted: %s", old.path, error.message)
                continue
            self._saved.remove(old)
        return made

    async def _made(self, saving: Future[SaveWeightsResponse], step: int) -> SavedCheckpoint:
        """The checkpoint that a save made, or an earlier try of it whose answer was lost."""
        try:
            return SavedCheckpoint((await saving).path, step)
        except ConflictError:
            if self._uncertain != step:
                raise
            path = f"tinker://{self._client.model_id}/weights/{self._prefix}-{step:06d}"
            listed = await self._rest.list_checkpoints(self._client.model_id)
            for found in listed.checkpoints:
                metadata = found.user_metadata or {}
                ours = {key: metadata[key] for key in (STEP_KEY, NAME_KEY) if key in metadata}
                if found.tinker_path == path and ours == self._metadata(step):
                    return SavedCheckpoint(path, step, found.time)
            raise

    def _surplus(self) -> list[SavedCheckpoint]:
        if self._keep_last is None:
            return []
        older = self._saved[: -self._keep_last]
        return [old for old in older if self._keep is None or not self._keep(old)]


def resume_or_create(
    service_client: ServiceClient,
    name: str,
    *,
    base_model: str,
    rank: int = 32,
    seed: int | None = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
    optimizer: OptimizerConfig | None = None,
    user_metadata: dict[str, str] | None = None,
) -> Resumed:
    """Begin the run of this name, or go on from its newest checkpoint that loads.

    A script that calls this first may be stopped and started again at any time: it trains on from
    `start_step`, no batch twice, none left out. Checkpoints are found by what CheckpointSchedule
    writes into them, whichever machine wrote it. One that cannot be loaded any more is passed
    over, with a warning, for the one before it.

    >>> run = resume_or_create(service, "dates", base_model="holdfast-tiny")  # doctest: +SKIP
    >>> run.start_step  # doctest: +SKIP
    """
    return _resume_or_create(
        service_client,
        name,
        base_model,
        rank,
        seed,
        (train_mlp, train_attn, train_unembed),
        optimizer,
        user_metadata,
    ).result()


async def resume_or_create_async(
    service_client: ServiceClient,
    name: str,
    *,
    base_model: str,
    rank: int = 32,
    seed: int | None = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
    optimizer: OptimizerConfig | None = None,
    user_metadata: dict[str, str] | None = None,
) -> Resumed:
    """As `resume_or_create`."""
    return await _resume_or_create(
        service_client,
        name,
        base_model,
        rank,
        seed,
        (train_mlp, train_attn, train_unembed),
        optimizer,
        user_metadata,
    )


def _resume_or_create(
    service: ServiceClient,
    name: str,
    base_model: str,
    rank: int,
    seed: int | None,
    flags: tuple[bool, bool, bool],
    optimizer: OptimizerConfig | None,
    user_metadata: dict[str, str] | None,
) -> Future[Resumed]:
    if not name:
        raise RequestError("a run to be resumed needs a name")
    metadata = {**(user_metadata or {}), NAME_KEY: name}

    async def work() -> Resumed:
        saved = await _find(service.create_rest_client(), name)
        for checkpoint in reversed(saved):
            try:
                client = await service.create_training_client_from_state_with_optimizer(
                    checkpoint.path, user_metadata=metadata
                )
            except (AuthenticationError, ConnectionFailedError, RetryLaterError):
                raise
            except HoldfastError as error:
                log.warning("%s cannot be resumed from: %s", checkpoint.path, error.message)
                continue
            try:
                _check_same(client, name, base_model, rank, flags)
            except RequestError:
                await client.close_async()
                raise
            return Resumed(name, client, checkpoint.step, checkpoint, tuple(saved))
        if saved:
            raise NotFoundError(
                f"none of the {len(saved)} checkpoints of {name!r} can be resumed from; delete"
                " them to begin anew",
                code="no_usable_checkpoint",
            )
        mlp, attn, unembed = flags
        client = await service.create_lora_training_client(
            base_model, rank, seed, mlp, attn, unembed, metadata, optimizer
        )
        return Resumed(name, client, 0, None)

    return service._future(work())


def _check_same(
    client: TrainingClient, name: str, base_model: str, rank: int, flags: tuple[bool, bool, bool]
) -> None:
    info = client.get_info()
    found = (info.model_data.model_name, info.lora_rank)
    if found != (base_model, rank):
        raise RequestError(
            f"the run {name!r} has base model {found[0]!r} and rank {found[1]}, not"
            f" {base_model!r} and {rank}: give what it has, or begin a run of another name"
        )
    trained = {
        "train_mlp": info.train_mlp,
        "train_attn": info.train_attn,
        "train_unembed": info.train_unembed,
    }
    for (flag, has), wanted in zip(trained.items(), flags, strict=True):
        if has is not None and has != wanted:  # some servers do not say
            raise RequestError(
                f"the run {name!r} has {flag}={has}, not {wanted}: give what it has, or begin a run"
                " of another name"
            )


async def _find(rest: RestClient, name: str) -> list[SavedCheckpoint]:
    """The training checkpoints of a name, the oldest first."""
    found: list[Checkpoint] = []
    offset = 0
    while True:
        page = await rest.list_user_checkpoints(limit=_PAGE, offset=offset)
        found.extend(
            checkpoint
            for checkpoint in page.checkpoints
            if checkpoint.checkpoint_type == "training" and _step_of(checkpoint, name) is not None
        )
        offset += _PAGE
        if len(page.checkpoints) < _PAGE:
            break
    # Within a run by the step: the server's clock may have been set back.
    last: dict[str, datetime] = {}
    for one in found:
        last[_run_of(one)] = max(one.time, last.get(_run_of(one), one.time))
    found.sort(
        key=lambda one: (last[_run_of(one)], _run_of(one), _step_of(one, name) or 0, one.time)
    )
    return [
        SavedCheckpoint(checkpoint.tinker_path, step, checkpoint.time)
        for checkpoint in found
        if (step := _step_of(checkpoint, name)) is not None
    ]


def _run_of(checkpoint: Checkpoint) -> str:
    return checkpoint.tinker_path.rpartition("/")[0]


def _step_of(checkpoint: Checkpoint, name: str) -> int | None:
    metadata = checkpoint.user_metadata or {}
    step = metadata.get(STEP_KEY, "")
    return int(step) if metadata.get(NAME_KEY) == name and step.isdecimal() else None
