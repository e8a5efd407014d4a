"""Scripted services behind real in-process channels, and a core wired to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.gateway.adapters.metering import MeteringClient
from services.gateway.cache import CacheClient, CacheWriter, HitBook
from services.gateway.calibrations import Calibrations
from services.gateway.core import Core, CoreLimits, Peers, Surroundings
from services.gateway.identities import Identities
from services.gateway.journal import Journal
from services.gateway.leases import Leases, SliceSizes
from services.gateway.operations import ReplayLimits, Requests
from services.gateway.outcomes import Outcomes
from services.gateway.owners import Owners, Passing
from services.gateway.plans import Plans
from services.gateway.principals import Principal
from services.gateway.releases import Releases
from services.gateway.replays import NoReplays
from services.runtime.call import Call, Caller, CallerKind
from services.runtime.dispatch import Binding, Table, build_table
from services.runtime.errors import Failure, Reason, unavailable
from services.runtime.inproc import InprocChannel
from services.runtime.interceptors import inner_chain
from services.runtime.metrics import Registry
from sluice.caching.v1 import caching_service_pb2
from sluice.caching.v1.caching_service_pb2_grpc import CachingServiceStub
from sluice.execution.v1 import execution_service_pb2
from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceStub
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2, price_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from sluice.routing.v1 import routing_service_pb2
from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceStub
from sluice.tokenization.v1 import tokenization_service_pb2
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import Lines

SECRET = "sk-sluice-test"
PRINCIPAL = Principal("acme", "default", "key-1", ("inference", "jobs", "usage"), (), "", None)


def price(**fields: int) -> price_pb2.Price:
    """A price; $1 per million tokens of input, $2 of output, unless said otherwise."""
    values: dict[str, Any] = {
        "input_nano_usd_per_million": 1_000_000_000,
        "output_nano_usd_per_million": 2_000_000_000,
        **fields,
    }
    return price_pb2.Price(price_version="p1", model="a/one", **values)


def candidate(model: str = "a/one", *, cost: price_pb2.Price | None = None, window: int = 0, longest: int = 0) -> Any:
    """A candidate; free unless a price is given."""
    return routing_service_pb2.Candidate(
        model=model,
        provider=model.partition("/")[0],
        upstream_model=model.partition("/")[2],
        price=cost if cost is not None else price_pb2.Price(price_version="free", model=model),
        context_window=window,
        max_output_tokens=longest,
        total_score=0.5,
        scores={"cost": 0.5},
        reason="ranked",
    )


def conversation(text: str = "hello", **fields: Any) -> conversation_pb2.Conversation:
    """One user turn."""
    return conversation_pb2.Conversation(
        messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])], **fields
    )


def generate(text: str = "hello", *, conversation_fields: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    """A request."""
    return inference_service_pb2.GenerateRequest(conversation=conversation(text, **(conversation_fields or {})), **fields)


def answer(text: str = "hi", *, model: str = "a/one", inputs: int = 10, outputs: int = 5, finish: int = 1) -> answer_pb2.Answer:
    """A finished answer."""
    return answer_pb2.Answer(
        message=conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[conversation_pb2.Part(text=text)]),
        finish_reason=answer_pb2.FinishReason.ValueType(finish),
        usage=answer_pb2.Usage(input_token_count=inputs, output_token_count=outputs, source=answer_pb2.USAGE_SOURCE_REPORTED),
        model=model,
    )


class Script:
    """What every fake has: what it was asked, failures to raise, a time to wait, a gate to wait at."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Call]] = []
        self.failures: dict[str, Failure] = {}
        self.delays: dict[str, float] = {}
        self.gate: asyncio.Event | None = None
        self.cancelled_count = 0

    def asked(self, name: str) -> list[Any]:
        """The requests of a method."""
        return [request for method, request, _ in self.calls if method == name]

    async def act(self, name: str, request: Any, call: Call) -> None:
        """Records the call and does what the script says."""
        self.calls.append((name, request, call))
        try:
            if self.gate is not None:
                await self.gate.wait()
            delay = self.delays.get(name)
            if delay is not None:
                await asyncio.sleep(delay)
        except asyncio.CancelledError:
            self.cancelled_count += 1
            raise
        failure = self.failures.get(name)
        if failure is not None:
            raise failure


