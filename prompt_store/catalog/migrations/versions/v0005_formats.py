"""Record the prompt format of a version; that of existing versions is not known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the tables to this revision."""
    op.add_column("versions", sa.Column("format", sa.Text(), nullable=True))


def downgrade() -> None:
    """Downgrade them to the previous revision."""
    op.drop_column("versions", "format")
