from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from services.metering.app import KEYS_REVOKED, open_service
from services.metering.config import Config
from services.runtime.config import ConfigError
from services.runtime.errors import Code, Failure, Reason
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2, usage_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from sluice.metering.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from sluice.metering.v1.usage_service_pb2_grpc import UsageServiceStub
from tests.unit.metering.examples import refused, settlement
from tests.unit.runtime.fakes import Lines
from tests.unit.runtime.test_link import free_port
from tests.unit.runtime.test_process import nats_server

SECRET = "a-secret-of-the-configuration"
DIGEST = hashlib.sha256(SECRET.encode()).digest()
BOOTSTRAP = Config(bootstrap_key=SECRET, sweep_interval=0.05, price_reload_interval=0.1)
CATALOGUE = "providers: {p: {kind: openai}}\nmodels: {p/m: {provider: p, upstream_model: m, price: {input: 1, output: 2}}}\n"


class Running:
    """The service with its workers, and stubs through the in-process channel."""

    def __init__(self, process: Process, log: Lines) -> None:
        channel: Any = process.channel("metering")
        self.process = process
        self.log = log
        self.metering: Any = MeteringServiceStub(channel)
        self.tenancy: Any = TenancyServiceStub(channel)
        self.usage: Any = UsageServiceStub(channel)


@contextlib.asynccontextmanager
async def running(directory: Path, config: Config = BOOTSTRAP, *, nats_url: str = "") -> AsyncIterator[Running]:
    catalogue = directory / "catalogue.yaml"
    if not catalogue.exists():
        catalogue.write_text(CATALOGUE)
    more: dict[str, Any] = {"nats_url": nats_url} if nats_url else {}
    settings = MeshSettings(state_dir=directory / "state", catalogue=catalogue, **more)
    log = Lines()
    async with Process("metering", settings, log=log) as process, open_service(config, process) as service:
        process.serve(service.name, service.bindings)
        for ping in service.pings.values():
            await ping()
        workers = [asyncio.create_task(worker()) for worker in service.workers]
        try:
            yield Running(process, log)
            assert not [worker for worker in workers if worker.done()]
        finally:
            # As the process does: before Python 3.12 `asyncio.wait_for`, which nats-py waits with, may swallow a cancellation.
            left = set(workers)
            while left:
                for worker in left:
                    worker.cancel()
                _, left = await asyncio.wait(left, timeout=0.2)


async def prices(run: Running) -> usage_service_pb2.ListPricesResponse:
    response: usage_service_pb2.ListPricesResponse = await run.usage.ListPrices(
        usage_service_pb2.ListPricesRequest(), timeout=5
    )
    return response


async def test_the_key_of_the_configuration_works_from_the_start_and_after_a_restart(tmp_path: Path) -> None:
    request = metering_service_pb2.AuthenticateRequest(key_sha256=DIGEST)
    config = Config(bootstrap_key=SECRET, bootstrap_budget_nano_usd=500, bootstrap_concurrency=3)
    async with running(tmp_path, config) as run:
        first = (await run.metering.Authenticate(request, timeout=5)).identity
        assert (first.tenant_id, first.project_id) == ("default", "default")
        tenant = await run.tenancy.GetTenant(tenancy_service_pb2.GetTenantRequest(tenant_id="default"), timeout=5)
        assert (tenant.tenant.limits.budget_nano_usd, tenant.tenant.limits.concurrency) == (500, 3)
    async with running(tmp_path, config) as run:
        assert (await run.metering.Authenticate(request, timeout=5)).identity == first


async def test_errors_reach_the_caller_with_their_reasons(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
            await run.metering.Authenticate(metering_service_pb2.AuthenticateRequest(key_sha256=bytes(32)), timeout=5)
        with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="key_sha256"):
            await run.metering.Authenticate(metering_service_pb2.AuthenticateRequest(key_sha256=b"x"), timeout=5)
        with refused(Reason.RESOURCE_EXISTS, Code.ALREADY_EXISTS, resource="tenants/default"):
            wanted = tenancy_service_pb2.Tenant(id="default")
            await run.tenancy.CreateTenant(tenancy_service_pb2.CreateTenantRequest(tenant=wanted), timeout=5)


