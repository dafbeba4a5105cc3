"""The tables. Times are UTC seconds, booleans and JSON are SQLAlchemy's portable types."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

_NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""Of an operation. An integer of SQLite has 64 bits in any case."""


def _partial(name: str, *columns: str, where: str) -> Index:
    """An index of some of the rows."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


# One row: which server has the catalog. Each start of one raises the number.
epoch = Table(
    "epoch",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("holder", String),  # machine and process that raised it last
    Column("raised", Float),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("hash", String, nullable=False, unique=True),  # sha256 of the whole key, hex
    Column("owner", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("idempotency_key", String, index=True),
    Column("client", String, nullable=False),  # the client's family: python, elixir, …
    Column("sdk_version", String),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON),
    Column("project_id", String),
    Column("display_name", String),
    Column("created", Float, nullable=False),
    Column("ended", Float),
    Column("end_reason", String),  # success, errored, interrupted, expired
    Column("end_detail", Text),
)

# A model id may come again after a failed creation: the generation tells its lives apart.
runs = Table(
    "runs",
    metadata,
    Column("id", String, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("session_id", String, nullable=False, index=True),
    Column("owner", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("last_request", Float, nullable=False),
    Column("state", String, nullable=False),  # live, unloaded, failed, replaced, lost, stored
    Column("state_detail", Text),
    Column("base_model", String),  # empty until a creating load has read its checkpoint
    Column("config", JSON),  # rank, alpha, seed, train_*, optimizer
    Column("user_metadata", JSON),
    Column("body_hash", String, nullable=False),  # of the request that created it
    Column("idempotency_key", String),
    Column("corrupted", Boolean, nullable=False),
    Column("parent", String),  # manifest that the run was created from
    Column("refused_to", BigInteger),  # a refusal explains why numbers up to here are missing
    Column("recoveries", Integer, nullable=False, server_default="0"),
    Column("replayed", Integer, nullable=False, server_default="0"),  # operations, in all of them
    # Replayed under other numerics with another result: how many, and the first since the last.
    Column("divergences", Integer, nullable=False, server_default="0"),
    Column("diverged_at", BigInteger),
    # Why it is about to end, or has ended (code, message, category): set before anybody is told.
    Column("ending", JSON),
    Index("ix_runs_owner_created", "owner", "created"),
)

# The journal. Operation 0 creates the run.
operations = Table(
    "operations",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("seq", _NUMBER, primary_key=True),
    Column("kind", String, nullable=False),
    Column("state", String, nullable=False),  # accepted, running, done, failed, skipped
    Column("body_hash", String),
    Column("target", String),  # manifest that a load resolved to, or a save made
    Column("result_hash", String),  # outlives the result, for replay to compare
    Column("result_size", BigInteger),  # bytes, as long as the result is kept
    Column("error", JSON),  # code, message, category
    Column("mark_at", _NUMBER),  # position at which a late forward_backward's mark took effect
    Column("attempts", Integer, nullable=False, default=0),  # deaths of a worker while it ran
    # Times that it was begun as the first after a start: it may have been what ended the server.
    Column("begun_again", Integer, nullable=False, server_default="0"),
    Column("accepted", Float, nullable=False),
    Column("settled", Float),
    Column("read", Float),
    ForeignKeyConstraint(["run_id", "generation"], ["runs.id", "runs.generation"]),
    Index("ix_operations_state", "state"),
    # What may be removed: see `holdfast.runs.retention`.
    _partial("ix_operations_read", "read", where="read IS NOT NULL"),
    _partial(
        "ix_operations_read_results",
        *("run_id", "generation", "read", "seq", "result_size"),
        where="read IS NOT NULL AND result_size IS NOT NULL",
    ),
    _partial("ix_operations_never_shown", "settled", where="body_hash IS NULL"),
)

# The bytes of the journal: bodies and results, as long as they are kept. Large ones are in segment
# files, of which this is the only directory. Apart from `operations`, whose rows change often.
contents = Table(
    "contents",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("seq", _NUMBER, primary_key=True),
    Column("part", String, primary_key=True),  # body, result
    Column("size", BigInteger, nullable=False),
    Column("segment", String),
    Column("start", BigInteger),  # of its record in the segment
    Column("data", LargeBinary),  # empty when it is in a segment
    _partial("ix_contents_segment", "segment", where="segment IS NOT NULL"),
)

# Automatic and named recovery points of a run, by the position they were taken at.
snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("seq", _NUMBER, primary_key=True),
    Column("manifest", String, nullable=False),
    Column("created", Float, nullable=False),
    ForeignKeyConstraint(["run_id", "generation"], ["runs.id", "runs.generation"]),
)

# An index of the store's names; the store is the truth.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("kind", String, primary_key=True),  # weights, sampler_weights, external_weights
    Column("name", String, primary_key=True),
    Column("manifest", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("public", Boolean, nullable=False),
    Column("size", BigInteger, nullable=False),  # bytes of its blobs
    Column("step", Integer, nullable=False),  # optim_steps applied
    Column("user_metadata", JSON),
    Column("seq", BigInteger),  # position in its run; empty until the start after an upgrade
    Index("ix_checkpoints_owner_created", "owner", "created"),
)

# Which blobs they are made of; a blob may be in many.
checkpoint_files = Table(
    "checkpoint_files",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("file", String, primary_key=True),
    Column("hash", String, nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
)

samplers = Table(
    "samplers",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", String, nullable=False, index=True),
    Column("owner", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("model_path", String),
    Column("manifest", String),  # empty for a base model, and once it is released
    Column("created", Float, nullable=False),
    Column("run_id", String),  # whose weights they are
    Column("released", Float),  # when the weights were let go: the id stays taken
)
