"""The compact topology: every service in one process, wired without sockets between them. `sluice up` runs it as a child."""

from __future__ import annotations

from typing import Final

from services.batching import app as batching
from services.batching.config import Config as BatchingConfig
from services.caching import app as caching
from services.caching.config import Config as CachingConfig
from services.execution import app as execution
from services.execution.config import Config as ExecutionConfig
from services.gateway import app as gateway
from services.gateway.config import Config as GatewayConfig
from services.metering import app as metering
from services.metering.config import Config as MeteringConfig
from services.routing import app as routing
from services.routing.config import Config as RoutingConfig
from services.runtime import bootstrap
from services.runtime.bootstrap import Unit
from services.tokenization import app as tokenization
from services.tokenization.config import Config as TokenizationConfig

UNITS: Final = (
    Unit(tokenization.NAME, TokenizationConfig, tokenization.open_service),
    Unit(metering.NAME, MeteringConfig, metering.open_service),
    Unit(routing.NAME, RoutingConfig, routing.open_service),
    Unit(caching.NAME, CachingConfig, caching.open_service),
    Unit(execution.NAME, ExecutionConfig, execution.open_service),
    Unit(batching.NAME, BatchingConfig, batching.open_service),
    Unit(gateway.NAME, GatewayConfig, gateway.open_service),
)
"""Every service, each after those it calls."""

if __name__ == "__main__":
    bootstrap.main_compact(UNITS)
