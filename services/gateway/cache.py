"""What the gateway does with the cache: look up before the plan, store behind the answer, book what hits saved.

Stores and settlements of hits leave the path: they wait in bounded queues for a worker. A full queue drops and counts; a lost store
costs hit rate, a lost hit settlement a line in the usage report, neither costs money.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from services.gateway.breakers import Breaker
from services.gateway.principals import Principal
from services.gateway.receipts import Facts
from services.runtime.call import Metadata
from services.runtime.errors import Failure
from sluice.caching.v1 import caching_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2

if TYPE_CHECKING:
    from sluice.caching.v1.caching_service_pb2_grpc import CachingServiceAsyncStub
    from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceAsyncStub

HITS: Final = frozenset((receipt_pb2.CACHE_STATUS_HIT_EXACT, receipt_pb2.CACHE_STATUS_HIT_SEMANTIC))
_MAX_BATCH: Final = 500
_MOST_STORES: Final = 100
"""Of one call; the contract's bound."""
_MOST_BATCH_BYTES: Final = 512 * 1024
"""Of the answers of one call, unless there is but one."""
_COMPLETE: Final = frozenset((answer_pb2.FINISH_REASON_STOP, answer_pb2.FINISH_REASON_TOOL_CALLS))


class CacheClient:
    """Asks the cache within a budget, and stops asking for a while when it doesn't answer. `clock` is the loop's."""

    def __init__(self, stub: CachingServiceAsyncStub, clock: Callable[[], float], *, lookup_seconds: float) -> None:
        self._lookup = stub.Lookup
        self._clock = clock
        self._lookup_seconds = lookup_seconds
        self._breaker = Breaker()

    async def look_up(self, facts: Facts, policy_version: str, time_left: float, forward: Metadata) -> bool:
        """Whether the cache answers; the verdict is in `facts` either way, and the answer if there is one. Raises nothing: without the
        cache the request goes on.
        """
        breaker = self._breaker
        if breaker.failure_count and not breaker.allows(self._clock()):
            facts.cache_status = receipt_pb2.CACHE_STATUS_UNAVAILABLE
            facts.cache_reason = "the cache didn't answer lately and is not asked for a moment"
            facts.degrade("caching: not asked, it didn't answer lately")
            return False
        began = monotonic_ns()
        try:
            found = await self._lookup(
                lookup_to_proto(facts.principal, facts.request, policy_version),
                timeout=min(self._lookup_seconds, time_left),
                metadata=forward,
            )
        except Failure as failure:
            facts.lookup_ns = monotonic_ns() - began
            breaker.failed(self._clock())
            facts.cache_status = receipt_pb2.CACHE_STATUS_UNAVAILABLE
            facts.cache_reason = f"the cache could not be asked: {failure.reason.value}"
            facts.degrade(f"caching: not asked, {failure.reason.value}")
            return False
        facts.lookup_ns = monotonic_ns() - began
        if breaker.failure_count:
            breaker.succeeded()
        facts.lookup = found
        status: int = found.verdict.status
        facts.cache_status = status if status <= receipt_pb2.CACHE_STATUS_UNAVAILABLE else receipt_pb2.CACHE_STATUS_UNSPECIFIED
        if status not in HITS or not found.HasField("answer"):
            return False
        cached = found.answer
        facts.is_hit = True
        facts.answer = cached.answer
        facts.saved = cached.cost_nano_usd
        return True


def lookup_to_proto(
    principal: Principal, request: inference_service_pb2.GenerateRequest, policy_version: str
) -> caching_service_pb2.LookupRequest:
    """The lookup of a request."""
    # Field by field: the constructor takes half as long again.
    lookup = caching_service_pb2.LookupRequest()
    lookup.tenant_id = principal.tenant_id
    lookup.conversation.CopyFrom(request.conversation)
    lookup.policy_version = policy_version
    lookup.task_type = request.task_type
    if request.HasField("cache"):
        lookup.wishes.CopyFrom(request.cache)
    if principal.cache_namespace and not lookup.wishes.cache_namespace:
        lookup.wishes.cache_namespace = principal.cache_namespace
    # The scope: wishes that may change which model answers, and directives to the echo provider, in canonical form.
    scope = []
    if request.HasField("routing"):
        routing = request.routing
        model = routing.model
        if model != "auto":
            lookup.model = model
        region = routing.region
        if region:
            scope.append(f"region={region}")
        if routing.HasField("allow_fallback"):
            scope.append(f"allow_fallback={routing.allow_fallback}")
        if routing.HasField("max_cost_nano_usd"):
            scope.append(f"max_cost={routing.max_cost_nano_usd}")
        if routing.HasField("max_latency"):
            scope.append(f"max_latency={routing.max_latency.ToMilliseconds()}")
    if principal.allowed_models:
        # A key must not get from the cache what it may not get from a model.
        scope.append("allowed=" + ",".join(principal.allowed_models))
    metadata = request.metadata
    if metadata:
        scope.extend([f"{key}={metadata[key]}" for key in sorted(metadata) if key.startswith("echo.")])
    if scope:
        lookup.routing_scope = "\n".join(scope)
    return lookup


