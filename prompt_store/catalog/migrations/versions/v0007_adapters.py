"""Record adapters: their kind, sizes and targets, and the adapter that a soft prompt was trained over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision; existing versions are soft prompts."""
    op.add_column("versions", sa.Column("kind", sa.String(16), nullable=False, server_default="soft_prompt"))
    op.add_column("versions", sa.Column("rank", sa.Integer(), nullable=True))
    op.add_column("versions", sa.Column("num_modules", sa.Integer(), nullable=True))
    op.add_column("versions", sa.Column("num_parameters", sa.BigInteger(), nullable=True))
    op.add_column("versions", sa.Column("targets", sa.Text(), nullable=False, server_default="[]"))
    op.add_column("versions", sa.Column("over", sa.String(160), nullable=True))
    op.create_index("versions_by_kind", "versions", ["kind", "prompt_id"], unique=False)
    op.create_index("versions_by_over", "versions", ["over"], unique=False)


def downgrade() -> None:
    """Downgrade them to the previous revision.

    Raises:
        RuntimeError: If there is an adapter, also a deleted one: earlier releases cannot read the list with it.
    """
    adapters = op.get_bind().execute(sa.text("SELECT count(*) FROM versions WHERE kind = 'adapter'")).scalar_one()
    if adapters:
        raise RuntimeError(f"the catalog has {adapters} versions of adapters, which earlier releases cannot read")
    op.drop_index("versions_by_over", table_name="versions")
    op.drop_index("versions_by_kind", table_name="versions")
    for column in ("over", "targets", "num_parameters", "num_modules", "rank", "kind"):
        op.drop_column("versions", column)
