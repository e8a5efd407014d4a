"""Metrics and lines of requests."""

from __future__ import annotations

import orjson
import pytest

from services.runtime.errors import Failure, Reason
from tests.unit.gateway.fakes import SECRET, World, generate


async def test_a_request_is_counted_and_logged_without_its_text() -> None:
    world = World()
    await world.generate(generate("a secret thought"))
    (line,) = world.lines
    text = orjson.dumps(line).decode()
    assert "secret thought" not in text
    assert SECRET not in text
    assert (line["tenant_id"], line["model"], line["outcome"], line["cache"]) == ("acme", "a/one", "ok", "miss")
    exposition = world.registry.exposition().decode()
    assert 'sluice_gateway_requests_total{cache="miss",kind="generate",model="a/one",outcome="ok"} 1.0' in exposition


async def test_failures_and_degradations_are_counted() -> None:
    world = World()
    world.tokenization.failures["Count"] = Failure(Reason.DEPENDENCY_UNAVAILABLE, "down")
    world.execution.failures["Complete"] = Failure(Reason.ALL_CANDIDATES_FAILED, "all failed")
    with pytest.raises(Failure):
        await world.generate()
    assert world.lines[0]["outcome"] == "ALL_CANDIDATES_FAILED"
    exposition = world.registry.exposition().decode()
    assert 'outcome="ALL_CANDIDATES_FAILED"' in exposition
    assert 'sluice_gateway_degradations_total{dependency="tokenization"} 1.0' in exposition