def may_store(facts: Facts, answer: answer_pb2.Answer) -> bool:
    """Whether an answer is complete, unfiltered, wanted in the cache, and by the model that such requests are meant for.

    One that was cut at a length is what was asked for only where the caller named the length and we didn't shorten it. That of a fallback
    serves once: an hour's outage must not become the answer of the next.
    """
    lookup, plan = facts.lookup, facts.plan
    if lookup is None or plan is None or not lookup.ticket or not answer.message.parts:
        return False
    if answer.model != plan.meant:
        return False
    finish = answer.finish_reason
    if finish == answer_pb2.FINISH_REASON_LENGTH:
        return facts.max_output == 0 and facts.request.conversation.max_output_tokens > 0
    return finish in _COMPLETE


_Waiting = tuple[str, bytes, answer_pb2.Answer, int, str, int, timedelta | None, int]
"""Tenant, ticket, answer, its cost, operation, time of arrival (Unix ns), time to live, bytes of the answer."""


class CacheWriter:
    """Stores answers behind the path."""

    def __init__(self, stub: CachingServiceAsyncStub, *, max_count: int, max_bytes: int, call_seconds: float) -> None:
        self._store = stub.BatchStore
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._call_seconds = call_seconds
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self.dropped_count = 0
        self.failed_count = 0

    def add(self, facts: Facts, answer: answer_pb2.Answer) -> None:
        """Queues an answer; drops it when the queue is full."""
        size = answer.ByteSize()
        if len(self._queue) >= self._max_count or self._bytes + size > self._max_bytes:
            self.dropped_count += 1
            return
        lookup = facts.lookup
        assert lookup is not None, "an answer is stored under the ticket of its lookup"
        request = facts.request
        ttl = None
        if request.HasField("cache") and request.cache.HasField("ttl"):
            ttl = request.cache.ttl.ToTimedelta()
        # Only what is stored: the facts would keep the whole request until then. The message is made by the worker, which makes many in
        # a row; here it would cost twice as much.
        self._queue.append(
            (facts.principal.tenant_id, lookup.ticket, answer, facts.cost, facts.operation_id, facts.receive_ns, ttl, size)
        )
        self._bytes += size
        self._work.set()

    async def write_forever(self) -> None:
        """The worker."""
        while True:
            await self._work.wait()
            self._work.clear()
            await self.flush()

    async def flush(self) -> None:
        """Stores what is queued."""
        while self._queue:
            batch = self._batch()
            try:
                response = await self._store(batch, timeout=self._call_seconds)
            except Failure:
                self.failed_count += len(batch.requests)
            else:
                for result in response.results:
                    if result.HasField("status"):
                        self.failed_count += 1

    def _batch(self) -> caching_service_pb2.BatchStoreRequest:
        """Some of what is queued, which is not empty."""
        queue = self._queue
        batch = caching_service_pb2.BatchStoreRequest()
        add = batch.requests.add
        total = count = 0
        # A large answer goes alone, so that it takes no other with it should it be too large for a message.
        while queue and count < _MOST_STORES and (not count or total + queue[0][-1] <= _MOST_BATCH_BYTES):
            tenant_id, ticket, answer, cost, operation_id, receive_ns, ttl, size = queue.popleft()
            count += 1
            total += size
            # Field by field, where it stands: the constructor takes half as long again.
            store = add()
            store.tenant_id = tenant_id
            store.ticket = ticket
            cached = store.answer
            cached.answer.CopyFrom(answer)
            cached.cost_nano_usd = cost
            cached.operation_id = operation_id
            moment = cached.create_time
            moment.seconds, moment.nanos = divmod(receive_ns, 1_000_000_000)
            if ttl is not None:
                store.ttl.FromTimedelta(ttl)
        self._bytes -= total
        return batch


