"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table as it was in version 0001."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("idempotency_key", sa.String, index=True),
        sa.Column("client", sa.String, nullable=False),
        sa.Column("sdk_version", sa.String),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("project_id", sa.String),
        sa.Column("display_name", sa.String),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("end_reason", sa.String),
        sa.Column("end_detail", sa.Text),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("session_id", sa.String, nullable=False, index=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("last_request", sa.Float, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("state_detail", sa.Text),
        sa.Column("base_model", sa.String),
        sa.Column("config", sa.JSON),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("body_hash", sa.String, nullable=False),
        sa.Column("idempotency_key", sa.String),
        sa.Column("corrupted", sa.Boolean, nullable=False),
        sa.Column("parent", sa.String),
        sa.Index("ix_runs_owner_created", "owner", "created"),
    )
    op.create_table(
        "operations",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("body_hash", sa.String),
        sa.Column("body", sa.LargeBinary),
        sa.Column("target", sa.String),
        sa.Column("result", sa.LargeBinary),
        sa.Column("result_hash", sa.String),
        sa.Column("error", sa.JSON),
        sa.Column("mark_at", sa.Integer),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("accepted", sa.Float, nullable=False),
        sa.Column("settled", sa.Float),
        sa.Column("read", sa.Float),
        sa.ForeignKeyConstraint(["run_id", "generation"], ["runs.id", "runs.generation"]),
        sa.Index("ix_operations_state", "state"),
    )
    op.create_table(
        "snapshots",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("manifest", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["run_id", "generation"], ["runs.id", "runs.generation"]),
    )
    op.create_table(
        "checkpoints",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("manifest", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Index("ix_checkpoints_owner_created", "owner", "created"),
    )
    op.create_table(
        "samplers",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("session_id", sa.String, nullable=False, index=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("model_path", sa.String),
        sa.Column("manifest", sa.String),
        sa.Column("created", sa.Float, nullable=False),
    )
