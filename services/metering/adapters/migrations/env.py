"""What Alembic runs to migrate: on the connection that the store gives it, in the transaction that is open there."""

from __future__ import annotations

from alembic import context

from services.metering.adapters.postgres_tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, transactional_ddl=True)
context.run_migrations()
