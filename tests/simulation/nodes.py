"""The wiring of one process, as each service's `app` does it, without sockets."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.execution.attempts import lost
from services.execution.breaker import Figures
from services.execution.counts import Counts as ExecutionCounts
from services.execution.service import ExecutionServicer, Reports
from services.execution.spool import Begun, Spool
from services.execution.targets import Targets
from services.gateway.adapters.metering import MeteringClient
from services.gateway.cache import CacheClient, CacheWriter, HitBook
from services.gateway.calibrations import Calibrations
from services.gateway.core import Core, CoreLimits, Peers, Surroundings
from services.gateway.identities import Identities
from services.gateway.journal import Journal
from services.gateway.leases import Leases, SliceSizes
from services.gateway.operations import OperationIds, ReplayLimits, Requests
from services.gateway.outcomes import Outcomes
from services.gateway.owners import Owners, Passing
from services.gateway.plans import Plans
from services.gateway.releases import Releases
from services.gateway.replays import NoReplays
from services.gateway.service import InferenceService
from services.metering.errors import StoreUnavailable
from services.metering.leasing import Defaults, Leasing
from services.metering.pricebook import PriceBook
from services.metering.service import MeteringServicer, Prices
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure
from services.runtime.metrics import Registry
from sluice.caching.v1.caching_service_pb2_grpc import CachingServiceStub
from sluice.execution.v1 import execution_service_pb2
from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceStub
from sluice.inference.v1 import inference_service_pb2
from sluice.metering.v1 import metering_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceStub
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.simulation.disk import Disk, Folder
from tests.simulation.network import Channel, Network, Node
from tests.simulation.peers import MODELS
from tests.simulation.store import Ledger, OnCommit
from tests.simulation.vendor import Adapter, Vendor

_POST_SECONDS: Final = 10.0
_PATIENCE: Final = 5.0
_LONGEST: Final = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that a seed chooses."""

    slice_nano_usd: int
    recall_factor: int
    linger: float
    lease_seconds: float
    grace_seconds: float
    uncounted_bytes: int
    segment_bytes: int
    requests_per_minute: int
    concurrency: int