class FakeMetering(Script):
    """A book with one budget and one key."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = metering_service_pb2.Identity(
            tenant_id="acme", project_id="default", key_id="key-1", scopes=["inference", "jobs", "usage"]
        )
        self.valid = True
        self.requests = 1000
        self.tokens = 10_000_000
        self.concurrency = 50
        self.budget: int | None = None
        """What is left of the budget; None: no budget."""
        self.lease_seconds = 60.0
        self.leases_money = True
        self.model_requests: dict[str, int] = {}
        """What is left of the limits of models."""
        self.retry_delay = 7.0
        self.lease_count = 0
        self.grants: dict[int, metering_service_pb2.AcquireLeaseResponse] = {}

    async def Authenticate(self, request: Any, call: Call) -> Any:
        await self.act("Authenticate", request, call)
        if not self.valid:
            raise Failure(Reason.KEY_INVALID, "the key is not valid")
        return metering_service_pb2.AuthenticateResponse(identity=self.identity, reuse_duration=Duration(seconds=30))

    async def AcquireLease(self, request: Any, call: Call) -> Any:
        await self.act("AcquireLease", request, call)
        known = self.grants.get(request.sequence)
        if known is not None:
            return known
        lease_id = request.lease_id
        if not lease_id:
            self.lease_count += 1
            lease_id = f"lease-{self.lease_count}"
        if request.model:
            granted = min(self.model_requests[request.model], request.wanted_request_count)
            self.model_requests[request.model] -= granted
            grant = metering_service_pb2.AcquireLeaseResponse(
                lease_id=lease_id,
                granted_request_count=granted,
                granted_token_count=-1,
                granted_concurrency=-1,
                granted_nano_usd=-1,
                limits=[
                    metering_service_pb2.LimitStatus(
                        level="model", kind=metering_service_pb2.LIMIT_KIND_REQUESTS_PER_MINUTE, limit=60, remaining=0
                    )
                ],
                retry_delay=None if granted else Duration(seconds=int(self.retry_delay)),
            )
            self.grants[request.sequence] = grant
            return grant
        money = -1
        limits = []
        if self.budget is not None:
            money = min(self.budget, request.wanted_nano_usd) if self.leases_money else 0
            self.budget -= money
            limits.append(
                metering_service_pb2.LimitStatus(
                    level="tenant", kind=metering_service_pb2.LIMIT_KIND_BUDGET, limit=10**9, remaining=self.budget
                )
            )
            if not self.leases_money:
                lease_id = ""
        requests = min(self.requests, request.wanted_request_count)
        self.requests -= requests
        tokens = min(self.tokens, request.wanted_token_count)
        self.tokens -= tokens
        limits.append(
            metering_service_pb2.LimitStatus(
                level="key", kind=metering_service_pb2.LIMIT_KIND_REQUESTS_PER_MINUTE, limit=120, remaining=self.requests
            )
        )
        grant = metering_service_pb2.AcquireLeaseResponse(
            lease_id=lease_id,
            expire_time=Timestamp(nanos=0, seconds=0),
            granted_request_count=requests,
            granted_token_count=tokens,
            granted_concurrency=min(self.concurrency, request.wanted_concurrency),
            granted_nano_usd=money,
            limits=limits,
            retry_delay=Duration(seconds=int(self.retry_delay)),
        )
        grant.expire_time.FromNanoseconds(int((time.time() + self.lease_seconds) * 1e9))
        self.grants[request.sequence] = grant
        return grant

    async def EndReservations(self, request: Any, call: Call) -> Any:
        await self.act("EndReservations", request, call)
        return metering_service_pb2.EndReservationsResponse()

    async def ReturnLease(self, request: Any, call: Call) -> Any:
        await self.act("ReturnLease", request, call)
        return metering_service_pb2.ReturnLeaseResponse()

    async def Hold(self, request: Any, call: Call) -> Any:
        await self.act("Hold", request, call)
        assert self.budget is not None
        amount = request.amount_nano_usd
        if self.budget < amount:
            least = request.min_amount_nano_usd
            if not least or self.budget < least:
                raise Failure(Reason.BUDGET_EXHAUSTED, "the budget is used up", metadata={"level": "tenant"})
            amount = self.budget
        before = self.budget
        self.budget -= amount
        return metering_service_pb2.HoldResponse(
            hold_id=f"hold-{request.operation_id}", amount_nano_usd=amount, budget_before_nano_usd=before, budget_level="tenant"
        )

    async def VoidHold(self, request: Any, call: Call) -> Any:
        await self.act("VoidHold", request, call)
        return metering_service_pb2.VoidHoldResponse(state=metering_service_pb2.HOLD_STATE_VOIDED)

    async def PostSettlements(self, request: Any, call: Call) -> Any:
        await self.act("PostSettlements", request, call)
        return metering_service_pb2.PostSettlementsResponse(
            results=[
                metering_service_pb2.SettlementResult(
                    attempt_id=settlement.attempt_id, state=metering_service_pb2.SETTLEMENT_STATE_POSTED
                )
                for settlement in request.settlements
            ]
        )


class FakeRouting(Script):
    """Gives one plan."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = routing_service_pb2.PlanResponse(
            candidates=[candidate()],
            policy="default",
            policy_version="v1",
            task_type=receipt_pb2.TASK_TYPE_SIMPLE,
            task_type_source=receipt_pb2.TASK_TYPE_SOURCE_CLASSIFIER,
            reuse_duration=Duration(seconds=5),
        )
        self.exact_plan: routing_service_pb2.PlanResponse | None = None
        """For a bound that is no power of two."""
        self.models: list[inference_service_pb2.Model] = []

    async def Plan(self, request: Any, call: Call) -> Any:
        await self.act("Plan", request, call)
        bound = request.input_token_bound
        if self.exact_plan is not None and bound & (bound - 1):
            return self.exact_plan
        return self.plan

    async def ListModels(self, request: Any, call: Call) -> Any:
        await self.act("ListModels", request, call)
        return routing_service_pb2.ListModelsResponse(models=self.models)

    async def ReportExecution(self, request: Any, call: Call) -> Any:
        return routing_service_pb2.ReportExecutionResponse()


