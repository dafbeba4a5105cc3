"""What a run has gone through: refusals that explain gaps, recoveries, divergences."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; runs from before have not been recovered as far as is known."""
    op.add_column("runs", sa.Column("refused_to", sa.BigInteger))
    for name in ("recoveries", "replayed", "divergences"):
        op.add_column("runs", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("diverged_at", sa.BigInteger))
