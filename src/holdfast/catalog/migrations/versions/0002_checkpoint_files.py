"""The files of checkpoints, for which bytes are whose alone and which are shared."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table, and empty the index: the next start fills both from the store."""
    op.create_table(
        "checkpoint_files",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("file", sa.String, primary_key=True),
        sa.Column("hash", sa.String, nullable=False, index=True),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    # A size may be above 2 GB.
    op.drop_table("checkpoints")
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
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Index("ix_checkpoints_owner_created", "owner", "created"),
    )
