"""Wiring of the metering service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from services.metering import pricebook
from services.metering.accounts import Key, Limits
from services.metering.adapters import genai, postgres, sqlite
from services.metering.config import Config
from services.metering.errors import StoreUnavailable
from services.metering.leasing import Defaults, Leasing
from services.metering.ports import Store
from services.metering.pricebook import PriceBook
from services.metering.service import MeteringServicer, Prices
from services.metering.tenancy import Tenancy
from services.metering.tenancy_service import TenancyServicer
from services.metering.usage_service import UsageServicer
from services.runtime.config import ConfigError, read_yaml
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure
from services.runtime.process import Process, Service
from services.runtime.watching import Watch
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2, usage_service_pb2

NAME: Final = "metering"
KEYS_REVOKED: Final = "sluice.keys.revoked"
"""Core NATS subject of revocations; the payload is a KeyInvalidation."""


def _read_book(path: Path) -> PriceBook:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: must be a mapping of sections"])
    return pricebook.build(content, genai.seed)


def _open_store(config: Config, process: Process) -> AbstractAsyncContextManager[Store]:
    """The ledger's store. Raises ConfigError."""
    if not config.database_url:
        return sqlite.open_store(process.state_dir(NAME))
    try:
        url = postgres.url_of(config.database_url)
    except ValueError as error:
        raise ConfigError([f"metering.database_url: {error}"]) from None

    def failed(error: Exception) -> None:
        # The driver's own text may quote values; its type and the server's code tell enough.
        process.log.warning("ledger_unavailable", error=type(error).__name__, sqlstate=postgres.sqlstate(error))

    return postgres.open_store(url, failed)


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the ledger, the price book and the tenant `default`."""
    path = process.settings.catalogue
    file = Watch(path)
    prices = Prices(await asyncio.to_thread(_read_book, path))
    async with _open_store(config, process) as store:
        leasing = Leasing(
            store,
            Defaults(config.requests_per_minute, config.concurrency),
            lease_seconds=config.lease_seconds,
            grace_seconds=config.lease_grace,
            recall_factor=config.recall_factor,
        )

        async def announce(key: Key) -> None:
            message = tenancy_service_pb2.KeyInvalidation(key_sha256=key.sha256, key_id=key.id)
            try:
                await (await process.nats()).publish(KEYS_REVOKED, message.SerializeToString())
            except (Failure, OSError) as error:
                process.log.warning("revocation_not_announced", key=key.id, error=type(error).__name__)

        tenancy = Tenancy(store, announce)
        if config.bootstrap_key:
            limits = Limits(
                budget_nano_usd=config.bootstrap_budget_nano_usd,
                requests_per_minute=config.bootstrap_requests_per_minute,
                concurrency=config.bootstrap_concurrency,
            )
            await tenancy.bootstrap(config.bootstrap_key, limits)

        async def sweep() -> None:
            while True:
                await asyncio.sleep(config.sweep_interval)
                try:
                    freed = await store.expire(time.time())
                except StoreUnavailable:
                    process.log.warning("sweep_failed")
                    continue
                if freed:
                    process.log.info("reservations_expired", count=freed)

        async def watch_prices() -> None:
            async for _ in file.changes(config.price_reload_interval):
                try:
                    prices.book = await asyncio.to_thread(_read_book, path)
                except ConfigError as error:
                    # The last good book stays.
                    process.log.error("prices_not_reloaded", problems=list(error.problems))
                else:
                    process.log.info("prices_reloaded", version=prices.book.version)

        servicer = MeteringServicer(store, leasing, prices, process.metrics, identity_reuse=config.identity_reuse)
        yield Service(
            name=NAME,
            bindings=(
                Binding(servicer, metering_service_pb2.DESCRIPTOR.services_by_name["MeteringService"]),
                Binding(TenancyServicer(tenancy, store), tenancy_service_pb2.DESCRIPTOR.services_by_name["TenancyService"]),
                Binding(UsageServicer(store, prices), usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]),
            ),
            pings={"ledger": store.ping},
            workers=(sweep, watch_prices),
        )
