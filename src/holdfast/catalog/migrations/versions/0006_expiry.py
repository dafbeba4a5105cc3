"""Indexes of what may go: the whole journal was read to find it."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add them; each has a few of the rows only."""
    _index("ix_operations_read", ["read"], "read IS NOT NULL")
    _index(
        "ix_operations_read_results",
        ["run_id", "generation", "read", "seq", "result_size"],
        "read IS NOT NULL AND result_size IS NOT NULL",
    )
    _index("ix_operations_never_shown", ["settled"], "body_hash IS NULL")


def _index(name: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, "operations", columns, sqlite_where=condition, postgresql_where=condition)
