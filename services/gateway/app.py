"""Wires the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from services.gateway.adapters.invalidations import KeyInvalidations
from services.gateway.adapters.metering import MeteringClient
from services.gateway.adapters.replays import NatsReplays
from services.gateway.adapters.replays import Settings as ReplaySettings
from services.gateway.cache import CacheClient, CacheWriter, HitBook
from services.gateway.calibrations import Calibrations
from services.gateway.config import Config, SharedReplayConfig
from services.gateway.core import Core, CoreLimits, Peers, Surroundings
from services.gateway.edge.server import serve
from services.gateway.identities import Identities
from services.gateway.journal import Journal
from services.gateway.leases import Leases, SliceSizes
from services.gateway.operations import ReplayLimits, Requests
from services.gateway.outcomes import Outcomes
from services.gateway.owners import Owners, Passing
from services.gateway.plans import Plans
from services.gateway.releases import Releases
from services.gateway.replays import NoReplays
from services.gateway.service import InferenceService
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure
from services.runtime.metrics import Registry
from services.runtime.process import Process, Service
from sluice.caching.v1.caching_service_pb2_grpc import CachingServiceStub
from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceStub
from sluice.inference.v1 import inference_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from sluice.routing.v1 import routing_service_pb2
from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceStub
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub

NAME = "gateway"


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """The gateway, with its HTTP edge listening. Serves while its workers run."""
    clock = asyncio.get_running_loop().time
    budgets = config.budgets
    metering_stub = MeteringServiceStub(process.channel("metering"))
    caching_stub = CachingServiceStub(process.channel("caching"))
    routing_stub = RoutingServiceStub(process.channel("routing"))
    tokenization_stub = TokenizationServiceStub(process.channel("tokenization"))
    peers = Peers(
        routing=routing_stub,
        execution=ExecutionServiceStub(process.channel("execution")),
        tokenization=tokenization_stub,
    )
    gateways = process.replicas(NAME)
    passing = Passing(Owners(gateways, process.replica_id), clock)
    replays = _replays(config.shared_replays, process, clock) if config.shared_replays.enabled else None
    metering = MeteringClient(metering_stub, process.replica_id, process.replicas("metering"))
    sizes = SliceSizes(config.lease.request_count, config.lease.token_count, config.lease.concurrency, config.lease.nano_usd)
    releases = Releases(metering, max_count=10_000, call_seconds=budgets.background)
    leases = Leases(metering, releases, clock, sizes, call_seconds=budgets.lease, max_count=config.lease.max_count)
    around = Surroundings(
        metering=metering,
        identities=Identities(
            metering,
            leases,
            clock,
            time.time,
            recheck_seconds=config.recheck_seconds,
            call_seconds=budgets.authenticate,
            max_count=config.max_identities,
        ),
        leases=leases,
        plans=Plans(routing_stub.Plan, clock, call_seconds=budgets.plan, max_count=config.max_plans),
        cache=CacheClient(caching_stub, clock, lookup_seconds=budgets.lookup),
        writer=CacheWriter(
            caching_stub, max_count=config.store_count, max_bytes=config.store_bytes, call_seconds=budgets.background
        ),
        hits=HitBook(metering_stub, max_count=config.hit_count, batch_seconds=0.02, call_seconds=budgets.background),
        releases=releases,
        requests=Requests(ReplayLimits(config.replay_count, config.replay_bytes, config.replay_seconds), clock),
        replays=replays if replays is not None else NoReplays(),
        passing=passing,
        outcomes=Outcomes(config.outcome_count),
        calibrations=Calibrations(
            tokenization_stub,
            sample_count=config.calibration.sample_count,
            sample_seconds=config.calibration.sample_seconds,
            max_count=config.calibration.max_count,
            max_bytes=config.calibration.max_bytes,
            call_seconds=budgets.background,
        ),
        journal=Journal(process.metrics, process.request_log().write if config.log_requests else None),
    )
    limits = CoreLimits(
        max_request_bytes=config.max_request_bytes,
        default_max_output_tokens=config.default_max_output_tokens,
        min_output_tokens=config.min_output_tokens,
        authenticate=budgets.authenticate,
        lease=budgets.lease,
        plan=budgets.plan,
        count=budgets.count,
        uncounted_bytes=config.uncounted_bytes,
        linger=config.linger_seconds,
    )
    core = Core(peers, around, limits, clock)
    _expose(process.metrics, around)
    invalidations = KeyInvalidations(process.nats, around.identities)

    async def ping_routing() -> None:
        await routing_stub.ListModels(routing_service_pb2.ListModelsRequest(page_size=1), timeout=budgets.plan)

    async with contextlib.AsyncExitStack() as stack:
        edge = await stack.enter_async_context(serve(core, config.edge, process, ping_routing))

        async def drain() -> None:
            await edge.drain()
            core.close_admission()
            await core.wait_idle(budgets.drain)
            with contextlib.suppress(Failure, TimeoutError):
                async with asyncio.timeout(budgets.background):
                    await around.writer.flush()
                    await around.releases.flush()
                    await around.hits.flush()
            await leases.give_back_all(budgets.background)

        servicer = InferenceService(core, clock, max_seconds=config.edge.max_deadline)
        yield Service(
            name=NAME,
            bindings=(Binding(servicer, inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]),),
            pings={"routing": ping_routing},
            workers=(
                leases.refill_forever,
                around.identities.recheck_forever,
                around.writer.write_forever,
                around.hits.post_forever,
                releases.release_forever,
                around.calibrations.post_forever,
                invalidations.listen_forever,
                *((replays.run,) if replays is not None else ()),
            ),
            drain=drain,
            addresses={"http": edge.url},
        )


def _replays(config: SharedReplayConfig, process: Process, clock: Callable[[], float]) -> NatsReplays:
    replays = NatsReplays(
        ReplaySettings(
            max_bytes=config.max_bytes,
            max_entry_bytes=config.max_entry_bytes,
            max_age=config.seconds,
            replicas=config.replicas,
            read_timeout=config.read_timeout,
            write_timeout=config.write_timeout,
            max_waiting=config.max_waiting,
        ),
        process.nats,
        clock=clock,
        warn=lambda text: process.log.warning("answers_not_kept", reason=text),
    )
    process.metrics.gauge(
        "gateway_unkept_answers", "Answers to requests with an id that no other gateway can replay."
    ).set_function(lambda: replays.unkept_count)
    process.metrics.gauge(
        "gateway_found_answers", "Answers to repeated requests found among those of all gateways."
    ).set_function(lambda: replays.found_count)
    return replays


def _expose(registry: Registry, around: Surroundings) -> None:
    """Counts that live in the parts themselves."""
    writer, hits, releases, outcomes, leases = around.writer, around.hits, around.releases, around.outcomes, around.leases
    registry.gauge("gateway_dropped_stores", "Answers not stored in the cache since too many waited.").set_function(
        lambda: writer.dropped_count
    )
    registry.gauge("gateway_failed_stores", "Answers that the cache didn't take.").set_function(lambda: writer.failed_count)
    registry.gauge("gateway_dropped_hits", "Cache hits not booked since too many waited.").set_function(
        lambda: hits.dropped_count
    )
    passing = around.passing
    registry.gauge("gateway_passed_on", "Requests with an id that another gateway owns, passed on to it.").set_function(
        lambda: passing.passed_count
    )
    registry.gauge("gateway_lost_owners", "Gateways that were lost while a request was passed on to them.").set_function(
        lambda: passing.lost_count
    )
    registry.gauge("gateway_unreleased_reservations", "Holds and leases left to expire by themselves.").set_function(
        lambda: releases.dropped_count
    )
    registry.gauge("gateway_lease_failures", "Leases that couldn't be renewed or returned.").set_function(
        lambda: leases.renewal_failure_count
    )
    calibrations = around.calibrations
    registry.gauge(
        "gateway_dropped_observations", "Reported usage that the estimator isn't told since too much waited."
    ).set_function(lambda: calibrations.dropped_count)
    registry.gauge("gateway_failed_observations", "Reported usage that the estimator didn't take.").set_function(
        lambda: calibrations.failed_count
    )
    registry.gauge("gateway_sent_observations", "Reported usage that the estimator was told.").set_function(
        lambda: calibrations.sent_count
    )
    registry.gauge("gateway_outcomes_served", "Answers that served, as callers reported.").set_function(
        lambda: outcomes.served_count
    )
    registry.gauge("gateway_outcomes_failed", "Answers that didn't serve, as callers reported.").set_function(
        lambda: outcomes.failed_count
    )
