"""Connections to PostgreSQL that wait no longer than the deadline of their thread says.

A server may stop to answer while its machine goes on to acknowledge what it is sent, so that no
timeout of TCP ends the connection; and one that does not answer cannot end anything by itself.
"""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

from holdfast.catalog import deadline

T = TypeVar("T")

_NO_ANSWER = "the database has not answered in time"


class Session(psycopg.Connection[Any]):
    """A connection that is closed when an answer has not come by then."""

    @classmethod
    def open(cls, *args: Any, **settings: Any) -> Session:
        """`connect`, unless the time is over. May take `connect_timeout` longer than that."""
        if deadline.is_over():
            raise psycopg.OperationalError(_NO_ANSWER)
        return cls.connect(*args, **settings)

    def wait(self, gen: PQGen[T], *args: Any, **settings: Any) -> T:
        """Every wait of the driver comes here."""
        return super().wait(self._limited(gen), *args, **settings)

    def _limited(self, gen: PQGen[T]) -> PQGen[T]:
        """The same conversation, which is broken off when it waits on after the deadline."""
        try:
            self._go_on()
            wanted = next(gen)
            while True:
                ready = yield wanted
                wanted = gen.send(ready)
                self._go_on()
        except StopIteration as end:
            answer: T = end.value
            return answer

    def _go_on(self) -> None:
        if deadline.is_over():
            self.close()
            raise psycopg.OperationalError(_NO_ANSWER)
