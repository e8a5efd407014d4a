"""Who has a lease or a hold: a replica that was started again ends those of the one before it."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema up."""
    for table in ("holds", "leases"):
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN slot text NOT NULL DEFAULT '', ADD COLUMN incarnation text NOT NULL DEFAULT ''"
        )
