"""Samplers whose weights are let go before their session ends."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the columns; whose weights the samplers so far have is not known, and they stay."""
    op.add_column("samplers", sa.Column("run_id", sa.String))
    op.add_column("samplers", sa.Column("released", sa.Float))
