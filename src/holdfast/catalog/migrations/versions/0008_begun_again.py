"""Operations that were under way when the server ended: how often they were begun again."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; none was ever counted."""
    column = sa.Column("begun_again", sa.Integer, nullable=False, server_default="0")
    op.add_column("operations", column)
