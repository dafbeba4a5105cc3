"""The catalog on PostgreSQL: its connections, the lease of a server, commits without an answer.

**The lease** is an advisory lock of the session in which the server writes. PostgreSQL gives it
back the moment the session ends, however its holder ended, and nobody can have it before: there is
no time that has to run out, no clock that has to agree with another one, and nothing to renew. What
a session's holder cannot know is that it has ended. A server whose connection was lost makes
another one and asks for the lease again; who has taken over meanwhile has raised the epoch (see
`holdfast.catalog.epoch`), and the server ends. One that is suspended keeps the lease, since its
machine answers for it, until somebody kills it or ends its session (`pg_terminate_backend`).

**A commit without an answer**, since the connection was lost, may have been made or not. Each
transaction's id is known before, and PostgreSQL tells what became of it once it is over: which it
is when the lease of its session is free. If that cannot be found out within a while, the process
ends as after a failed sync, and the next one sees what is there.

**A server that does not answer** ends nothing by itself. What it is asked has a deadline (see
`holdfast.catalog.session`), after which its connection is closed and is a lost one. There is no
`statement_timeout` for writing: it would end a commit's wait for a standby, and have it answered.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from holdfast.catalog.backend import Backend
from holdfast.catalog.errors import CannotOpen, CatalogInUse

if TYPE_CHECKING:
    import psycopg

OLDEST = (13,)
"""The first version that tells what became of a transaction by an id that does not wrap around."""

_LEASE = 0x486F6C64
"""The first half of the lease's number; the second is the schema: each may be a catalog."""
_SCHEMA_WAITS = 5.0
"""Seconds for which somebody else who has just begun to make the tables is waited for."""
_DEFAULTS: dict[str, Any] = {
    "application_name": "holdfast",
    "connect_timeout": 5,
    # A peer that is gone without a word is noticed within half a minute, by both sides: the other
    # one has the lease that long.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
_LOCK_WAITS = 5.0
"""Seconds for which a lock of somebody else on a table or row is waited for, as on SQLite."""
_SESSION = (
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
    " -c synchronous_commit=on"
)
_SECRET = frozenset({"password", "sslpassword", "oauth_client_secret"})
"""Parameters of an address that are not shown."""
_ENDS = frozenset({"57P01", "57P02", "57P03", "57P04", "57P05", "25P03", "25P04"})
"""States in which the server ends a session, or lets none begin: shut down, crashed, starting,
dropped, idle for too long, or for too long in a transaction."""
_TOO_MUCH = "54"
"""The class of what exceeds a limit of the server (an entry of an index, say), now and later."""
_NOT_OURS_NOW = frozenset({"42501", "42P01"})
"""The tables are there no more, or for somebody else: nobody's write, but an administrator's."""
_OF_ONE = frozenset({"53200", "XX000"})
"""No memory, which the next one may need less of; and what the server has no other state for."""
_SCHEMA = "(SELECT oid::bigint FROM pg_namespace WHERE nspname = current_schema())"
_KEY = f"({_LEASE}::bigint << 32) | {_SCHEMA}"
_TAKE = sa.text(f"SELECT pg_try_advisory_lock({_KEY})")
_LOCK_SCHEMA = sa.text(f"SELECT pg_try_advisory_xact_lock({_KEY})")
_ID = sa.text("SELECT pg_current_xact_id()::text")
_OUTCOME = sa.text("SELECT pg_xact_status(CAST(:id AS xid8))")


class PostgreSQL(Backend):
    """A database, or a schema of one, on a server."""

    is_local = False

    @classmethod
    def at(cls, address: str) -> PostgreSQL:
        """The database at postgresql://USER:PASSWORD@HOST:PORT/DATABASE. Raises CannotOpen.

        Parameters of libpq may follow, such as ?sslmode=verify-full.
        """
        url = _parse(address)
        settings = {key: value for key, value in _DEFAULTS.items() if key not in url.query}
        given = url.query.get("options", "")
        options = [given] if isinstance(given, str) else given
        waits = f"-c lock_timeout={int(_LOCK_WAITS * 1000)}"
        settings["options"] = " ".join([*options, _SESSION, waits])
        try:
            return cls(url, settings)
        except ImportError as error:
            raise CannotOpen(
                f"a catalog on PostgreSQL needs a package more: pip install 'holdfast[postgres]' "
                f"({error})"
            ) from error

    def __init__(self, url: sa.URL, settings: dict[str, Any]) -> None:
        # What one transaction reads is of one moment, as on SQLite.
        reading = sa.create_engine(
            url, connect_args=settings, isolation_level="REPEATABLE READ", hide_parameters=True
        )
        super().__init__(reading, _without_secrets(url))
        # One that writes sees what others committed while it waited for the epoch's lock. Never
        # from a pool or back to it, since it may have the lease; what it leaves the server undoes.
        self._writing = sa.create_engine(
            url,
            connect_args=settings,
            isolation_level="READ COMMITTED",
            hide_parameters=True,
            poolclass=sa.NullPool,
            pool_reset_on_return=None,
        )
        for engine in (reading, self._writing):
            _configure(engine)

    def writer(self) -> sa.Connection:
        return self._writing.connect()

    def lock_schema(self, connection: sa.Connection) -> None:
        deadline = time.monotonic() + _SCHEMA_WAITS
        while not connection.scalar(_LOCK_SCHEMA):
            if time.monotonic() > deadline:
                raise CatalogInUse(
                    f"the tables of {self.address} are of another version of Holdfast, by which "
                    "they are used now: stop that server first"
                )
            time.sleep(0.1)

    def take_lease(self, connection: sa.Connection) -> bool:
        return bool(connection.scalar(_TAKE))

    def transaction_id(self, connection: sa.Connection) -> str | None:
        found: str = connection.scalar(_ID)
        return found

    def outcome(self, connection: sa.Connection, transaction_id: str) -> bool | None:
        match connection.scalar(_OUTCOME, {"id": transaction_id}):
            case "committed":
                return True
            case "aborted":
                return False
        return None

    def is_unavailable(self, error: sa.exc.DBAPIError) -> bool:
        state = _state(error)
        if state in _NOT_OURS_NOW:
            return True
        return super().is_unavailable(error) and not state.startswith(_TOO_MUCH)

    def may_be_one_alone(self, error: sa.exc.DBAPIError) -> bool:
        return _state(error) in _OF_ONE

    def is_lost(self, error: sa.exc.DBAPIError) -> bool:
        # The server says that it ends the session before the end can be seen.
        state = _state(error)
        return error.connection_invalidated or state in _ENDS or state.startswith("08")

    def is_unsynced(self, error: sa.exc.DBAPIError) -> bool:
        """A server whose sync fails ends by itself, which is a lost connection here."""
        return False

    def tidy_beside(self) -> None:
        """The server does that itself."""

    def tidy(self, connection: sa.Connection) -> None:
        """And that."""


def _state(error: sa.exc.DBAPIError) -> str:
    """SQLSTATE; "" when it is the driver that has failed, or the connection."""
    return getattr(error.orig, "sqlstate", None) or ""


def without_secrets(address: str) -> str:
    """An address as it can be shown and noted. Raises CannotOpen."""
    return _without_secrets(_parse(address))


def _parse(address: str) -> sa.URL:
    try:
        url = sa.make_url(address)
    except (sa.exc.ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise CannotOpen(
            "the address of a catalog is postgresql://USER@HOST/DATABASE, with :PASSWORD behind "
            "the user if need be; without an address the catalog is a file in the data directory"
        )
    return url.set(drivername="postgresql+psycopg")


def _without_secrets(url: sa.URL) -> str:
    plain = sa.URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    open_to_all = {key: value for key, value in url.query.items() if key not in _SECRET}
    return plain.set(query=open_to_all).render_as_string()


def _configure(engine: sa.Engine) -> None:
    from holdfast.catalog.session import Session

    @sa.event.listens_for(engine, "do_connect")
    def open_session(
        _dialect: sa.Dialect, _record: object, args: list[Any], settings: dict[str, Any]
    ) -> Session:
        return Session.open(*args, **settings)

    @sa.event.listens_for(engine, "connect")
    def connect(connection: psycopg.Connection[Any], _record: object) -> None:
        version = connection.info.server_version // 10_000
        if (version,) < OLDEST:
            raise CannotOpen(
                f"the catalog's PostgreSQL is of version {version}; {OLDEST[0]} or newer is needed"
            )
        _replace_nul(connection)
        _load_sums(connection)


def _replace_nul(connection: psycopg.Connection[Any]) -> None:
    """Have texts with a NUL, which PostgreSQL cannot keep, kept with U+FFFD instead of it."""
    from psycopg.types.string import StrDumperUnknown

    class Dumper(StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\ufffd"))

    connection.adapters.register_dumper(str, Dumper)


def _load_sums(connection: psycopg.Connection[Any]) -> None:
    """Have sums of integers be integers: no column of the catalog is a NUMERIC."""
    from psycopg.types.numeric import IntLoader

    connection.adapters.register_loader("numeric", IntLoader)
