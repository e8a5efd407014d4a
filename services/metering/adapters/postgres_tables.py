"""The ledger's tables on PostgreSQL. What is there before the last migration is in `migrations/`."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

from services.metering.ledger import Entry

METADATA: Final = MetaData()


def _id(name: str, *rest: Any, **options: Any) -> Column[str]:
    # Compared byte by byte, as Python and SQLite do, whatever the database's language: pages of lists depend on it.
    return Column(name, Text(collation="C"), *rest, nullable=False, **options)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str, *rest: Any) -> Column[int]:
    return Column(name, BigInteger, *rest, nullable=False)


def _limits() -> list[Column[Any]]:
    rates = [Column(name, BigInteger) for name in ("requests_per_minute", "tokens_per_minute", "concurrency")]
    return [*rates, _text("model_limits")]


TENANTS: Final = Table(
    "tenants",
    METADATA,
    _id("id", primary_key=True),
    _text("display_name"),
    *_limits(),
    Column("create_time", Double, nullable=False),
    _text("request_id"),
)
PROJECTS: Final = Table(
    "projects",
    METADATA,
    _id("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    _id("id", primary_key=True),
    _text("display_name"),
    *_limits(),
    Column("create_time", Double, nullable=False),
    _text("request_id"),
)
KEYS: Final = Table(
    "keys",
    METADATA,
    _id("id", primary_key=True),
    Column("sha256", LargeBinary, nullable=False, unique=True),
    _id("tenant_id"),
    _id("project_id"),
    _text("display_name"),
    _text("secret_hint"),
    _text("scopes"),
    _text("allowed_models"),
    *_limits(),
    Column("create_time", Double, nullable=False),
    Column("expire_time", Double),
    Column("revoke_time", Double),
    _text("cache_namespace"),
    ForeignKeyConstraint(["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"]),
    Index("keys_by_tenant", "tenant_id", "id"),
)
ACCOUNTS: Final = Table(
    "accounts",
    METADATA,
    _id("name", primary_key=True),
    Column("budget", BigInteger),
    Column("spent", BigInteger, nullable=False, server_default="0"),
    Column("held", BigInteger, nullable=False, server_default="0"),
    # Changed at every request: room on the page lets the new version of a row stay there, without a change of the index.
    postgresql_with={"fillfactor": 50},
)
"""One per key, project and tenant. What may still be held is budget - spent - held."""
HOLDS: Final = Table(
    "holds",
    METADATA,
    _id("id", primary_key=True),
    _id("operation_id", unique=True),
    _id("tenant_id"),
    _id("project_id"),
    _id("key_id"),
    _number("amount"),
    _text("state"),
    Column("expire_time", Double, nullable=False),
    Column("budget_before", BigInteger),
    _text("budget_level"),
    _text("slot"),
    _text("incarnation"),
    Index("open_holds", "expire_time", postgresql_where=text("state = 'open'")),
)
LEASES: Final = Table(
    "leases",
    METADATA,
    _id("id", primary_key=True),
    _id("tenant_id"),
    _id("project_id"),
    _id("key_id"),
    _number("outstanding"),
    Column("expire_time", Double, nullable=False),
    _number("posted"),
    _text("slot"),
    _text("incarnation"),
    Index("leases_by_expiry", "expire_time"),
)

REQUESTS: Final = Table(
    "requests",
    METADATA,
    Column("key", LargeBinary, primary_key=True),
    _id("operation_id"),
    Column("expire_time", Double, nullable=False),
    Index("requests_by_expiry", "expire_time"),
)
"""The operation that was charged for a request. Not part of the chain: what it decides is, as the journal's entries."""

_TEXTS: Final = ("debit", "credit", "model", "provider", "price_version", "flags")
_IDS: Final = ("attempt_id", "operation_id", "tenant_id", "project_id", "key_id")
_SMALL: Final = ("usage_source", "outcome", "error_reason", "task_type", "cache_status")
_OPTIONAL: Final = ("observed_input", "observed_output")


def _entry_column(name: str) -> Column[Any]:
    if name == "attempt_id":
        return _id(name, unique=True)
    if name in _IDS:
        return _id(name)
    if name in _TEXTS:
        return _text(name)
    if name == "amount":
        return _number(name, CheckConstraint("amount >= 0"))
    return Column(name, Integer if name in _SMALL else BigInteger, nullable=name in _OPTIONAL)


JOURNAL: Final = Table(
    "journal",
    METADATA,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    *(_entry_column(name) for name in Entry._fields),
    Column("hash", LargeBinary, nullable=False),
    Index("journal_by_tenant", "tenant_id", "start_micros"),
)
