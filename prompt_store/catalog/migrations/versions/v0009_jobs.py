"""Keep evaluations and training runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", _Name, nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("prompt", _Name, nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("is_recorded", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("dataset_digest", sa.String(64), nullable=False),
        sa.Column("metric", sa.String(32), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("num_right", sa.BigInteger(), nullable=False),
        sa.Column("num_errors", sa.BigInteger(), nullable=False),
        sa.Column("num_answered", sa.BigInteger(), nullable=False),
        sa.Column("scores", sa.Text(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("runner", sa.String(64), nullable=True),
        sa.Column("leased_until", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
    )
    op.create_index("evaluations_by_owner", "evaluations", ["owner", "created_at", "id"], unique=False)
    op.create_index("evaluations_by_prompt", "evaluations", ["owner", "prompt", "created_at"], unique=False)
    op.create_index("evaluations_by_status", "evaluations", ["status", "created_at"], unique=False)
    op.create_table(
        "evaluation_rows",
        sa.Column("evaluation_id", sa.String(64), sa.ForeignKey("evaluations.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(8), nullable=True),
        sa.Column("expected", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
    )
    op.create_table(
        "training_runs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", _Name, nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("name", _Name, nullable=False),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=True),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
    )
    op.create_index("training_runs_by_owner", "training_runs", ["owner", "started_at", "id"], unique=False)
    op.create_index("training_runs_by_name", "training_runs", ["owner", "name", "started_at"], unique=False)
    op.create_table(
        "training_points",
        sa.Column("run_id", sa.String(64), sa.ForeignKey("training_runs.id"), primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("numbers", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    """Downgrade them to the previous revision; evaluations and training runs are lost."""
    for table in ("training_points", "training_runs", "evaluation_rows", "evaluations"):
        op.drop_table(table)