class FakeCaching(Script):
    """Misses unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.hit: caching_service_pb2.LookupResponse | None = None
        self.stored = caching_service_pb2.StoreResult(stored_exact=True)

    async def Lookup(self, request: Any, call: Call) -> Any:
        await self.act("Lookup", request, call)
        if self.hit is not None:
            return self.hit
        return caching_service_pb2.LookupResponse(
            verdict=receipt_pb2.CacheVerdict(status=receipt_pb2.CACHE_STATUS_MISS), ticket=b"ticket"
        )

    async def Store(self, request: Any, call: Call) -> Any:
        raise AssertionError("the gateway stores in batches")

    async def BatchStore(self, request: Any, call: Call) -> Any:
        await self.act("BatchStore", request, call)
        return caching_service_pb2.BatchStoreResponse(results=[self.stored] * len(request.requests))

    async def Purge(self, request: Any, call: Call) -> Any:
        return caching_service_pb2.PurgeResponse()

    async def GetStats(self, request: Any, call: Call) -> Any:
        return caching_service_pb2.GetStatsResponse()


class FakeExecution(Script):
    """Answers what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = answer()
        self.cost = 0
        self.pieces: list[Any] = ["h", "i"]
        self.is_wire = False
        self.piece_gate: asyncio.Event | None = None
        """Waited for before every piece but the first."""
        self.closed_count = 0

    async def Complete(self, request: Any, call: Call) -> Any:
        await self.act("Complete", request, call)
        return execution_service_pb2.CompleteResponse(
            answer=self.answer,
            attempts=[receipt_pb2.Attempt(attempt_id=f"{request.operation_id}/1", model="a/one", provider="a")],
            attempt_count=1,
            cost_nano_usd=self.cost,
            price_version="p1",
        )

    async def StreamComplete(self, request: Any, call: Call) -> AsyncIterator[Any]:
        await self.act("StreamComplete", request, call)
        try:
            yield execution_service_pb2.StreamCompleteResponse(
                opened=execution_service_pb2.CompletionOpened(
                    attempt_id=f"{request.operation_id}/1", model="a/one", is_wire=self.is_wire and bool(request.accepted_wire)
                )
            )
            for index, piece in enumerate(self.pieces):
                if index and self.piece_gate is not None:
                    await self.piece_gate.wait()
                if isinstance(piece, Failure):
                    raise piece
                if self.is_wire and request.accepted_wire:
                    yield execution_service_pb2.StreamCompleteResponse(wire=piece)
                else:
                    text = piece if isinstance(piece, str) else piece.decode()
                    yield execution_service_pb2.StreamCompleteResponse(
                        deltas=execution_service_pb2.DeltaBatch(deltas=[answer_pb2.Delta(text=text)])
                    )
            yield execution_service_pb2.StreamCompleteResponse(
                finished=execution_service_pb2.CompletionFinished(
                    answer=self.answer, cost_nano_usd=self.cost, price_version="p1"
                )
            )
        finally:
            self.closed_count += 1

    async def Embed(self, request: Any, call: Call) -> Any:
        await self.act("Embed", request, call)
        return execution_service_pb2.EmbedResponse(
            embeddings=[inference_service_pb2.Embedding(values=[1.0, 2.0]) for _ in request.inputs],
            usage=answer_pb2.Usage(input_token_count=7),
            cost_nano_usd=self.cost,
            model="a/one",
        )

    async def ListProviders(self, request: Any, call: Call) -> Any:
        return execution_service_pb2.ListProvidersResponse()


