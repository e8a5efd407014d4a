"""grpcurl, unmodified, by reflection alone: it lists and calls every service."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from services.cli.demonstration import LOCAL_MODEL
from tests.running import Running
from tools.externals import grpcurl

SERVICES = {
    "gateway": ["sluice.inference.v1.InferenceService"],
    "routing": ["sluice.routing.v1.RoutingService"],
    "caching": ["sluice.caching.v1.CachingService"],
    "execution": ["sluice.execution.v1.ExecutionService"],
    "tokenization": ["sluice.tokenization.v1.TokenizationService"],
    "metering": ["sluice.metering.v1.MeteringService", "sluice.metering.v1.TenancyService", "sluice.metering.v1.UsageService"],
    "batching": ["sluice.jobs.v1.JobService"],
}
CALLS: list[tuple[str, str, dict[str, Any], str]] = [
    ("gateway", "sluice.inference.v1.InferenceService/ListModels", {}, "models"),
    (
        "gateway",
        "sluice.inference.v1.InferenceService/Generate",
        {
            "conversation": {"messages": [{"role": "ROLE_USER", "parts": [{"text": "hello"}]}]},
            "routing": {"model": "echo/echo"},
        },
        "answer",
    ),
    ("routing", "sluice.routing.v1.RoutingService/Plan", {"tenantId": "default", "model": LOCAL_MODEL}, "candidates"),
    ("caching", "sluice.caching.v1.CachingService/GetStats", {"tenantId": "default"}, ""),
    ("execution", "sluice.execution.v1.ExecutionService/ListProviders", {}, "providers"),
    ("tokenization", "sluice.tokenization.v1.TokenizationService/ListTokenizers", {}, "tokenizers"),
    ("metering", "sluice.metering.v1.TenancyService/ListTenants", {}, "tenants"),
    ("metering", "sluice.metering.v1.UsageService/ListPrices", {}, "prices"),
    ("batching", "sluice.jobs.v1.JobService/ListJobs", {}, ""),
]


def run(mesh: Running, service: str, verb: str, *, data: dict[str, Any] | None = None, key: str | None = None) -> str:
    """What grpcurl prints."""
    command = [str(grpcurl()), "-plaintext", "-max-time", "30"]
    if key is not None:
        command += ["-H", f"authorization: Bearer {key}"]
    if data is not None:
        command += ["-d", json.dumps(data)]
    command += [mesh.ready.grpc[service], verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_service_is_listed_and_says_that_it_serves(mesh: Running, service: str) -> None:
    listed = run(mesh, service, "list").split()
    assert set(SERVICES[service]) <= set(listed)
    assert "grpc.health.v1.Health" in listed
    for name in SERVICES[service]:
        said = run(mesh, service, "grpc.health.v1.Health/Check", data={"service": name})
        assert json.loads(said) == {"status": "SERVING"}


@pytest.mark.parametrize(("service", "method", "request_", "field"), CALLS, ids=[call[1] for call in CALLS])
def test_every_service_can_be_called(mesh: Running, service: str, method: str, request_: dict[str, Any], field: str) -> None:
    ready = mesh.ready
    key = ready.key if service in ("gateway", "batching") else ready.admin_key
    answer = json.loads(run(mesh, service, method, data=request_, key=key))
    if field:
        assert answer[field]
