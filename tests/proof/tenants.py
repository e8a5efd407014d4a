"""Tenants of the scenarios: made, and what is spent by them and held for them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from typing import Final

from services.cli.client import Client, failures, pages
from sluice.metering.v1 import tenancy_service_pb2
from tests.running import Running

QUIET_SECONDS: Final = 60.0
"""After which no money may be held."""
_CALL_SECONDS: Final = 30.0


def account(client: Client, tenant_id: str, *, budget: int | None = None, rate: int = -1, concurrency: int = -1) -> str:
    """Makes a tenant and a key of it; the key's secret. `budget` in nano-dollars, `rate` in requests per minute; -1: unlimited."""
    limits = tenancy_service_pb2.Limits(
        budget_nano_usd=budget, requests_per_minute=rate, tokens_per_minute=-1, concurrency=concurrency
    )
    tenant = tenancy_service_pb2.Tenant(id=tenant_id, limits=limits)
    key = tenancy_service_pb2.Key(tenant_id=tenant_id, scopes=["inference"])
    with failures():
        client.tenancy.CreateTenant(
            tenancy_service_pb2.CreateTenantRequest(tenant=tenant), timeout=_CALL_SECONDS, metadata=client.as_admin
        )
        made = client.tenancy.CreateKey(
            tenancy_service_pb2.CreateKeyRequest(key=key), timeout=_CALL_SECONDS, metadata=client.as_admin
        )
    return str(made.secret)


def balance(client: Client, tenant_id: str) -> tuple[int, int]:
    """Nano-dollars that a tenant has spent, and that are held for it."""
    with failures():
        tenant = client.tenancy.GetTenant(
            tenancy_service_pb2.GetTenantRequest(tenant_id=tenant_id), timeout=_CALL_SECONDS, metadata=client.as_admin
        ).tenant
    return tenant.balance.spent_nano_usd, tenant.balance.held_nano_usd


def held(client: Client) -> int:
    """Nano-dollars held at all accounts of all tenants."""
    amount = 0
    tenancy, admin = client.tenancy, client.as_admin
    for page in pages(tenancy.ListTenants, tenancy_service_pb2.ListTenantsRequest(), admin, _CALL_SECONDS):
        for tenant in page.tenants:
            amount += tenant.balance.held_nano_usd
            projects = tenancy_service_pb2.ListProjectsRequest(tenant_id=tenant.id)
            keys = tenancy_service_pb2.ListKeysRequest(tenant_id=tenant.id)
            for some in pages(tenancy.ListProjects, projects, admin, _CALL_SECONDS):
                amount += sum(project.balance.held_nano_usd for project in some.projects)
            for few in pages(tenancy.ListKeys, keys, admin, _CALL_SECONDS):
                amount += sum(key.balance.held_nano_usd for key in few.keys)
    return amount


async def seconds_held(client: Client) -> float | None:
    """Until no money is held any more; None: it still is after QUIET_SECONDS."""
    began = time.monotonic()
    while time.monotonic() - began < QUIET_SECONDS:
        if not await asyncio.to_thread(held, client):
            return time.monotonic() - began
        await asyncio.sleep(0.5)
    return None


def reservations(started: Running) -> list[str]:
    """Holds and leases that are open, for the message of a failure."""
    (path,) = started.directory.rglob("ledger.db")
    now = time.time()
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        holds = connection.execute("SELECT id, tenant_id, amount, expire_time FROM holds WHERE state = 'open'").fetchall()
        leases = connection.execute("SELECT id, tenant_id, outstanding, expire_time, slot, incarnation FROM leases").fetchall()
    return [
        *(f"held: {name} of {tenant}, {amount}, for {until - now:.0f} s" for name, tenant, amount, until in holds),
        *(
            f"held: {name} of {tenant}, {left}, for {until - now:.0f} s, by {slot}.{of}"
            for name, tenant, left, until, slot, of in leases
        ),
    ]
