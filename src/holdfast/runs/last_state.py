"""The last state of a run that has ended, when no worker can give it: its newest snapshot."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from holdfast.catalog import CatalogUnavailable
from holdfast.runs import journal
from holdfast.runs.errors import RunError
from holdfast.runs.run import Run
from holdfast.store.retries import pauses


async def keep_recovery_point(run: Run, expires: float) -> bool:
    """Publish the newest intact snapshot of an ended run as its `auto.SEQ`.

    False when there is none, True also when nothing was done with the run. Tried again for as long
    as store and catalog are not available; until it has succeeded, the run's row does not say that
    it has ended, so that a restart tries it, too.
    """
    if run.order.reached < 1:
        return True
    again = pauses(1.0, 60.0)
    while True:
        try:
            return await _keep(run, expires)
        except (RunError, CatalogUnavailable) as error:
            if isinstance(error, RunError) and error.reason != "unavailable":
                run.log.error("the last state is not kept", error=error.message)
                return False
            run.log.warning("the last state is not kept yet", error=str(error))
        await asyncio.sleep(next(again))


async def _keep(run: Run, expires: float) -> bool:
    checkpoints = run.services.checkpoints
    points = await run.services.catalog.read(lambda c: journal.recovery_points(c, run.key))
    for seq, manifest_id in points:
        if not await checkpoints.intact(manifest_id):
            run.log.error("snapshot not usable", seq=seq)
            continue
        last = dataclasses.replace(
            await checkpoints.manifest(manifest_id),
            name=f"auto.{seq}",
            created=time.time(),
            expires=expires,
            parent=manifest_id,
        )
        await checkpoints.publish(last, replace=True)
        run.log.warning("its newest snapshot is the run's last state", position=seq)
        return True
    return False