class HitBook:
    """Books answers from the cache: one settlement without a charge for each, posted in batches."""

    def __init__(self, stub: MeteringServiceAsyncStub, *, max_count: int, batch_seconds: float, call_seconds: float) -> None:
        self._post = stub.PostSettlements
        self._max_count = max_count
        self._batch_seconds = batch_seconds
        self._call_seconds = call_seconds
        self._hits: list[Facts] = []
        self._batches: deque[metering_service_pb2.PostSettlementsRequest] = deque()
        self._count = 0
        """Settlements in the batches."""
        self._work = asyncio.Event()
        self.dropped_count = 0

    def add(self, facts: Facts) -> None:
        """Queues a hit; when too many wait the oldest are dropped."""
        if not self._hits:
            self._work.set()
        self._hits.append(facts)
        if len(self._hits) >= _MAX_BATCH:
            self._write_up()

    async def post_forever(self) -> None:
        """The worker: posts every `batch_seconds` while there is something, waits longer while metering is down."""
        delay = self._batch_seconds
        while True:
            await self._work.wait()
            await asyncio.sleep(delay)
            self._work.clear()
            try:
                await self.flush()
            except Failure:
                delay = min(5.0, delay * 2)
                self._work.set()
            else:
                delay = self._batch_seconds

    async def flush(self) -> None:
        """Posts what is queued. Failure when metering doesn't take it; it stays queued."""
        self._write_up()
        batches = self._batches
        while batches:
            batch = batches.popleft()
            count = len(batch.settlements)
            self._count -= count
            try:
                await self._post(batch, timeout=self._call_seconds)
            except BaseException:
                # Posting twice is harmless, losing isn't: whatever ended the call, the batch waits for the next.
                batches.appendleft(batch)
                self._count += count
                raise

    def _write_up(self) -> None:
        """Turns hits, of which there are at most `_MAX_BATCH`, into settlements, so that requests and answers needn't be kept while
        metering is away.
        """
        hits, self._hits = self._hits, []
        if hits:
            batch = metering_service_pb2.PostSettlementsRequest()
            # Filled where it stands: appending a settlement copies it.
            add = batch.settlements.add
            for facts in hits:
                fill_settlement(add(), facts)
            self._batches.append(batch)
            self._count += len(hits)
        while self._count > self._max_count:
            oldest = self._batches.popleft()
            size = len(oldest.settlements)
            excess = min(self._count - self._max_count, size)
            if excess < size:
                # A new message: the old one may have been handed to a call already.
                self._batches.appendleft(metering_service_pb2.PostSettlementsRequest(settlements=oldest.settlements[excess:]))
            self._count -= excess
            self.dropped_count += excess


def fill_settlement(settlement: metering_service_pb2.Settlement, facts: Facts) -> None:
    """Fills the settlement of an answer from the cache."""
    principal = facts.principal
    lookup = facts.lookup
    assert lookup is not None, "a hit has a lookup"
    answer = lookup.answer.answer
    # Field by field: the constructor takes twice as long, and every hit makes one.
    settlement.attempt_id = f"{facts.operation_id}/cache"
    settlement.operation_id = facts.operation_id
    settlement.tenant_id = principal.tenant_id
    settlement.project_id = principal.project_id
    settlement.key_id = principal.key_id
    settlement.is_final = True
    settlement.model = answer.model
    settlement.provider = "cache"
    settlement.usage.CopyFrom(answer.usage)
    moment = settlement.start_time
    moment.seconds, moment.nanos = divmod(facts.receive_ns, 1_000_000_000)
    span = settlement.duration
    span.seconds, span.nanos = divmod(max(0, facts.end_ns - facts.start), 1_000_000_000)
    settlement.outcome = receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED
    settlement.task_type = facts.request.task_type
    settlement.saved_nano_usd = facts.saved
    settlement.cache_status = receipt_pb2.CacheStatus.ValueType(facts.cache_status)
    settlement.attempt_number = 1
