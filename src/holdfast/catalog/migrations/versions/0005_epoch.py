"""Which server the catalog belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the one row; the first start raises it to 1."""
    table = op.create_table(
        "epoch",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String),
        sa.Column("raised", sa.Float),
    )
    op.bulk_insert(table, [{"id": 1, "number": 0}])
