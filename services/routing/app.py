"""Wiring of the routing service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.routing import catalogue
from services.routing.catalogue import MAX_MODELS, Catalogue
from services.routing.config import Config
from services.routing.planner import Planner
from services.routing.prices import Prices
from services.routing.proto import rates_from_proto
from services.routing.service import RoutingServicer
from services.routing.statistics import Statistics
from services.runtime.config import ConfigError, read_yaml
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure, unavailable
from services.runtime.process import Process, Service
from services.runtime.watching import Watch
from sluice.metering.v1 import price_pb2, usage_service_pb2
from sluice.metering.v1.usage_service_pb2_grpc import UsageServiceStub
from sluice.routing.v1 import routing_service_pb2

if TYPE_CHECKING:
    # Exists for type checkers only.
    from sluice.metering.v1.usage_service_pb2_grpc import UsageServiceAsyncStub

NAME: Final = "routing"
_PRICE_CALL_SECONDS: Final = 5.0
_PRICE_RETRY_SECONDS: Final = 0.5
_PRICE_PAGE: Final = 1000


def read_catalogue(path: Path) -> Catalogue:
    """The catalogue of a file. Raises ConfigError."""
    return catalogue.parse(read_yaml(path))


async def read_prices(usage: UsageServiceAsyncStub) -> list[price_pb2.Price]:
    """The prices of this moment, all pages. Raises Failure."""
    found: list[price_pb2.Price] = []
    token = ""
    while True:
        page = await usage.ListPrices(
            usage_service_pb2.ListPricesRequest(page_size=_PRICE_PAGE, page_token=token), timeout=_PRICE_CALL_SECONDS
        )
        found += page.prices
        token = page.next_page_token
        if not token or len(found) > MAX_MODELS:
            return found


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the service. It is ready when it has read the prices once; they are read again all the time."""
    path = process.settings.catalogue
    file = Watch(path)
    prices: Prices[price_pb2.Price] = Prices()
    statistics = Statistics(
        asyncio.get_running_loop().time,
        samples=config.latency_samples,
        max_age=config.latency_age,
        silence=config.report_silence,
        max_models=MAX_MODELS,
        max_reporters=config.max_reporters,
    )
    planner = Planner(await asyncio.to_thread(read_catalogue, path), prices, statistics)
    usage = UsageServiceStub(process.channel("metering"))
    plans = process.metrics.counter("routing_plans", "Plans made, by whether they have a candidate.", ("candidates",))
    filled, empty = plans.labels("some"), plans.labels("none")
    reloaded = asyncio.Event()

    async def refresh() -> None:
        while True:
            try:
                rows = await read_prices(usage)
            except Failure as failure:
                process.log.warning("prices_not_read", message=failure.message, known=prices.is_known)
                pause = config.price_interval / 10 if prices.is_known else _PRICE_RETRY_SECONDS
            else:
                prices.use((row.model, rates_from_proto(row), row) for row in rows)
                pause = config.price_interval
            with contextlib.suppress(TimeoutError):
                # A new catalogue may have new models, whose prices are wanted at once; metering needs its own while to read it.
                await asyncio.wait_for(reloaded.wait(), pause)
                reloaded.clear()
                await asyncio.sleep(config.reload_interval)

    async def watch() -> None:
        async for _ in file.changes(config.reload_interval):
            try:
                planner.catalogue = await asyncio.to_thread(read_catalogue, path)
            except ConfigError as error:
                # The last good catalogue stays.
                process.log.error("catalogue_not_reloaded", problems=list(error.problems))
                continue
            reloaded.set()
            process.log.info("catalogue_reloaded", version=planner.catalogue.version, models=len(planner.catalogue.models))

    async def ping_prices() -> None:
        if not prices.is_known:
            raise unavailable("metering", "prices were not read yet")

    servicer = RoutingServicer(
        planner, reuse_seconds=config.plan_reuse, planned=lambda some: filled.inc() if some else empty.inc()
    )
    yield Service(
        name=NAME,
        bindings=(Binding(servicer, routing_service_pb2.DESCRIPTOR.services_by_name["RoutingService"]),),
        pings={"prices": ping_prices},
        workers=(refresh, watch),
    )
