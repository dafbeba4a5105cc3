"""What PostgreSQL has to be told, and SQLite does by itself."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Numbers of operations of any size, and contents as they are: most cannot be compressed."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in ("operations", "contents", "snapshots"):
        op.alter_column(table, "seq", type_=sa.BigInteger)
    op.alter_column("operations", "mark_at", type_=sa.BigInteger)
    op.execute("ALTER TABLE contents ALTER COLUMN data SET STORAGE EXTERNAL")
