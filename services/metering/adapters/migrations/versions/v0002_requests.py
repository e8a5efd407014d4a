"""The operation that was charged for a request."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema up."""
    op.execute(
        'CREATE TABLE requests (key bytea PRIMARY KEY, operation_id text COLLATE "C" NOT NULL, expire_time double precision NOT NULL)'
    )
    op.execute("CREATE INDEX requests_by_expiry ON requests (expire_time)")