async def test_a_hold_that_is_over_is_swept(tmp_path: Path) -> None:
    async with running(tmp_path, Config(bootstrap_key=SECRET, bootstrap_budget_nano_usd=500, sweep_interval=0.05)) as run:
        identity = (
            await run.metering.Authenticate(metering_service_pb2.AuthenticateRequest(key_sha256=DIGEST), timeout=5)
        ).identity
        past = Timestamp(seconds=int(time.time()) - 1)
        request = metering_service_pb2.HoldRequest(
            operation_id="op-1", key_id=identity.key_id, amount_nano_usd=500, expire_time=past
        )
        hold = await run.metering.Hold(request, timeout=5)
        async with asyncio.timeout(5):
            while not run.log.events("info"):
                await asyncio.sleep(0.01)
        assert ("info", "reservations_expired", {"count": 1}) in run.log.lines
        voided = await run.metering.VoidHold(metering_service_pb2.VoidHoldRequest(hold_id=hold.hold_id), timeout=5)
        assert voided.state == metering_service_pb2.HOLD_STATE_EXPIRED


async def test_changed_prices_are_taken_up_and_bad_ones_are_not(tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    async with running(tmp_path) as run:
        first = await prices(run)
        assert [price.input_nano_usd_per_million for price in first.prices] == [1_000_000_000]

        def write(text: str, stamp: int) -> None:
            catalogue.write_text(text)
            os.utime(catalogue, ns=(stamp, stamp))

        async def until(level: str, event: str) -> None:
            async with asyncio.timeout(5):
                while event not in run.log.events(level):
                    await asyncio.sleep(0.01)

        write(CATALOGUE.replace("input: 1", "input: -1"), 1)
        await until("error", "prices_not_reloaded")
        assert await prices(run) == first
        write(CATALOGUE.replace("input: 1", "input: 3"), 2)
        await until("info", "prices_reloaded")
        second = await prices(run)
        assert [price.input_nano_usd_per_million for price in second.prices] == [3_000_000_000]
        assert second.book_version != first.book_version


async def test_a_catalogue_with_bad_prices_is_no_start(tmp_path: Path) -> None:
    for text in ("- a", "a: [", CATALOGUE.replace("input: 1", "input: .inf")):
        (tmp_path / "catalogue.yaml").write_text(text)
        with pytest.raises(ConfigError):
            async with running(tmp_path):
                pass


async def test_one_ledger_has_one_process(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(RuntimeError, match="exactly one"):
            async with running(tmp_path):
                pass


async def test_a_settlement_of_a_key_is_in_its_usage(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        sent = metering_service_pb2.PostSettlementsRequest(settlements=[settlement("op-1/1", 9)])
        for state in (metering_service_pb2.SETTLEMENT_STATE_POSTED, metering_service_pb2.SETTLEMENT_STATE_DUPLICATE):
            (result,) = (await run.metering.PostSettlements(sent, timeout=5)).results
            assert result.state == state
        (row,) = (await run.usage.QueryUsage(usage_service_pb2.QueryUsageRequest(), timeout=5)).rows
        assert (row.cost_nano_usd, row.attempt_count) == (9, 1)
        verdict = await run.usage.VerifyLedger(usage_service_pb2.VerifyLedgerRequest(), timeout=5)
        assert verdict.ok, verdict.problems


async def test_a_revocation_is_announced_on_nats(tmp_path: Path) -> None:
    port = free_port()
    async with nats_server(port, tmp_path / "nats"), running(tmp_path, nats_url=f"nats://127.0.0.1:{port}") as run:
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def on_revoked(message: Any) -> None:
            heard.set_result(message.data)

        client = await run.process.nats()
        await client.subscribe(KEYS_REVOKED, cb=on_revoked)
        await client.flush()
        key = (await run.metering.Authenticate(metering_service_pb2.AuthenticateRequest(key_sha256=DIGEST), timeout=5)).identity
        await run.tenancy.RevokeKey(tenancy_service_pb2.RevokeKeyRequest(key_id=key.key_id), timeout=5)
        async with asyncio.timeout(5):
            message = tenancy_service_pb2.KeyInvalidation.FromString(await heard)
        assert message == tenancy_service_pb2.KeyInvalidation(key_sha256=DIGEST, key_id=key.key_id)
        with pytest.raises((Failure, grpc.RpcError)):
            await run.metering.Authenticate(metering_service_pb2.AuthenticateRequest(key_sha256=DIGEST), timeout=5)


async def test_without_nats_a_key_is_revoked_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, nats_url=f"nats://127.0.0.1:{free_port()}") as run:
        asked = metering_service_pb2.AuthenticateRequest(key_sha256=DIGEST)
        key = (await run.metering.Authenticate(asked, timeout=5)).identity
        await run.tenancy.RevokeKey(tenancy_service_pb2.RevokeKeyRequest(key_id=key.key_id), timeout=10)
        with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
            await run.metering.Authenticate(asked, timeout=5)
        assert "revocation_not_announced" in run.log.events("warning")
