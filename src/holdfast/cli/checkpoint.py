"""`holdfast checkpoint`: the commands that ask a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import checkpoint_files
from holdfast.cli.durations import Duration, DurationOrNever
from holdfast.cli.online import PathType, connect, server_options
from holdfast.cli.output import (
    as_json,
    bytes_progress,
    one_line_errors,
    print_facts,
    print_groups,
    print_json,
    print_table,
    say,
    size,
)
from holdfast.cli.suggest import Suggesting
from holdfast.protocol.paths import CheckpointPath

if TYPE_CHECKING:
    from holdfast.client.rest import RestClient
    from holdfast.protocol.checkpoints import Checkpoint, CheckpointInfo

_PAGE = 500
_MOST_AT_ONCE = 1000
_DOWNLOAD_PATIENCE = 120.0


@click.group(name="checkpoint", cls=Suggesting)
def command() -> None:
    """List, check, move and remove checkpoints.

    PATH is tinker://RUN/weights/NAME (or sampler_weights, external_weights), as `list` shows it.
    verify, export and import work on the files of a data directory; all others ask a server.
    """


for _offline in (checkpoint_files.verify, checkpoint_files.export, checkpoint_files.import_):
    command.add_command(_offline)


@command.command(name="list")
@click.option("--run", metavar="RUN", help="Those of one run only.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many."
)
@server_options
@as_json
def list_(run: str | None, limit: int, url: str, api_key: str, as_json: bool) -> None:
    """List your checkpoints by run, the newest first.

    A checkpoint's PATH is the run's line and its own together. "own" is what deleting a checkpoint
    gives back: the bytes that no other one shares.
    """
    with one_line_errors():
        found, total = _listed(connect(url, api_key), run, limit)
    if as_json:
        print_json([as_document(checkpoint) for checkpoint in found])
        return
    if not found:
        say("there are no checkpoints" + (f" of run {run}" if run else ""))
        return
    groups: dict[str, list[tuple[object, ...]]] = {}
    for item in found:
        run_id = CheckpointPath.parse(item.tinker_path).run_id
        groups.setdefault(f"tinker://{run_id}/", []).append(
            (
                item.checkpoint_id,
                item.step,
                size(item.size_bytes),
                size(item.own_bytes),
                item.time,
                item.expires_at,
                "public" if item.public else "",
            )
        )
    print_groups(
        ("checkpoint", "step", "size", "own", "created (UTC)", "expires (UTC)", ""),
        groups,
        right="step size own",
    )
    if total > len(found):
        say(f"{len(found)} of {total} shown; --limit shows more")


@command.command()
@click.argument("path", type=PathType())
@server_options
@as_json
def info(path: CheckpointPath, url: str, api_key: str, as_json: bool) -> None:
    """Show everything known about a checkpoint."""
    with one_line_errors():
        found = connect(url, api_key).get_checkpoint(str(path)).result()
    if as_json:
        print_json(as_full_document(found))
        return
    layers = [name for name in ("attn", "mlp", "unembed") if getattr(found, f"train_{name}")]
    own = found.own_bytes or 0
    metadata = found.user_metadata or {}
    print_facts(
        [
            ("path", found.tinker_path),
            ("type", found.checkpoint_type),
            ("owner", found.owner),
            ("created", found.time),
            ("expires", found.expires_at or "never"),
            ("public", found.public),
            ("base model", found.base_model),
            ("base revision", found.base_revision),
            ("LoRA", f"rank {found.lora_rank}, alpha {found.lora_alpha:g}, {', '.join(layers)}"),
            ("step", found.step),
            ("optimizer", found.optimizer or "not kept"),
            ("pending gradients", found.pending_forward_backwards or None),
            ("incomplete", found.incomplete),
            ("size", f"{size(found.size_bytes)}, of which {size(own)} are its own"),
            ("manifest", found.manifest),
            ("made from", found.parent),
            *((f"metadata {key}", value) for key, value in sorted(metadata.items())),
        ]
    )
    print_table(
        ("file", "bytes", "blake3"),
        [(name, file.size, file.hash) for name, file in found.files.items()],
        right="bytes",
    )


@command.command()
@click.argument("path", type=PathType())
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), required=False)
@server_options
@as_json
def download(
    path: CheckpointPath, directory: Path | None, url: str, api_key: str, as_json: bool
) -> None:
    """Fetch a checkpoint's files into DIRECTORY (default: ./NAME).

    The directory is a PEFT adapter. A download that broke goes on where it stopped when it is
    called again.
    """
    directory = Path(path.name) if directory is None else directory
    with one_line_errors():
        found = connect(url, api_key).get_checkpoint(str(path)).result()
        rest = connect(url, api_key, _DOWNLOAD_PATIENCE)
        with bytes_progress(path.name, found.size_bytes) as show:
            rest.download_checkpoint(str(path), directory, progress=show).result()
    if as_json:
        print_json(
            {
                "path": str(path),
                "directory": str(directory.absolute()),
                "files": sorted(found.files),
            }
        )
        return
    say(f"{path} is in {directory} ({size(found.size_bytes)})")


@command.command()
@click.argument("path", type=PathType())
@click.option("--ttl", type=Duration(), help="Let the copy expire after this time, e.g. 7d.")
@click.option("--project", metavar="PROJECT", help="The project that the copy is put into.")
@click.option(
    "--access-token",
    envvar="TINKER_WEIGHTS_ACCESS_TOKEN",
    help="Another owner's key, for a checkpoint that only they can read.",
)
@server_options
@as_json
def copy(
    path: CheckpointPath,
    ttl: int | None,
    project: str | None,
    access_token: str | None,
    url: str,
    api_key: str,
    as_json: bool,
) -> None:
    """Copy a checkpoint into a run of its own, which only holds it. No bytes are copied."""
    with one_line_errors():
        made = connect(url, api_key).copy_weights(str(path), project, ttl, access_token).result()
    if as_json:
        print_json({"path": made})
    else:
        click.echo(made)


@command.command()
@click.argument("path", type=PathType(), nargs=-1)
@click.option("--run", metavar="RUN", help="Delete all checkpoints of a run.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@server_options
@as_json
def delete(
    path: tuple[CheckpointPath, ...],
    run: str | None,
    yes: bool,
    url: str,
    api_key: str,
    as_json: bool,
) -> None:
    """Delete checkpoints. What one cannot delete does not keep the others."""
    if bool(path) == (run is not None):
        raise click.UsageError("name one or more PATHs, or a run with --run")
    with one_line_errors():
        rest = connect(url, api_key)
        paths = list(dict.fromkeys(str(item) for item in path))
        if run is not None:
            paths = [item.tinker_path for item in rest.list_checkpoints(run).result().checkpoints]
            if not paths:
                say(f"run {run} has no checkpoints")
        if paths and not yes:
            what = paths[0] if len(paths) == 1 else f"{len(paths)} checkpoints"
            click.confirm(f"Delete {what}?", abort=True, err=True)
        deleted: list[str] = []
        failed: dict[str, str] = {}
        for start in range(0, len(paths), _MOST_AT_ONCE):
            done = rest.delete_checkpoints(paths[start : start + _MOST_AT_ONCE]).result()
            deleted += done.deleted
            failed |= done.failed
    if as_json:
        print_json({"deleted": deleted, "failed": failed})
    else:
        for item in deleted:
            say(f"deleted {item}")
        for message in failed.values():
            say(f"Error: {message}")
    if failed:
        raise SystemExit(1)


@command.command()
@click.argument("path", type=PathType())
@click.argument("time", type=DurationOrNever())
@server_options
@as_json
def ttl(path: CheckpointPath, time: int | str, url: str, api_key: str, as_json: bool) -> None:
    """Let a checkpoint expire, or never.

    TIME is counted from now, an hour to ten years: 12h, 7d, 1y; or `never`.
    """
    seconds = time if isinstance(time, int) else None
    with one_line_errors():
        rest = connect(url, api_key)
        rest.set_checkpoint_ttl_from_tinker_path(str(path), seconds).result()
        _show_change(rest, path, as_json, "expires")


@command.command()
@click.argument("path", type=PathType())
@server_options
@as_json
def publish(path: CheckpointPath, url: str, api_key: str, as_json: bool) -> None:
    """Let everybody who can reach the server read a checkpoint."""
    with one_line_errors():
        rest = connect(url, api_key)
        rest.publish_checkpoint_from_tinker_path(str(path)).result()
        _show_change(rest, path, as_json, "public")


@command.command()
@click.argument("path", type=PathType())
@server_options
@as_json
def unpublish(path: CheckpointPath, url: str, api_key: str, as_json: bool) -> None:
    """Let only its owner read a checkpoint again."""
    with one_line_errors():
        rest = connect(url, api_key)
        rest.unpublish_checkpoint_from_tinker_path(str(path)).result()
        _show_change(rest, path, as_json, "public")


def as_document(item: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON: these keys stay."""
    path = CheckpointPath.parse(item.tinker_path)
    return {
        "path": item.tinker_path,
        "run": path.run_id,
        "kind": path.kind,
        "name": path.name,
        "type": item.checkpoint_type,
        "step": item.step,
        "size_bytes": item.size_bytes,
        "own_bytes": item.own_bytes,
        "created": item.time,
        "expires": item.expires_at,
        "public": item.public,
        "user_metadata": item.user_metadata or {},
    }


