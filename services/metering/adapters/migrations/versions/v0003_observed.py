"""Usage by our own count, beside what the provider reported."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema up."""
    op.execute("ALTER TABLE journal ADD COLUMN observed_input bigint, ADD COLUMN observed_output bigint")
