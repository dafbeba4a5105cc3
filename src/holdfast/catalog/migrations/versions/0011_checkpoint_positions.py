"""Where in its run a checkpoint was taken."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add the column; a server fills it from the store when it starts."""
    op.add_column("checkpoints", sa.Column("seq", sa.BigInteger))
