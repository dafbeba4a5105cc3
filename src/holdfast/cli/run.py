"""`holdfast run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.checkpoint import as_document
from holdfast.cli.online import connect, server_options
from holdfast.cli.output import (
    as_json,
    count,
    one_line_errors,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)
from holdfast.cli.suggest import Suggesting
from holdfast.protocol.errors import NotFoundError

if TYPE_CHECKING:
    from holdfast.protocol.rest import TrainingRun

_PAGE = 500


@click.group(name="run", cls=Suggesting)
def command() -> None:
    """Look at training runs."""


@command.command(name="list")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many."
)
@server_options
@as_json
def list_(limit: int, url: str, api_key: str, as_json: bool) -> None:
    """List your runs, the newest first."""
    found: list[TrainingRun] = []
    with one_line_errors():
        rest = connect(url, api_key)
        while True:
            wanted = min(_PAGE, limit - len(found))
            page = rest.list_training_runs(wanted, len(found)).result()
            found += page.training_runs
            if len(page.training_runs) < wanted or len(found) >= limit:
                break
    if as_json:
        print_json([_as_document(run) for run in found])
        return
    if not found:
        say("there are no runs")
        return
    print_table(
        ("run", "state", "position", "base model", "last request (UTC)"),
        [
            (
                run.training_run_id,
                _state(run),
                None if run.status is None else run.status.position,
                run.base_model,
                run.last_request_time,
            )
            for run in found
        ],
        right="position",
        whole="run",
    )
    if page.cursor.total_count > len(found):
        say(f"{len(found)} of {page.cursor.total_count} shown; --limit shows more")


@command.command()
@click.argument("run")
@server_options
@as_json
def info(run: str, url: str, api_key: str, as_json: bool) -> None:
    """Show a run and its checkpoints. RUN is its id, as `list` shows it.

    Its state is live while it has something to do, else idle, or evicted from the memory of the
    worker until its next request; recovering while it is rebuilt after a crash. Once it is over it
    is ended, or stored if its checkpoints were imported; lost or corrupted if its state cannot be
    had or trusted any more. Its position is the number of the last request whose effect is
    complete: a snapshot keeps the state of one, and a recovery replays what follows.
    """
    with one_line_errors():
        rest = connect(url, api_key)
        try:
            found = rest.get_training_run(run).result()
        except NotFoundError as error:
            raise click.ClickException(
                f"you have no run {run!r} on {url}; `holdfast run list` shows those you have"
            ) from error
        checkpoints = rest.list_checkpoints(run).result().checkpoints
    if as_json:
        print_json(
            _as_document(found) | {"checkpoints": [as_document(item) for item in checkpoints]}
        )
        return
    metadata, last = found.user_metadata or {}, found.last_checkpoint
    print_facts(
        [
            ("run", found.training_run_id),
            ("owner", found.model_owner),
            ("base model", found.base_model),
            ("LoRA rank", found.lora_rank),
            ("last request", found.last_request_time),
            *_standing(found),
            ("last checkpoint", None if last is None else last.tinker_path),
            *((f"metadata {key}", value) for key, value in sorted(metadata.items())),
        ]
    )
    if checkpoints:
        print_table(
            ("checkpoint", "step", "size", "created (UTC)", "expires (UTC)"),
            [
                (c.checkpoint_id, c.step, size(c.size_bytes), c.time, c.expires_at)
                for c in checkpoints
            ],
            right="step size",
        )


def _state(run: TrainingRun) -> str | None:
    if run.status is not None:
        return run.status.state
    return "corrupted" if run.corrupted else None


def _standing(run: TrainingRun) -> list[tuple[str, Any]]:
    """Where a run stands, and what it has gone through."""
    status = run.status
    state = "corrupted: its replay gave other results" if run.corrupted else _state(run)
    if status is None:
        return [("state", state)]
    snapshot = status.snapshot
    recovered = f"{status.recoveries}, with {count(status.replayed, 'operation')} replayed"
    diverged = (
        f"{count(status.divergences, 'replayed operation')} gave other results under other "
        f"numerics, most recently from position {status.diverged_at} on"
    )
    return [
        ("state", state),
        ("note", status.note),
        ("position", status.position),
        ("pending", status.pending or None),
        ("last snapshot", None if snapshot is None else f"position {snapshot.position}"),
        ("snapshot made", None if snapshot is None else snapshot.time),
        ("recoveries", recovered if status.recoveries else None),
        ("diverged", diverged if status.divergences else None),
    ]


def _as_document(run: TrainingRun) -> dict[str, Any]:
    """A run as JSON: these keys stay."""
    last, sampler = run.last_checkpoint, run.last_sampler_checkpoint
    return {
        "run": run.training_run_id,
        "owner": run.model_owner,
        "base_model": run.base_model,
        "lora_rank": run.lora_rank,
        "last_request": run.last_request_time,
        "corrupted": run.corrupted,
        "last_checkpoint": None if last is None else last.tinker_path,
        "last_sampler_checkpoint": None if sampler is None else sampler.tinker_path,
        "user_metadata": run.user_metadata or {},
        "status": None if run.status is None else run.status.to_json(),
    }
