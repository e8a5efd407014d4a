"""Settings of the metering service."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting

UNLIMITED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the metering service."""

    database_url: str = setting(
        "",
        "Where the ledger is: postgresql://USER:PASSWORD@HOST:PORT/DATABASE. Empty: SQLite in the state directory, for one metering process",
        maximum=2048,
        secret=True,
    )
    requests_per_minute: int = setting(
        120, "Requests per minute of a tenant that has no limit of its own; -1: unlimited", minimum=-1
    )
    concurrency: int = setting(50, "Requests at once of a tenant that has no limit of its own; -1: unlimited", minimum=-1)
    identity_reuse: float = setting(
        30.0,
        "How long a gateway may honour a key without asking again; a revocation over NATS is faster",
        unit="s",
        minimum=1,
        maximum=300,
    )
    lease_seconds: float = setting(30.0, "How long a lease lasts unless it is extended", unit="s", minimum=1, maximum=3600)
    lease_grace: float = setting(
        120.0,
        "Time after a lease's end in which its money stays reserved for operations that still run; at least the longest request",
        unit="s",
        minimum=0,
        maximum=7200,
    )
    recall_factor: int = setting(
        20,
        "A slice is granted only while the tightest budget has this many times replicas times the wanted slice's share left",
        minimum=1,
    )
    sweep_interval: float = setting(
        1.0, "Time between two looks for expired holds and leases", unit="s", minimum=0.05, maximum=60
    )
    price_reload_interval: float = setting(
        5.0, "Time between two looks at the catalogue's prices", unit="s", minimum=0.1, maximum=3600
    )
    bootstrap_key: str = setting(
        "",
        "Secret of a key of the tenant `default`, made at the start when it isn't there. Empty: none",
        maximum=256,
        secret=True,
    )
    bootstrap_requests_per_minute: int | None = setting(
        None, "Requests per minute of the tenant `default` when it is made; null: as every tenant; -1: unlimited", minimum=-1
    )
    bootstrap_concurrency: int | None = setting(
        None, "Requests at once of the tenant `default` when it is made; null: as every tenant; -1: unlimited", minimum=-1
    )
    bootstrap_budget_nano_usd: int | None = setting(
        None, "Budget of the tenant `default` when it is made; null: none", unit="nano-dollars", minimum=0
    )
