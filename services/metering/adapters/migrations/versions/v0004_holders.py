"""Who holds a lease: a replica that was started again ends what the one before it held."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema up."""
    op.execute("ALTER TABLE leases ADD COLUMN slot text NOT NULL DEFAULT '', ADD COLUMN incarnation text NOT NULL DEFAULT ''")
