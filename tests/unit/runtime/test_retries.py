from __future__ import annotations

import json

import pytest
from google.protobuf.descriptor_pool import Default

import sluice.caching.v1.caching_service_pb2
import sluice.execution.v1.execution_service_pb2
import sluice.inference.v1.inference_service_pb2
import sluice.jobs.v1.job_service_pb2
import sluice.metering.v1.metering_service_pb2
import sluice.metering.v1.tenancy_service_pb2
import sluice.metering.v1.usage_service_pb2
import sluice.routing.v1.routing_service_pb2
import sluice.tokenization.v1.tokenization_service_pb2  # noqa: F401  # imported to be in the pool
from services.runtime.authentication import ACCESS
from services.runtime.retries import IDEMPOTENT, is_idempotent, service_config


@pytest.mark.parametrize("service", sorted(IDEMPOTENT))
def test_every_listed_method_exists_and_is_unary(service: str) -> None:
    methods = Default().FindServiceByName(service).methods_by_name
    for name in IDEMPOTENT[service]:
        assert not methods[name].server_streaming
    assert service in ACCESS


def test_billable_calls_are_never_repeated() -> None:
    for path in (
        "/sluice.inference.v1.InferenceService/Generate",
        "/sluice.inference.v1.InferenceService/Embed",
        "/sluice.execution.v1.ExecutionService/Complete",
        "/sluice.execution.v1.ExecutionService/Embed",
        "/sluice.metering.v1.TenancyService/CreateKey",
    ):
        assert not is_idempotent(path)
    assert is_idempotent("/sluice.routing.v1.RoutingService/Plan")


def test_the_service_config() -> None:
    config = json.loads(service_config("routing", ["sluice.routing.v1.RoutingService"]))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"] == {"serviceName": "routing"}
    (method,) = config["methodConfig"]
    assert {"service": "sluice.routing.v1.RoutingService", "method": "Plan"} in method["name"]
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert "healthCheckConfig" not in json.loads(service_config(None, []))