class FakeTokenization(Script):
    """Counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 10
        self.error_bound = 0.0
        self.method = receipt_pb2.TOKEN_COUNT_METHOD_EXACT
        self.tokenizer = "fake@1"

    async def Count(self, request: Any, call: Call) -> Any:
        await self.act("Count", request, call)
        return tokenization_service_pb2.CountResponse(
            counts=[
                receipt_pb2.TokenCount(
                    token_count=self.count,
                    method=self.method,
                    tokenizer=self.tokenizer,
                    error_bound=self.error_bound,
                )
                for _ in request.models
            ]
        )

    async def CountTexts(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.CountTextsResponse()

    async def Fit(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.FitResponse()

    async def Calibrate(self, request: Any, call: Call) -> Any:
        await self.act("Calibrate", request, call)
        return tokenization_service_pb2.CalibrateResponse()

    async def ListTokenizers(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.ListTokenizersResponse()


@dataclass
class World:
    """A core and everything around it. Make it inside a running loop."""

    metering: FakeMetering = field(default_factory=FakeMetering)
    routing: FakeRouting = field(default_factory=FakeRouting)
    caching: FakeCaching = field(default_factory=FakeCaching)
    execution: FakeExecution = field(default_factory=FakeExecution)
    tokenization: FakeTokenization = field(default_factory=FakeTokenization)
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    nano_usd: int = 1_000_000
    request_slice: int = 32
    uncounted_bytes: int = 8192
    linger: float = 0.0
    gateways: Any = None
    replays: Any = field(default_factory=NoReplays)
    replica_id: str = "gateway-test"
    replay: ReplayLimits = field(default_factory=lambda: ReplayLimits(100, 1_000_000, 3600.0))

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.registry = Registry()
        channel: Any = InprocChannel(self.table, Caller(CallerKind.SERVICE, "gateway"))
        clock = self.loop.time
        self.metering_channel = channel
        metering_stub: Any = MeteringServiceStub(channel)
        caching_stub: Any = CachingServiceStub(channel)
        routing_stub: Any = RoutingServiceStub(channel)
        execution_stub: Any = ExecutionServiceStub(channel)
        self.tokenization_stub: Any = TokenizationServiceStub(channel)
        self.port = MeteringClient(metering_stub, "gateway-test")
        self.releases = Releases(self.port, max_count=10, call_seconds=0.2)
        sizes = SliceSizes(self.request_slice, 100_000, 50, self.nano_usd)
        self.leases = Leases(self.port, self.releases, clock, sizes, call_seconds=0.2)
        self.identities = Identities(
            self.port, self.leases, clock, time.time, recheck_seconds=30.0, call_seconds=0.2, max_count=100
        )
        self.plans = Plans(routing_stub.Plan, clock, call_seconds=0.2, max_count=100)
        self.caching_stub = caching_stub
        self.writer = CacheWriter(caching_stub, max_count=10, max_bytes=100_000, call_seconds=0.2)
        self.hits = HitBook(metering_stub, max_count=100, batch_seconds=0.01, call_seconds=0.2)
        self.requests: Any = Requests(self.replay, clock)
        self.outcomes = Outcomes(100)
        self.calibrations = Calibrations(
            self.tokenization_stub, sample_count=3, sample_seconds=0.01, max_count=10, max_bytes=10_000, call_seconds=0.2
        )
        self.passing = Passing(Owners(self.gateways, self.replica_id), clock)
        self.around = Surroundings(
            metering=self.port,
            identities=self.identities,
            leases=self.leases,
            plans=self.plans,
            cache=CacheClient(caching_stub, clock, lookup_seconds=0.1),
            writer=self.writer,
            hits=self.hits,
            releases=self.releases,
            requests=self.requests,
            replays=self.replays,
            passing=self.passing,
            outcomes=self.outcomes,
            calibrations=self.calibrations,
            journal=Journal(self.registry, self._take_line),
        )
        self.core = Core(
            Peers(routing=routing_stub, execution=execution_stub, tokenization=self.tokenization_stub),
            self.around,
            CoreLimits(
                max_request_bytes=1_000_000,
                default_max_output_tokens=4096,
                min_output_tokens=16,
                authenticate=0.2,
                linger=self.linger,
                lease=0.2,
                plan=0.2,
                count=0.1,
                uncounted_bytes=self.uncounted_bytes,
            ),
            clock,
        )

    def table(self) -> Table:
        """The methods of all fakes."""
        services = [
            (self.metering, metering_service_pb2.DESCRIPTOR, "MeteringService"),
            (self.routing, routing_service_pb2.DESCRIPTOR, "RoutingService"),
            (self.caching, caching_service_pb2.DESCRIPTOR, "CachingService"),
            (self.execution, execution_service_pb2.DESCRIPTOR, "ExecutionService"),
            (self.tokenization, tokenization_service_pb2.DESCRIPTOR, "TokenizationService"),
        ]
        return build_table(
            [Binding(servicer, descriptor.services_by_name[name]) for servicer, descriptor, name in services],
            inner_chain(log=Lines(), registry=Registry(), slow_seconds=60.0),
        )

    def soon(self, seconds: float = 5.0) -> float:
        """A deadline."""
        return self.loop.time() + seconds

    def _take_line(self, values: Mapping[str, Any], *, is_plain: bool = False) -> None:
        self.lines.append(values)

    async def generate(self, request: Any = None, *, principal: Principal = PRINCIPAL, seconds: float = 5.0) -> Any:
        """One answer."""
        return await self.core.generate(principal, request if request is not None else generate(), deadline=self.soon(seconds))

    async def stream(self, request: Any = None, *, wire: int = 0, seconds: float = 5.0) -> list[Any]:
        """All events of one stream."""
        events = self.core.stream(
            PRINCIPAL, request if request is not None else generate(), accepted_wire=wire, deadline=self.soon(seconds)
        )
        return [event async for event in events]


def down(service: str) -> Failure:
    """What a channel raises when a service isn't there."""
    return unavailable(service, f"{service} can't be reached")
