"""Bodies and results in a table of their own, which also says what is in segment files."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Move what there is out of the operations."""
    op.create_table(
        "contents",
        sa.Column("run_id", sa.String, primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("part", sa.String, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("segment", sa.String),
        sa.Column("start", sa.BigInteger),
        sa.Column("data", sa.LargeBinary),
    )
    op.create_index(
        "ix_contents_segment",
        "contents",
        ["segment"],
        sqlite_where=sa.text("segment IS NOT NULL"),
        postgresql_where=sa.text("segment IS NOT NULL"),
    )
    for part in ("body", "result"):
        op.execute(
            "INSERT INTO contents (run_id, generation, seq, part, size, data)"
            f" SELECT run_id, generation, seq, '{part}', length({part}), {part}"
            f" FROM operations WHERE {part} IS NOT NULL"
        )
    with op.batch_alter_table("operations") as operations:
        operations.add_column(sa.Column("result_size", sa.BigInteger))
    op.execute("UPDATE operations SET result_size = length(result) WHERE result IS NOT NULL")
    with op.batch_alter_table("operations") as operations:
        operations.drop_column("body")
        operations.drop_column("result")
