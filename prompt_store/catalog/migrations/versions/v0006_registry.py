"""Count the use of versions; add reasons, names of keys, details of edits and owners to the history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_INDEXES = {
    "history_by_owner": ["owner", "at", "id"],
    "history_by_time": ["at", "id"],
    "history_by_actor": ["actor", "at", "id"],
    "history_by_actor_name": ["actor_name", "at", "id"],
    "history_by_action": ["action", "at", "id"],
}
_NEW_ACTIONS = "('edit', 'import', 'change_owner', 'read_across_tenants')"


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.create_table(
        "version_usage",
        sa.Column("version_id", _ID, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
    )
    for column in ("actor_name", "reason", "details"):
        op.add_column("history", sa.Column(column, sa.Text(), nullable=True))
    op.add_column("history", sa.Column("owner", _Name, nullable=False, server_default=""))
    op.add_column("history", sa.Column("imported", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute(
        "UPDATE history SET owner = COALESCE((SELECT owner FROM prompts WHERE prompts.name = history.name), '') "
        "WHERE EXISTS (SELECT 1 FROM prompts WHERE owner <> '')"
    )
    for name, columns in _INDEXES.items():
        op.create_index(name, "history", columns, unique=False)


def downgrade() -> None:
    """Downgrade them to the previous revision; entries of kinds that earlier releases do not know are lost."""
    op.execute(f"DELETE FROM history WHERE action IN {_NEW_ACTIONS}")  # noqa: S608 - a constant
    for name in _INDEXES:
        op.drop_index(name, table_name="history")
    for column in ("imported", "owner", "details", "reason", "actor_name"):
        op.drop_column("history", column)
    op.drop_table("version_usage")
