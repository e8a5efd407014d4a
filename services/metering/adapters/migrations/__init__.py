"""Migrations of the ledger on PostgreSQL, run by Alembic at the start of metering."""
