from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.runtime.dispatch import Binding, Kind, build_table, methods_of
from sluice.jobs.v1 import job_service_pb2
from sluice.link.v1 import link_service_pb2
from tests.unit.runtime.fakes import Jobs, Script, bindings

JOBS = job_service_pb2.DESCRIPTOR.services_by_name["JobService"]


def test_the_table_has_every_method_by_full_name() -> None:
    table = build_table(bindings(Script()), ())
    watch = table["/sluice.jobs.v1.JobService/WatchJob"]
    assert (watch.kind, watch.unary, watch.name) == (Kind.STREAM, None, "WatchJob")
    assert watch.request_class is job_service_pb2.WatchJobRequest
    assert table["/sluice.jobs.v1.JobService/GetJob"].kind is Kind.UNARY
    assert len(table) == 11


def test_a_missing_method_is_found_at_the_start() -> None:
    with pytest.raises(TypeError, match="object lacks SubmitJob"):
        methods_of(Binding(object(), JOBS))


def test_a_method_of_the_wrong_shape_is_found_at_the_start() -> None:
    class Wrong(Jobs):
        async def GetJob(self, request: Any, call: Any) -> AsyncIterator[Any]:  # type: ignore[override]
            yield request

    with pytest.raises(TypeError, match="GetJob must be a coroutine"):
        methods_of(Binding(Wrong(Script()), JOBS))


def test_client_streaming_is_refused() -> None:
    with pytest.raises(TypeError, match="client-streaming"):
        methods_of(Binding(object(), link_service_pb2.DESCRIPTOR.services_by_name["LinkService"]))