def as_full_document(item: CheckpointInfo) -> dict[str, Any]:
    """As `as_document`, with all that is known."""
    return as_document(item) | {
        "owner": item.owner,
        "base_model": item.base_model,
        "base_revision": item.base_revision,
        "lora": {
            "rank": item.lora_rank,
            "alpha": item.lora_alpha,
            "train_attn": item.train_attn,
            "train_mlp": item.train_mlp,
            "train_unembed": item.train_unembed,
        },
        "optimizer": item.optimizer,
        "pending_forward_backwards": item.pending_forward_backwards,
        "incomplete": item.incomplete,
        "manifest": item.manifest,
        "parent": item.parent,
        "files": {n: {"bytes": f.size, "blake3": f.hash} for n, f in item.files.items()},
    }


def _listed(rest: RestClient, run: str | None, limit: int) -> tuple[list[Checkpoint], int]:
    if run is not None:
        found = rest.list_checkpoints(run).result().checkpoints
        return found[:limit], len(found)
    listed: list[Checkpoint] = []
    while True:
        wanted = min(_PAGE, limit - len(listed))
        page = rest.list_user_checkpoints(wanted, len(listed)).result()
        listed += page.checkpoints
        total = page.cursor.total_count if page.cursor is not None else len(listed)
        if len(page.checkpoints) < wanted or len(listed) >= limit:
            return listed, total


def _show_change(rest: RestClient, path: CheckpointPath, as_json: bool, what: str) -> None:
    document = as_document(rest.get_checkpoint(str(path)).result())
    if as_json:
        print_json(document)
        return
    value = document[what]
    print_facts([("path", path), (what, "never" if value is None else value)])