def _workers(node: Node, works: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    for work in works:
        task = node.loop.spawn(work())
        task.add_done_callback(lambda done: _ended(node, done))


def _ended(node: Node, task: asyncio.Task[Any]) -> None:
    if node.loop.alive and not task.cancelled():
        node.loop.universe.complain(f"{node.name}: a worker ended: {task.exception()!r}")


class Gateway:
    """A gateway process."""

    def __init__(self, node: Node, network: Network, settings: Settings) -> None:
        self.node = node
        clock = node.loop.time

        def wall() -> float:
            return time.time()

        # The stubs' types know the channels of the gRPC library alone.
        to_peers: Any = Channel(network, node, "peers")
        to_metering: Any = Channel(network, node, "metering")
        to_execution: Any = Channel(network, node, "execution")
        metering: Any = MeteringServiceStub(to_metering)
        caching: Any = CachingServiceStub(to_peers)
        routing: Any = RoutingServiceStub(to_peers)
        tokenization: Any = TokenizationServiceStub(to_peers)
        execution: Any = ExecutionServiceStub(to_execution)
        port = MeteringClient(metering, node.name)
        sizes = SliceSizes(32, 200_000, 8, settings.slice_nano_usd)
        self.releases = Releases(port, max_count=10_000, call_seconds=_PATIENCE)
        self.leases = Leases(port, self.releases, clock, sizes, call_seconds=2.0, wall_clock=wall)
        self.around = Surroundings(
            metering=port,
            identities=Identities(port, self.leases, clock, wall, recheck_seconds=30.0, call_seconds=2.0, max_count=100),
            leases=self.leases,
            plans=Plans(routing.Plan, clock, call_seconds=1.0, max_count=100),
            cache=CacheClient(caching, clock, lookup_seconds=0.25),
            writer=CacheWriter(caching, max_count=1024, max_bytes=1 << 20, call_seconds=_PATIENCE),
            hits=HitBook(metering, max_count=1000, batch_seconds=0.02, call_seconds=_PATIENCE),
            releases=self.releases,
            requests=Requests(ReplayLimits(1000, 1 << 20, 86_400.0), clock),
            replays=NoReplays(),
            passing=Passing(Owners(None, node.name), clock),
            outcomes=Outcomes(100),
            calibrations=Calibrations(
                tokenization, sample_count=20, sample_seconds=5.0, max_count=100, max_bytes=1 << 18, call_seconds=_PATIENCE
            ),
            journal=Journal(Registry(), None),
        )
        limits = CoreLimits(
            max_request_bytes=1 << 20,
            default_max_output_tokens=4096,
            min_output_tokens=4,
            authenticate=2.0,
            lease=2.0,
            plan=1.0,
            count=0.25,
            uncounted_bytes=settings.uncounted_bytes,
            linger=settings.linger,
        )
        self.core = Core(Peers(routing=routing, execution=execution, tokenization=tokenization), self.around, limits, clock)
        # Its clock was bound when the module was read.
        self.core._ids = OperationIds(time.time_ns)

    async def start(self) -> None:
        """Serves."""
        around = self.around
        _workers(
            self.node,
            (
                self.leases.refill_forever,
                around.identities.recheck_forever,
                around.writer.write_forever,
                around.hits.post_forever,
                self.releases.release_forever,
                around.calibrations.post_forever,
            ),
        )
        servicer = InferenceService(self.core, self.node.loop.time, max_seconds=_LONGEST)
        self.node.serve([Binding(servicer, inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"])])

    async def drain(self) -> None:
        """The orderly end."""
        self.node.serving = False
        self.core.close_admission()
        await self.core.wait_idle(10.0)
        try:
            async with asyncio.timeout(_PATIENCE):
                await self.around.writer.flush()
                await self.releases.flush()
                await self.around.hits.flush()
        except (Failure, TimeoutError):
            pass
        await self.leases.give_back_all(_PATIENCE)

    def died(self) -> None:
        """The process is gone."""


class TrackedSpool(Spool):
    """A spool that knows which attempt a gate belongs to."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.attempts: dict[Begun, str] = {}

    def begin(self, record: Any) -> Begun:
        """As the spool does."""
        begun = super().begin(record)
        self.attempts[begun] = record.attempt_id
        return begun


class Execution:
    """An execution process. Its spool's folder is that of its name, whichever process has it."""

    def __init__(self, node: Node, network: Network, settings: Settings, disk: Disk, folder: str, vendor: Vendor) -> None:
        self.node = node
        loop = node.loop
        to_peers: Any = Channel(network, node, "peers")
        to_metering: Any = Channel(network, node, "metering")
        metering: Any = MeteringServiceStub(to_metering)
        tokenization: Any = TokenizationServiceStub(to_peers)
        universe = loop.universe

        async def post(settlements: Sequence[Any]) -> None:
            response = await metering.PostSettlements(
                metering_service_pb2.PostSettlementsRequest(settlements=settlements), timeout=_POST_SECONDS
            )
            for result in response.results:
                if result.state == metering_service_pb2.SETTLEMENT_STATE_REFUSED:
                    universe.complain(f"settlement of {result.attempt_id} refused: {result.status.message}")

        path: Any = Folder(disk, folder, loop)
        self.spool = TrackedSpool(path, post, group_seconds=0.005, segment_bytes=settings.segment_bytes, most_bytes=1 << 20)
        node.barrier = self.spool.write
        self.adapter = Adapter(vendor, loop, lambda gate: self.spool.attempts[gate])
        targets = Targets(Figures(cooldown=2.0, longest=10.0), loop.time, universe.rng)
        adapter: Any = self.adapter
        targets.use({model.partition("/")[0]: adapter for model in MODELS})
        self.counts = ExecutionCounts(tokenization, loop.time, seconds=0.5)
        self._targets = targets

    async def start(self) -> None:
        """Replays the spool and serves."""
        loop = self.node.loop
        lost_count = self.spool.open(metering_service_pb2.Settlement.FromString, lost)
        loop.universe.log(f"{self.node.name} replays {self.spool.backlog}, {lost_count} lost")
        reports = Reports()
        self._servicer = servicer = ExecutionServicer(
            self._targets, self.spool, reports, list, dict, self.counts, first_byte=5.0
        )
        _workers(self.node, (self.spool.run,))
        self.node.serve([Binding(servicer, execution_service_pb2.DESCRIPTOR.services_by_name["ExecutionService"])])

    async def drain(self) -> None:
        """The orderly end."""
        self.node.serving = False
        await self._servicer.wait_idle(10.0)
        await self.spool.flush(_PATIENCE)
        # As the server does when it stops: a call may have been on its way since before.
        await self._servicer.wait_idle(10.0)
        self.spool.close()

    def died(self) -> None:
        """The process is gone."""
        self.adapter.died()


class Metering:
    """A metering process."""

    def __init__(
        self,
        node: Node,
        settings: Settings,
        connection: sqlite3.Connection,
        prices: PriceBook,
        fails: float,
        on_commit: OnCommit,
    ) -> None:
        self.node = node

        def wall() -> float:
            return time.time()

        self.store = Ledger(connection, node.loop, fails, on_commit)
        leasing = Leasing(
            self.store,
            Defaults(settings.requests_per_minute, settings.concurrency),
            lease_seconds=settings.lease_seconds,
            grace_seconds=settings.grace_seconds,
            recall_factor=settings.recall_factor,
            clock=wall,
        )
        self._servicer = MeteringServicer(self.store, leasing, Prices(prices), Registry(), identity_reuse=30.0)

    async def start(self) -> None:
        """Serves."""
        _workers(self.node, (self._sweep,))
        self.node.serve([Binding(self._servicer, metering_service_pb2.DESCRIPTOR.services_by_name["MeteringService"])])

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                freed = await self.store.expire(time.time())
            except StoreUnavailable:
                continue
            if freed:
                self.node.loop.universe.log(f"{self.node.name} freed {freed} reservations")

    async def drain(self) -> None:
        """The orderly end: what is written is committed."""
        self.node.serving = False
        await asyncio.sleep(0.1)

    def died(self) -> None:
        """The process is gone."""
