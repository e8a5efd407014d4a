"""Limits of single models, beside those of a tenant, project or key."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema up."""
    for table in ("tenants", "projects", "keys"):
        op.execute(f"ALTER TABLE {table} ADD COLUMN model_limits text NOT NULL DEFAULT '[]'")
