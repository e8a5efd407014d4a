"""The mesh with its ledger on PostgreSQL and two metering processes: charged the same whichever of them is asked, or dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from services.cli.client import Client, failures
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.metering.v1 import tenancy_service_pb2, usage_service_pb2
from tests import postgres
from tests.integration.conftest import SECTIONS
from tests.running import Running, default_catalogue, running

PRICED = "echo/priced"
REQUESTS = 40
SETTLE_SECONDS = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as started:
        yield started


@pytest.fixture(scope="module")
def mesh(server: postgres.Server) -> Iterator[Running]:
    sections = {**SECTIONS, "metering": {**SECTIONS["metering"], "database_url": server.url("postgres")}}
    catalogue = default_catalogue()
    catalogue["models"][PRICED] = {**catalogue["models"]["echo/echo"], "price": {"input": 1, "output": 2}}
    with running("mesh", sections=sections, catalogue=catalogue, replicas={"metering": 2}) as started:
        yield started


def ask(client: Client, text: str) -> int:
    """One request to a model that costs something; its cost in nano-dollars."""
    request = inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(
            messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])]
        ),
        routing=inference_service_pb2.RoutingWishes(model=PRICED),
        cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF),
    )
    with failures():
        return client.inference.Generate(request, timeout=30, metadata=client.as_tenant).cost_nano_usd


def booked(client: Client) -> tuple[int, int]:
    """Entries of the ledger and what they moved, whichever process is asked."""
    ends = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            with failures():
                verdict = client.usage.VerifyLedger(
                    usage_service_pb2.VerifyLedgerRequest(), timeout=30, metadata=client.as_admin
                )
        except Failure:
            # Killed, or its database is.
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
        else:
            assert verdict.ok, list(verdict.problems)
            return verdict.entry_count, verdict.debit_nano_usd


def settled(client: Client, before: tuple[int, int], entries: int, cost: int) -> None:
    """Waits until the ledger has that much more than `before`, and no more."""
    ends = time.monotonic() + SETTLE_SECONDS
    wanted = (before[0] + entries, before[1] + cost)
    while (found := booked(client)) != wanted:
        assert time.monotonic() < ends, f"the ledger has {found}, and not {wanted}"
        assert found <= wanted
        time.sleep(0.1)


def test_two_processes_keep_one_ledger(mesh: Running, client: Client) -> None:
    assert {"metering", "metering-2"} <= set(mesh.ready.pids)
    before = booked(client)
    costs = [ask(client, f"Number {number}.") for number in range(REQUESTS)]
    assert all(costs)
    settled(client, before, REQUESTS, sum(costs))


def test_a_killed_metering_process_costs_nobody_anything(mesh: Running, client: Client) -> None:
    before, costs = booked(client), []
    for number in range(REQUESTS):
        if number in {10, 20}:
            os.kill(mesh.ready.pids["metering" if number == 10 else "metering-2"], signal.SIGKILL)
        costs.append(ask(client, f"Killed {number}."))
    settled(client, before, REQUESTS, sum(costs))


def test_settlements_wait_for_a_database_that_is_away(mesh: Running, client: Client, server: postgres.Server) -> None:
    before = booked(client)
    # Keys and limits at hand serve on; the mesh is not asked for new ones for as long as leases last.
    costs = [ask(client, "The lease is fresh.")]
    server.stop()
    try:
        costs += [ask(client, f"Away {number}.") for number in range(REQUESTS)]
        with pytest.raises(Failure) as told, failures():
            client.usage.VerifyLedger(usage_service_pb2.VerifyLedgerRequest(), timeout=30, metadata=client.as_admin)
        assert told.value.metadata == {"dependency": "ledger"}
    finally:
        server.start()
    settled(client, before, REQUESTS + 1, sum(costs))


def test_a_rate_is_one_rate_over_all_metering_processes(mesh: Running) -> None:
    per_minute, requests = 40, 100
    key = tenancy_service_pb2.Key(
        tenant_id="default",
        project_id="default",
        scopes=["inference"],
        limits=tenancy_service_pb2.Limits(requests_per_minute=per_minute),
    )
    with mesh.client() as admin, failures():
        request = tenancy_service_pb2.CreateKeyRequest(key=key)
        secret = admin.tenancy.CreateKey(request, timeout=30, metadata=admin.as_admin).secret
    admitted = 0
    began = time.monotonic()
    with mesh.client(key=secret) as client:
        for _ in range(requests):
            try:
                ask(client, "hello")
                admitted += 1
            except Failure as failure:
                assert failure.reason is Reason.RATE_LIMITED  # noqa: PT017
    # Each process would have let as many through.
    assert per_minute <= admitted <= per_minute * (1 + (time.monotonic() - began) / 60) + 1
