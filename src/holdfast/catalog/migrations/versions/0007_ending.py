"""Why a run is about to end: durable before anybody is told."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the column; runs that have not ended yet are not about to."""
    op.add_column("runs", sa.Column("ending", sa.JSON))
