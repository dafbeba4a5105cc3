"""The turn that a run's submissions take: one after the other, each until it is journaled."""

from __future__ import annotations

import asyncio

from holdfast.runs.errors import Unavailable

SUBMISSION_WAITS = 30.0
"""Seconds for which a submission waits for the one before it to be journaled: the catalog may hang
in that write, and whoever sends on must not be kept, with all that is sent, until it ends."""


class Submitting:
    """A lock that is held until what was begun under it is written, also when its holder is gone.

    Raises Unavailable when the one before takes too long.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        """For whoever waits however long it takes."""
        self._submissions = 0
        """Those that have the lock, or wait for it."""
        self._is_writing = False
        self._is_left = False
        """Its holder is gone while it is written still."""

    async def __aenter__(self) -> None:
        self._submissions += 1
        try:
            if self._submissions == 1:  # most find it so, and a timeout has its price
                await self.lock.acquire()
            else:
                async with asyncio.timeout(SUBMISSION_WAITS):
                    await self.lock.acquire()
        except BaseException as error:
            self._submissions -= 1
            if not isinstance(error, TimeoutError):
                raise
            raise Unavailable(
                "journal_unavailable",
                f"the request before this one has not been journaled for {SUBMISSION_WAITS:.0f} s; "
                "send it again",
            ) from None

    async def __aexit__(self, *_: object) -> None:
        if self._is_writing:
            self._is_left = True
        else:
            self._end()

    def writing(self) -> None:
        """The write of the submission whose turn it is has begun."""
        self._is_writing = True

    def written(self) -> None:
        """That write has ended, well or not."""
        self._is_writing = False
        if self._is_left:
            self._is_left = False
            self._end()

    def _end(self) -> None:
        self._submissions -= 1
        self.lock.release()
