"""Which calls a transport may repeat by itself, as data: the methods whose contract says that they are idempotent.

Billable calls are missing on purpose even where a request id makes them idempotent: their retries belong to the caller, who
knows what an attempt costs. See reliability.md, pitfalls 11 and 12.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

IDEMPOTENT: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "sluice.caching.v1.CachingService": frozenset({"Lookup", "Store", "BatchStore", "Purge", "GetStats"}),
        "sluice.execution.v1.ExecutionService": frozenset({"ListProviders"}),
        "sluice.inference.v1.InferenceService": frozenset({"CountTokens", "ListModels", "Explain", "ReportOutcome"}),
        "sluice.jobs.v1.JobService": frozenset({"SubmitJob", "GetJob", "ListJobs", "CancelJob"}),
        "sluice.metering.v1.MeteringService": frozenset(
            {"Authenticate", "AcquireLease", "ReturnLease", "Hold", "VoidHold", "PostSettlements"}
        ),
        "sluice.metering.v1.TenancyService": frozenset({"GetTenant", "ListTenants", "ListProjects", "ListKeys", "RevokeKey"}),
        "sluice.metering.v1.UsageService": frozenset({"QueryUsage", "ListEntries", "ListPrices"}),
        "sluice.routing.v1.RoutingService": frozenset({"Plan", "ListModels"}),
        "sluice.tokenization.v1.TokenizationService": frozenset({"Count", "CountTexts", "Fit", "ListTokenizers"}),
    }
)
"""Unary methods that may run twice without harm, by full name of the service."""


def is_idempotent(path: str) -> bool:
    """Whether the method with the full name `path` (`/service/Method`) may be repeated."""
    _, service, method = path.split("/")
    return method in IDEMPOTENT.get(service, ())


def service_config(health_service: str | None, services: Collection[str]) -> str:
    """The gRPC service config of a channel: round_robin, health checking, retries of idempotent methods.

    `health_service` is the name asked of `grpc.health.v1`, None for no health checking; `services` are the full names of the
    services that the channel is for.
    """
    names: Sequence[Mapping[str, str]] = [
        {"service": service, "method": method} for service in sorted(services) for method in sorted(IDEMPOTENT.get(service, ()))
    ]
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
    if health_service is not None:
        config["healthCheckConfig"] = {"serviceName": health_service}
    if names:
        config["methodConfig"] = [
            {
                "name": names,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return json.dumps(config)
