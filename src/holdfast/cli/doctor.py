"""`holdfast doctor`."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.offline import offline_errors
from holdfast.cli.options import catalog, data_dir, store
from holdfast.cli.output import as_json, bytes_progress, count, print_facts, print_json, say, size

if TYPE_CHECKING:
    from holdfast.runs.doctor import Diagnosis, Repaired
    from holdfast.server.data_dir import DataDir


@click.command(name="doctor")
@click.option("--repair", is_flag=True, help="Rebuild the catalog's checkpoints from the store.")
@data_dir
@store
@catalog
@as_json
def command(
    repair: bool, data_dir: Path, store: str | None, catalog: str | None, as_json: bool
) -> None:
    """Examine a data directory: read every byte, and compare the catalog with the store.

    The store is the truth. --repair makes the catalog agree with it, and gives the newest state of
    a run that the catalog has lost a name to resume from; the server must be stopped for it.
    Damaged files are named; what they held can only come from a copy. Exits with 1 unless all is
    well at the end.
    """
    from holdfast.runs import doctor
    from holdfast.server.data_dir import exclusive, existing, looked_at

    directory = data_dir.expanduser().absolute()
    repaired: Repaired | None = None
    with (
        offline_errors(),
        (existing if repair else looked_at)(directory, store, catalog) as opened,
        exclusive(directory) if repair else nullcontext(),
    ):
        if repair:
            _take(opened)
        parts = opened.store, opened.catalog, opened.segments
        with bytes_progress("reading everything in the store", None) as show:
            found = asyncio.run(doctor.examine(*parts, alone=repair, progress=show))
        if repair and found.repairable:
            repaired = asyncio.run(doctor.repair(opened.store, opened.catalog))
            with bytes_progress("looking again", None) as show:
                found = asyncio.run(doctor.examine(*parts, alone=True, progress=show))
    if as_json:
        print_json(_document(found, repaired))
    else:
        _show(found, repaired)
    if not found.ok:
        raise SystemExit(1)


def _take(opened: DataDir) -> None:
    """As a server does, so that one that was cut off from a shared catalog ends, and goes not on
    with what it knew of it before."""
    who = f"holdfast doctor --repair, process {os.getpid()} on {socket.gethostname()}"
    asyncio.run(opened.catalog.claim(who))
    opened.store.before_change(opened.catalog.verify_epoch)


def _show(found: Diagnosis, repaired: Repaired | None) -> None:
    left_over = (
        f"{count(found.orphan_manifests, 'manifest')} and {count(found.orphan_blobs, 'blob')}, "
        f"{size(found.orphan_size)}: sweeps of the server remove them"
    )
    print_facts(
        [
            ("checkpoints", found.checkpoints),
            ("recovery points", found.recovery_points),
            ("blobs", f"{found.blobs}, {size(found.size)}, all read"),
            ("left over", left_over if found.orphan_manifests or found.orphan_blobs else None),
        ]
    )
    if repaired is not None:
        say(
            f"repaired: {count(repaired.listed, 'checkpoint')} listed, "
            f"{count(repaired.removed, 'row')} removed"
        )
        for key in repaired.named:
            say(f"repaired: the last state of run {key.run} is tinker://{key}")
    for kind, text in _problems(found):
        say(f"{kind}: {text}")
    if found.shared and found.lost_runs:
        say(
            f"{count(len(found.lost_runs), 'run')} that this catalog does not know: another "
            "server's, or lost with one; --repair gives their last states names to resume from"
        )
    if found.ok:
        say("all is well")
    elif found.repairable:
        say("stop the server and call `holdfast doctor --repair` to repair the catalog")


def _problems(found: Diagnosis) -> list[tuple[str, str]]:
    """What is wrong: its kind, which stays, and a text."""
    problems = [(error.code, str(error)) for error in found.damage]
    problems += [(error.code, error.message) for error in found.journal_damage]
    problems += [
        ("recovery_point_missing", f"run {run} lives, and its recovery point {id} is not there")
        for run, id in found.lost_recovery_points.items()
    ]
    differences = found.differences
    problems += [
        ("not_in_catalog", f"tinker://{key} is in the store, and not in the catalog")
        for key in differences.unlisted
    ]
    problems += [
        ("not_in_store", f"tinker://{key} is in the catalog, and not in the store")
        for key in differences.gone
    ]
    problems += [
        ("run_not_in_catalog", f"run {run} has checkpoints, and is not in the catalog")
        for run in differences.without_run
    ]
    problems += [
        ("run_lost", f"the catalog has lost run {run}; its state at position {m.seq} is there")
        for run, m in found.lost_runs.items()
        if not found.shared
    ]
    return problems


def _document(found: Diagnosis, repaired: Repaired | None) -> dict[str, Any]:
    """As JSON: these keys stay."""
    return {
        "ok": found.ok,
        "checkpoints": found.checkpoints,
        "recovery_points": found.recovery_points,
        "blobs": found.blobs,
        "size_bytes": found.size,
        "orphans": {
            "manifests": found.orphan_manifests,
            "blobs": found.orphan_blobs,
            "bytes": found.orphan_size,
        },
        "problems": [{"code": code, "message": text} for code, text in _problems(found)],
        "repaired": None
        if repaired is None
        else {
            "listed": repaired.listed,
            "removed": repaired.removed,
            "named": [f"tinker://{key}" for key in repaired.named],
        },
    }
