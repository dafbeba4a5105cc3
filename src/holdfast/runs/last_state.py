"""The last state of a run that has ended, when no worker can give it: its newest snapshot."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from holdfast.catalog import CatalogUnavailable
from holdfast.runs import bodies, journal
from holdfast.runs.errors import RunError, storage_failed
from holdfast.runs.run import Run
from holdfast.store.retries import pauses


async def keep_recovery_point(run: Run, kept: float) -> int | None:
    """Publish the newest intact snapshot of an ended run as its `auto.SEQ`; its position.

    It is `kept` for so many seconds from then on. None when there is none; where nothing was done
    with the run, none is needed. Tried again for as long as store and catalog are not available;
    until it has succeeded, the run's row does not say that it has ended, so that a restart tries
    it, too.
    """
    if run.order.reached < 1:
        return run.order.reached
    again = pauses(1.0, 60.0)
    while True:
        try:
            return await _keep(run, kept)
        except (RunError, CatalogUnavailable) as error:
            if isinstance(error, RunError) and not storage_failed(error):
                run.log.error("the last state is not kept", error=error.message)
                return None
            run.log.warning("the last state is not kept yet", error=str(error))
            run.note = str(error)
        await asyncio.sleep(next(again))


def not_stored_yet(run: Run) -> str:
    """To be told of an ended run while its last state is tried to be stored."""
    return "its last state is not stored yet" + ("" if run.note is None else f": {run.note}")


def what_it_lacks(run: Run, position: int) -> str:
    """To be told of an ended run whose last state is that of a position; "" if it is whole."""
    changes = [e for e in run.order.done_after(position) if e.kind in bodies.CHANGES_STATE]
    if not changes:
        return ""
    return (
        f"; its last state is that of position {position}, a snapshot's: {len(changes)} later "
        f"operations, up to {changes[-1].seq}, were done and are not in it, since no worker or "
        "storage could be had to keep what they led to"
    )


async def _keep(run: Run, kept: float) -> int | None:
    checkpoints = run.services.checkpoints
    points = await run.services.catalog.read(lambda c: journal.recovery_points(c, run.key))
    for seq, manifest_id in points:
        if not await checkpoints.intact(manifest_id):
            run.log.error("snapshot not usable", seq=seq)
            continue
        now = time.time()
        last = dataclasses.replace(
            await checkpoints.manifest(manifest_id),
            name=f"auto.{seq}",
            created=now,
            expires=now + kept,
            parent=manifest_id,
        )
        await checkpoints.publish(last, replace=True)
        run.log.warning("its newest snapshot is the run's last state", position=seq)
        return seq
    return None
