"""Record the revision of each deletion, so that it can be undone.

Versions deleted by earlier releases have lost their files and cannot be restored.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.add_column("versions", sa.Column("deleted_in", sa.BigInteger(), nullable=True))
    op.create_index("versions_by_deletion", "versions", ["deleted_in"], unique=False)


def downgrade() -> None:
    """Downgrade them to the previous revision; deleted versions lose their files, as earlier releases expect."""
    deleted = "(SELECT id FROM versions WHERE deleted_at IS NOT NULL)"
    op.execute(f"DELETE FROM version_files WHERE version_id IN {deleted}")  # noqa: S608 - a constant
    op.execute(f"DELETE FROM tags WHERE version_id IN {deleted}")  # noqa: S608 - a constant
    op.execute(
        "UPDATE blobs SET unnamed_since = (SELECT max(deleted_at) FROM versions) WHERE unnamed_since IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM version_files WHERE version_files.sha256 = blobs.sha256)"
    )
    op.drop_index("versions_by_deletion", table_name="versions")
    op.drop_column("versions", "deleted_in")
