"""The core of the gateway: one order of calls for every spelling of the public API.

The HTTP edge and the gRPC servicer both use `Core` and nothing behind it. Errors are raised as `services.runtime.errors.Failure`.

On the hot path nothing is awaited that needn't be: identity, limits, money and plan come from what was leased or learned before, and
what can be done after the answer is queued for workers. Requests with a request id take one more step, in which several callers share
one operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from services.gateway import validation
from services.gateway.cache import CacheClient, CacheWriter, HitBook, may_store
from services.gateway.calibrations import Calibrations
from services.gateway.counts import Counts
from services.gateway.estimates import byte_bound, estimated_count, estimated_tokens
from services.gateway.events import Opened, StreamEvent
from services.gateway.executions import deltas_of, embed_to_proto, fill_request, settled_cost
from services.gateway.features import signals
from services.gateway.holds import Prompt, Reckoning, clamp, reckon, worst_cost
from services.gateway.identities import Identities
from services.gateway.journal import Journal
from services.gateway.leases import Leases, Standing, lease_name
from services.gateway.needs import find_needs
from services.gateway.operations import OperationIds, Requests
from services.gateway.outcomes import Outcomes, Report
from services.gateway.owners import Passing
from services.gateway.plans import Plan, PlanFields, PlanKey, PlannedCandidate, Plans, round_up
from services.gateway.ports import OUTAGES, Metering
from services.gateway.principals import Principal
from services.gateway.receipts import Completion, Facts, receipt_to_proto
from services.gateway.refusals import budget_exhausted, context_window_exceeded, cost_limit, no_candidate
from services.gateway.releases import Releases
from services.gateway.replays import Answered, Replays
from services.gateway.sharing import Sharing
from services.gateway.validation import Shape
from services.runtime.call import Call, Metadata
from services.runtime.errors import Failure, Reason, deadline_exceeded, invalid, unavailable
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2
from sluice.routing.v1 import routing_service_pb2

if TYPE_CHECKING:
    from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceAsyncStub
    from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceAsyncStub
    from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceAsyncStub

__all__ = ["Completion", "Core", "CoreLimits", "Peers", "Principal", "Surroundings"]

_VERSION_RETRY_SECONDS: Final = 1.0
_LIMITED: Final = frozenset((Reason.RATE_LIMITED, Reason.CONCURRENCY_LIMITED))


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """Bounds and time budgets (seconds) of one request."""

    max_request_bytes: int
    default_max_output_tokens: int
    min_output_tokens: int
    authenticate: float
    lease: float
    plan: float
    count: float
    uncounted_bytes: int
    """Largest prompt that is sent uncounted where nothing depends on its count."""
    linger: float
    """Seconds that a request with a request id goes on when nobody waits for it any more."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The services that the core calls itself."""

    routing: RoutingServiceAsyncStub
    execution: ExecutionServiceAsyncStub
    tokenization: TokenizationServiceAsyncStub


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the core works with; made in `app`."""

    metering: Metering
    identities: Identities
    leases: Leases
    plans: Plans
    cache: CacheClient
    writer: CacheWriter
    hits: HitBook
    releases: Releases
    requests: Requests[Answered]
    replays: Replays
    passing: Passing
    outcomes: Outcomes
    calibrations: Calibrations
    journal: Journal


class _Short(NamedTuple):
    """A hold for which a lease has too little."""

    prompt: Prompt
    reckoning: Reckoning
    wanted: int
    """The worst case, or less where the caller set a limit."""


class Core:
    """The order of calls. Deadlines are moments of `clock`, which is the running loop's."""

    def __init__(self, peers: Peers, around: Surroundings, limits: CoreLimits, clock: Callable[[], float]) -> None:
        self._peers = peers
        self._complete = peers.execution.Complete
        self._stream_complete = peers.execution.StreamComplete
        self._counts = Counts(peers.tokenization, clock, call_seconds=limits.count, uncounted_bytes=limits.uncounted_bytes)
        self._around = around
        self._leases = around.leases
        self._plans = around.plans
        self._cache = around.cache
        self._journal = around.journal
        self._sharing = Sharing(around.requests, around.replays, limits.linger)
        self._passing = around.passing
        self._limits = limits
        self._clock = clock
        self._ids = OperationIds()
        self._under_way = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # Who calls

    def known(self, secret: str) -> Principal | None:
        """The principal of a key that was checked lately; None: ask `authenticate`. Hot path, no waiting."""
        return self._around.identities.known(secret)

    def known_digest(self, digest: bytes) -> Principal | None:
        """As `known`, by what `identities.digest_of` makes of the key."""
        return self._around.identities.known_digest(digest)

    async def authenticate(self, secret: str | None) -> Principal:
        """The principal of a key. Failure KEY_MISSING, KEY_INVALID, DEPENDENCY_UNAVAILABLE."""
        return await self._around.identities.authenticate(secret, self._limits.authenticate)

    # Answers

    def generate(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        *,
        deadline: float,
        forward: Metadata = (),
        passed_on: Call | None = None,
    ) -> Coroutine[Any, Any, Completion]:
        """Answers a conversation. Failure with any reason that the contract of Generate allows.

        `passed_on`: the call of another gateway, which takes this one for the owner of the request id.
        """
        if not request.request_id:
            return self._generate(principal, request, deadline, forward)
        return self._joined(principal, request, deadline, forward, passed_on)

    async def _joined(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        deadline: float,
        forward: Metadata,
        passed_on: Call | None,
    ) -> Completion:
        self._check_id(principal, request.request_id)
        scope = _scope(principal)
        if passed_on is None:
            with self._entered():
                passed = await self._passing.generate(scope, principal, request, deadline, forward)
            if passed is not None:
                return passed
        result = await self._sharing.run(
            scope,
            request.request_id,
            request,
            "generate",
            lambda key: self._generate(principal, request, deadline, forward, key),
            deadline,
            _loss_of(passed_on),
        )
        assert isinstance(result, Completion), "the fingerprint tells embeddings from answers"
        return result

    def stream(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        *,
        accepted_wire: int,
        deadline: float,
        forward: Metadata = (),
        passed_on: Call | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Answers a conversation piece by piece: first Opened, then bytes (only with `is_wire`) or DeltaBatch, last Completion.

        Closing the iterator (`aclose`) cancels the operation, unless others have joined it. `passed_on` as in `generate`.
        """
        if not request.request_id:
            return self._stream(principal, request, accepted_wire, deadline, forward)
        return self._joined_stream(principal, request, accepted_wire, deadline, forward, passed_on)

    async def embed(
        self,
        principal: Principal,
        request: inference_service_pb2.EmbedRequest,
        *,
        deadline: float,
        forward: Metadata = (),
        passed_on: Call | None = None,
    ) -> inference_service_pb2.EmbedResponse:
        """Turns texts into vectors. `passed_on` as in `generate`."""
        if not request.request_id:
            return await self._embed(principal, request, deadline, forward)
        self._check_id(principal, request.request_id)
        scope = _scope(principal)
        if passed_on is None:
            with self._entered():
                passed = await self._passing.embed(scope, principal, request, deadline, forward)
            if passed is not None:
                return passed
        result = await self._sharing.run(
            scope,
            request.request_id,
            request,
            "embed",
            lambda key: self._embed(principal, request, deadline, forward, key),
            deadline,
            _loss_of(passed_on),
        )
        assert isinstance(result, inference_service_pb2.EmbedResponse), "the fingerprint tells embeddings from answers"
        return result

    # What is free

    async def count_tokens(
        self,
        principal: Principal,
        request: inference_service_pb2.CountTokensRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.CountTokensResponse:
        """Counts a prompt for one model. Failure MODEL_NOT_FOUND; a model that can't be reached is counted all the same."""
        self._require(principal, "inference")
        validation.check_model(request.model, "model")
        if not request.HasField("conversation"):
            raise invalid("conversation", "is required")
        shape = validation.check_conversation(request.conversation, self._limits.max_request_bytes)
        key = PlanKey(
            principal.tenant_id, request.model, receipt_pb2.TASK_TYPE_SIMPLE, (), "", None, principal.allowed_models,
            False, 0, 0, 1, 0, 0, 0, -1,
        )  # fmt: skip
        plan, _ = await self._plans.fetch(key, self._left(deadline, self._limits.plan, "routing"), forward)
        models = [candidate.model for candidate in plan.candidates]
        model = request.model if request.model in models or not models else models[0]
        count = await self._counts.count(None, model, request.conversation, shape, deadline, forward)
        return inference_service_pb2.CountTokensResponse(input_count=count)

    async def list_models(
        self,
        principal: Principal,
        request: inference_service_pb2.ListModelsRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.ListModelsResponse:
        """Lists what the key may use."""
        validation.check_page(request.page_size, request.page_token)
        response = await self._peers.routing.ListModels(
            routing_service_pb2.ListModelsRequest(
                page_size=request.page_size, page_token=request.page_token, allowed_models=principal.allowed_models
            ),
            timeout=self._left(deadline, self._limits.plan, "routing"),
            metadata=forward,
        )
        return inference_service_pb2.ListModelsResponse(models=response.models, next_page_token=response.next_page_token)

    async def explain(
        self,
        principal: Principal,
        request: inference_service_pb2.ExplainRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.ExplainResponse:
        """Says what `generate` would do: plan, count, hold, cache verdict. Takes nothing from any limit and stores nothing."""
        self._require(principal, "inference")
        wanted = request.request
        facts = self._facts(principal, wanted, "explain")
        facts.shape = shape = validation.check_generate(wanted, self._limits.max_request_bytes)
        await self._plan(facts, shape, deadline, forward, streaming=False)
        version = facts.plan.response.policy_version if facts.plan is not None else ""
        await self._cache.look_up(facts, version, self._left(deadline, 1e9, "the cache"), forward)
        if facts.candidates:
            if facts.input_count is None:
                model = facts.candidates[0].model
                facts.input_count = await self._counts.count(facts, model, wanted.conversation, shape, deadline, forward)
            self._fit(facts, shape)
            facts.hold = reckon(facts.candidates, self._prompt(facts)).worst
        return inference_service_pb2.ExplainResponse(receipt=receipt_to_proto(facts))

    async def report_outcome(
        self, principal: Principal, request: inference_service_pb2.ReportOutcomeRequest
    ) -> inference_service_pb2.ReportOutcomeResponse:
        """Takes in whether an answer served; the last report per operation wins."""
        self._require(principal, "inference")
        validation.check_outcome(request)
        score = request.score if request.HasField("score") else None
        served = request.outcome == inference_service_pb2.OUTCOME_SERVED
        self._around.outcomes.report(principal.tenant_id, request.operation_id, Report(served, score, request.comment))
        return inference_service_pb2.ReportOutcomeResponse()

    # The end of the process

    def close_admission(self) -> None:
        """From now on new requests are refused as DRAINING."""
        self._draining = True

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no request is under way; False when `timeout` seconds were not enough."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def standings(self, principal: Principal) -> list[Standing]:
        """The limits that apply to a key, as far as this gateway knows."""
        return self._leases.standings(principal.key_id)

    # The hot path

    async def _generate(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        deadline: float,
        forward: Metadata,
        request_key: bytes = b"",
    ) -> Completion:
        facts = self._facts(principal, request, "generate", request_key)
        self._enter()
        try:
            if not await self._prepare(facts, deadline, forward, streaming=False):
                # The execution stands here and not in a coroutine of its own: each is one more frame at every step of the wait.
                cost: int | None = 0
                try:
                    wanted = execution_service_pb2.CompleteRequest()
                    fill_request(wanted, facts)
                    if facts.is_uncounted:
                        wanted.count_when_needed = True
                    timeout = deadline - self._clock()
                    if timeout <= 0:
                        raise deadline_exceeded("a provider")
                    cost = None
                    response = await self._complete(wanted, timeout=timeout, metadata=forward)
                    cost = response.cost_nano_usd
                except Failure as failure:
                    if cost is None:
                        cost = settled_cost(failure)
                    raise
                finally:
                    self._release(facts, cost)
                self._take_in(facts, response)
            return self._finish(facts)
        except BaseException as error:
            self._fail(facts, error)
            raise
        finally:
            self._leave(facts)

    async def _stream(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        accepted_wire: int,
        deadline: float,
        forward: Metadata,
        request_key: bytes = b"",
    ) -> AsyncGenerator[StreamEvent, None]:
        facts = self._facts(principal, request, "stream", request_key)
        self._enter()
        entered = True
        try:
            if await self._prepare(facts, deadline, forward, streaming=True):
                answer = facts.answer
                assert answer is not None, "a hit has an answer"
                facts.first_byte_ns = time.monotonic_ns()
                yield self._opened(facts, answer.model, is_wire=False)
                yield deltas_of(answer)
            else:
                # The execution stands here and not in a generator of its own: each is one more frame at every piece.
                cost: int | None = 0
                finished: execution_service_pb2.CompletionFinished | None = None
                try:
                    wanted = execution_service_pb2.StreamCompleteRequest()
                    fill_request(wanted, facts)
                    wanted.accepted_wire = execution_service_pb2.WireFormat.ValueType(accepted_wire)
                    timeout = self._left(deadline, 1e9, "a provider")
                    cost = None
                    # Channels of the mesh return async generators, whatever the stub's type says.
                    stream: Any = self._stream_complete(wanted, timeout=timeout, metadata=forward)
                    async with contextlib.aclosing(stream) as replies:
                        async for reply in replies:
                            if reply.HasField("wire"):
                                yield reply.wire
                                continue
                            kind = reply.WhichOneof("event")
                            if kind == "deltas":
                                yield reply.deltas
                            elif kind == "opened":
                                facts.first_byte_ns = time.monotonic_ns()
                                opened = reply.opened
                                yield self._opened(facts, opened.model, is_wire=opened.is_wire)
                            elif kind == "finished":
                                finished = reply.finished
                                cost = finished.cost_nano_usd
                except Failure as failure:
                    if cost is None:
                        cost = settled_cost(failure)
                    raise
                finally:
                    self._release(facts, cost)
                if finished is None:
                    raise Failure(Reason.INTERNAL, "the answer ended without its end")
                self._take_in(facts, finished)
            completion = self._finish(facts)
            # Before the last event goes out: who doesn't ask for another one must not keep the slot.
            self._leave(facts)
            entered = False
            yield completion
        except BaseException as error:
            if entered:
                self._fail(facts, error)
            raise
        finally:
            if entered:
                self._leave(facts)

    async def _joined_stream(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        accepted_wire: int,
        deadline: float,
        forward: Metadata,
        passed_on: Call | None,
    ) -> AsyncGenerator[StreamEvent, None]:
        self._check_id(principal, request.request_id)
        scope = _scope(principal)
        if passed_on is None:
            is_elsewhere = False
            with self._entered():
                passed = self._passing.stream(scope, principal, request, deadline, forward)
                async with contextlib.aclosing(passed) as events:
                    async for event in events:
                        is_elsewhere = True
                        yield event
            if is_elsewhere:
                return
        shared = self._sharing.stream(
            scope,
            request.request_id,
            request,
            "generate",
            accepted_wire,
            lambda key: self._stream(principal, request, accepted_wire, deadline, forward, key),
            _weigh,
            deadline,
            _loss_of(passed_on),
        )
        opened = False
        async with contextlib.aclosing(shared) as events:
            async for event in events:
                if not opened and isinstance(event, Completion):
                    # The pieces can't be had: the whole answer is given as one.
                    yield Opened(event.operation_id, event.request_id, event.answer.model, event.created, False)
                    yield deltas_of(event.answer)
                opened = True
                yield event

    async def _prepare(self, facts: Facts, deadline: float, forward: Metadata, *, streaming: bool) -> bool:
        """Everything before execution. True: the cache has answered and `facts.answer` is set."""
        principal = facts.principal
        if "inference" not in principal.scopes:
            self._require(principal, "inference")
        request = facts.request
        facts.shape = shape = validation.check_generate(request, self._limits.max_request_bytes)
        tokens = (shape.byte_count - shape.image_bytes) // 4 + 1
        lease = self._leases.admit(principal.key_id, tokens)
        if lease is None:
            lease = await self._leases.admit_waiting(
                principal.tenant_id, principal.key_id, tokens, self._left(deadline, self._limits.lease, "metering")
            )
        facts.lease = lease
        facts.taken_tokens = tokens
        if request.cache.mode == inference_service_pb2.CACHE_MODE_OFF:
            facts.cache_status = receipt_pb2.CACHE_STATUS_BYPASS
            facts.cache_reason = "the request says CACHE_MODE_OFF"
            await self._plan(facts, shape, deadline, forward, streaming=streaming)
        else:
            version = self._plans.policy_version
            if not version:
                # The first request of the process: the version is a part of every cache key.
                await self._plan(facts, shape, deadline, forward, streaming=streaming)
                version = self._plans.policy_version
            elif self._clock() >= self._plans.version_fresh_until:
                version = await self._renewed_version(facts, shape, deadline, forward, streaming=streaming)
            left = deadline - self._clock()
            if left <= 0:
                raise deadline_exceeded("the cache")
            if await self._cache.look_up(facts, version, left, forward):
                return True
            if facts.plan is None:
                # As in `_plan`, but no coroutine is made where the plan is at hand.
                key = self._plan_key(facts, shape, streaming, 0)
                plan = self._plans.get(key)
                if plan is None:
                    plan = await self._fetch_plan(facts, key, deadline, forward)
                facts.plan = plan
                facts.candidates = plan.candidates
        if not facts.candidates:
            await self._plan_exactly(facts, shape, deadline, forward, streaming=streaming)
        if principal.limited_models:
            await self._admit_model(facts, deadline)
        if facts.input_count is None and not streaming and self._counts.is_needless(facts, shape):
            facts.input_count = estimated_count(shape)
            facts.is_uncounted = True
            if self._take(facts, shape) is not None:
                # Money is short, and a count holds less of it.
                facts.is_uncounted = False
                facts.input_count = None
        if not facts.is_uncounted:
            if facts.input_count is None:
                model = facts.candidates[0].model
                facts.input_count = await self._counts.count(facts, model, request.conversation, shape, deadline, forward)
            self._fit(facts, shape)
            short = self._take(facts, shape)
            if short is not None:
                await self._hold_waiting(facts, short, deadline)
        return False

    async def _renewed_version(self, facts: Facts, shape: Shape, deadline: float, forward: Metadata, *, streaming: bool) -> str:
        """The version of the policies now; the last one known while routing can't be reached, since the cache answers on."""
        plans = self._plans
        # One request asks; those that come meanwhile go on with what is known.
        plans.version_fresh_until = self._clock() + _VERSION_RETRY_SECONDS
        try:
            await self._plan(facts, shape, deadline, forward, streaming=streaming)
        except Failure as failure:
            if failure.reason not in OUTAGES:
                raise
        return plans.policy_version

    async def _plan(
        self, facts: Facts, shape: Shape, deadline: float, forward: Metadata, *, streaming: bool, input_bound: int = 0
    ) -> Plan:
        key = self._plan_key(facts, shape, streaming, input_bound)
        plan = self._plans.get(key)
        if plan is None:
            plan = await self._fetch_plan(facts, key, deadline, forward)
        facts.plan = plan
        facts.candidates = plan.candidates
        return plan

    async def _fetch_plan(self, facts: Facts, key: PlanFields, deadline: float, forward: Metadata) -> Plan:
        left = self._left(deadline, self._limits.plan, "routing")
        plan, is_old = await self._plans.fetch(PlanKey(*key), left, forward)
        if is_old:
            facts.degrade("routing: last good plan, service unavailable")
        return plan

    def _plan_key(self, facts: Facts, shape: Shape, streaming: bool, input_bound: int) -> PlanFields:
        """The fields of the request's PlanKey in order. A plain tuple equals the key, and mostly the plan is at hand."""
        request = facts.request
        principal = facts.principal
        task_type: int = request.task_type
        code = reasoning = 0
        if task_type == receipt_pb2.TASK_TYPE_UNSPECIFIED:
            code, reasoning = signals(shape.last_user_text)
        model = region = ""
        allow_fallback: bool | None = None
        max_cost = latency = 0
        bucket = -1
        routing = shape.routing
        if routing is not None:
            model = routing.model
            if model == "auto":
                model = ""
            region = routing.region
            if routing.HasField("allow_fallback"):
                allow_fallback = routing.allow_fallback
            if routing.HasField("max_cost_nano_usd"):
                # A limit of nothing leaves the free models; 0 itself says that there is none.
                max_cost = max(1, routing.max_cost_nano_usd)
            if routing.HasField("max_latency"):
                latency = routing.max_latency.ToNanoseconds()
            affinity_key = routing.affinity_key
            if affinity_key:
                bucket = zlib.crc32(affinity_key.encode()) & 63
        return (
            principal.tenant_id,
            model,
            task_type,
            find_needs(request.conversation, shape, streaming=streaming),
            region,
            allow_fallback,
            principal.allowed_models,
            shape.image_count > 0,
            code,
            reasoning,
            input_bound or round_up(estimated_tokens(shape)),
            shape.max_output_tokens,
            max_cost,
            latency,
            bucket,
        )

    async def _plan_exactly(self, facts: Facts, shape: Shape, deadline: float, forward: Metadata, *, streaming: bool) -> None:
        """No candidate is left. Where that may be due to the coarse bound of the prompt, plans again with a real count; otherwise, or
        when that doesn't help, raises the failure that says why.
        """
        plan = facts.plan
        assert plan is not None, "candidates come from a plan"
        narrow = [rejection.model for rejection in plan.response.rejections if rejection.filter == "context_window"]
        if not narrow:
            raise no_candidate(plan.response, _model(facts.request))
        count = await self._counts.count(facts, narrow[0], facts.request.conversation, shape, deadline, forward)
        facts.input_count = count
        plan = await self._plan(facts, shape, deadline, forward, streaming=streaming, input_bound=max(1, count.token_count))
        if facts.candidates:
            return
        rejections = plan.response.rejections
        if any(rejection.filter != "context_window" for rejection in rejections) or not rejections:
            raise no_candidate(plan.response, _model(facts.request))
        raise context_window_exceeded(count.token_count, await self._largest_window(narrow, deadline, forward))

    async def _largest_window(self, models: list[str], deadline: float, forward: Metadata) -> int:
        """For the words of a refusal; 0 when it can't be found out."""
        try:
            catalogue = await self._peers.routing.ListModels(
                routing_service_pb2.ListModelsRequest(page_size=1000, allowed_models=models),
                timeout=self._left(deadline, self._limits.plan, "routing"),
                metadata=forward,
            )
        except Failure:
            return 0
        return max((model.context_window for model in catalogue.models if model.id in models), default=0)

    def _fit(self, facts: Facts, shape: Shape) -> None:
        """Drops candidates into whose window the counted prompt doesn't fit."""
        candidates = facts.candidates
        count = facts.input_count
        assert count is not None, "counted before"
        needed = count.token_count + (shape.max_output_tokens or 1)
        for candidate in candidates:
            if 0 < candidate.context_window < needed:
                break
        else:
            return
        left = []
        largest = 0
        for candidate in candidates:
            if 0 < candidate.context_window < needed:
                largest = max(largest, candidate.context_window)
                facts.reject(
                    candidate.model, f"context_window: {needed} tokens are needed, its window has {candidate.context_window}"
                )
            else:
                left.append(candidate)
        if not left:
            raise context_window_exceeded(needed, largest)
        facts.candidates = left

    async def _admit_model(self, facts: Facts, deadline: float) -> None:
        """Takes from the limits of the model that is to be asked first, and leaves out those whose limits are used up. Failure
        RATE_LIMITED or CONCURRENCY_LIMITED when none is left.

        What is asked in another's place when that fails is charged when it has answered: set aside beforehand, it would be kept from
        those who ask for it first.
        """
        principal = facts.principal
        leases, limited, key_id = self._leases, principal.limited_models, principal.key_id
        left: list[PlannedCandidate] = []
        refusal: Failure | None = None
        for candidate in facts.candidates:
            model = candidate.model
            if model in limited:
                if left:
                    if leases.is_used_up(key_id, model):
                        facts.reject(model, "model_limit: a limit of the model is used up")
                        continue
                else:
                    lease = leases.admit(lease_name(key_id, model), facts.taken_tokens)
                    try:
                        if lease is None:
                            timeout = self._left(deadline, self._limits.lease, "metering")
                            lease = await leases.admit_waiting(principal.tenant_id, key_id, facts.taken_tokens, timeout, model)
                    except Failure as failure:
                        if failure.reason not in _LIMITED:
                            raise
                        refusal = refusal or failure
                        facts.reject(model, f"model_limit: {failure.message}")
                        continue
                    facts.model_lease = lease
            left.append(candidate)
        if refusal is not None and not left:
            raise refusal
        facts.candidates = left

    # Money

    def _prompt(self, facts: Facts) -> Prompt:
        shape, count = facts.shape, facts.input_count
        assert shape is not None, "checked before"
        assert count is not None, "counted before"
        return Prompt(
            count.token_count,
            count.error_bound,
            byte_bound(shape),
            shape.image_count,
            shape.max_output_tokens,
            self._limits.default_max_output_tokens,
            self._limits.min_output_tokens,
        )

    def _take(self, facts: Facts, shape: Shape) -> _Short | None:
        """Holds the worst case over the candidates out of the lease. None: it is done; else what the lease hadn't enough for."""
        plan, lease = facts.plan, facts.lease
        assert plan is not None, "planned before"
        assert lease is not None, "admitted before"
        if plan.has_unbounded and not shape.max_output_tokens:
            facts.max_output = self._limits.default_max_output_tokens
        prompt = self._prompt(facts)
        reckoning = reckon(facts.candidates, prompt)
        wanted = worst = reckoning.worst
        if worst == 0:
            return None
        routing = shape.routing
        if routing is not None and routing.HasField("max_cost_nano_usd") and routing.max_cost_nano_usd < wanted:
            wanted = routing.max_cost_nano_usd
        if lease.budget is not None:
            facts.budget_before = lease.budget_left()
            facts.budget_level = lease.budget.level
        if wanted == worst and self._leases.take(lease, worst):
            facts.hold = worst
            facts.generation = lease.generation
            return None
        return _Short(prompt, reckoning, wanted)

    async def _hold_waiting(self, facts: Facts, short: _Short, deadline: float) -> None:
        """Holds as much of it as is left and of use, and clamps the answer to that."""
        lease = facts.lease
        assert lease is not None, "admitted before"
        prompt, reckoning, wanted = short
        if wanted < reckoning.least:
            raise cost_limit(wanted, reckoning.least)
        if wanted and (
            self._leases.take(lease, wanted)
            or await self._leases.take_waiting(lease, wanted, self._left(deadline, self._limits.lease, "metering"))
        ):
            facts.hold = wanted
            facts.generation = lease.generation
        elif wanted:
            await self._hold_alone(facts, wanted, reckoning.least, deadline)
        if facts.hold < reckoning.worst:
            covered = clamp(facts.candidates, prompt, facts.hold)
            if not covered.candidates:
                held = facts.hold
                self._release(facts, 0)
                raise budget_exhausted(facts.budget_level, held, reckoning.least)
            facts.candidates = covered.candidates
            if covered.max_output:
                facts.max_output = covered.max_output

    async def _hold_alone(self, facts: Facts, wanted: int, least: int, deadline: float) -> None:
        """Asks metering for a hold of this operation's own. With nothing as the least, an empty budget leaves what is free."""
        left = self._left(deadline, 1e9, "metering")
        try:
            grant = await self._around.metering.hold(
                facts.operation_id,
                facts.principal.key_id,
                wanted,
                least if least < wanted else 0,
                time.time() + left + 60.0,
                timeout=min(left, self._limits.lease),
            )
        except Failure as failure:
            if failure.reason is Reason.BUDGET_EXHAUSTED:
                if least == 0:
                    return
                raise
            # It may be made all the same: what is lost is the answer.
            self._around.releases.void_lost(f"hold-{facts.operation_id}")
            if failure.reason is Reason.DEADLINE_EXCEEDED and self._clock() < deadline:
                # The caller has time left: it is told who had none.
                raise unavailable(
                    "metering", "the budget can't be checked, metering didn't answer in time; retry later"
                ) from failure
            raise
        except asyncio.CancelledError:
            self._around.releases.void_lost(f"hold-{facts.operation_id}")
            raise
        facts.hold = grant.amount_nano_usd
        facts.hold_id = grant.hold_id
        if grant.budget_before_nano_usd is not None:
            facts.budget_before = grant.budget_before_nano_usd
            facts.budget_level = grant.budget_level

    def _release(self, facts: Facts, cost: int | None) -> None:
        """The hold ends: `cost` of it was spent, None: nobody here knows."""
        if cost is None:
            facts.is_cost_unknown = True
        else:
            facts.cost = cost
        amount = facts.hold
        if not amount:
            return
        if facts.hold_id:
            if not cost:
                self._around.releases.void(facts.hold_id, may_have_run=cost is None)
            return
        lease = facts.lease
        assert lease is not None, "a hold without its own id came from the lease"
        if cost is None:
            self._leases.strand(lease, facts.generation, amount)
        else:
            self._leases.settle(lease, facts.generation, amount, cost)

    # Execution

    def _take_in(
        self, facts: Facts, response: execution_service_pb2.CompleteResponse | execution_service_pb2.CompletionFinished
    ) -> None:
        facts.answer = answer = response.answer
        facts.attempts = response.attempts
        facts.attempt_count = response.attempt_count
        facts.cost = response.cost_nano_usd
        facts.price_version = response.price_version
        if may_store(facts, answer):
            self._around.writer.add(facts, answer)
        count = facts.input_count
        assert count is not None, "counted before"
        if count.method == receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED and not facts.is_uncounted:
            self._around.calibrations.add(facts, answer)

    def _opened(self, facts: Facts, model: str, *, is_wire: bool) -> Opened:
        return Opened(facts.operation_id, facts.request.request_id, model, facts.receive_ns // 1_000_000_000, is_wire)

    # Beginning and end of an operation

    def _facts(
        self, principal: Principal, request: inference_service_pb2.GenerateRequest, kind: str, request_key: bytes = b""
    ) -> Facts:
        if self._draining:
            raise Failure(Reason.DRAINING, "this replica is going down; send the request again", retry_delay=1.0)
        return Facts(self._ids.create(), principal, request, kind, time.time_ns(), time.monotonic_ns(), request_key)

    def _enter(self) -> None:
        self._under_way += 1
        if self._under_way == 1:
            self._idle.clear()

    def _leave(self, facts: Facts) -> None:
        lease = facts.lease
        if lease is not None:
            answer = facts.answer
            used = 0
            if not facts.is_hit:
                used = facts.taken_tokens
                if answer is not None:
                    usage = answer.usage
                    used = usage.input_token_count + usage.output_token_count
            self._leases.leave(lease, used - facts.taken_tokens)
            if facts.principal.limited_models and not facts.is_hit:
                self._leave_model(facts, used)
        self._exit()

    def _leave_model(self, facts: Facts, used: int) -> None:
        principal, lease, answer = facts.principal, facts.model_lease, facts.answer
        answered = answer.model if answer is not None else ""
        is_first = lease is not None and answered in ("", lease.model)
        if lease is not None:
            self._leases.leave(lease, (used if is_first else 0) - facts.taken_tokens)
        if not is_first and answered in principal.limited_models:
            self._leases.charge(principal.tenant_id, principal.key_id, answered, used)

    def _exit(self) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._idle.set()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Counts what this process only passes on as under way, too: a drain waits for it."""
        self._enter()
        try:
            yield
        finally:
            self._exit()

    def _finish(self, facts: Facts) -> Completion:
        answer = facts.answer
        assert answer is not None, "a finished operation has an answer"
        facts.end_ns = end = time.monotonic_ns()
        if not facts.first_byte_ns:
            facts.first_byte_ns = end
        if facts.is_hit:
            self._around.hits.add(facts)
        completion = Completion(facts, answer)
        self._journal.add(facts, completion.model, "ok")
        return completion

    def _fail(self, facts: Facts, error: BaseException) -> None:
        facts.end_ns = time.monotonic_ns()
        if isinstance(error, Failure):
            outcome = error.reason.value
            facts.attempt_count = sum(name.startswith("attempt/") for name in error.metadata)
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            outcome = Reason.CANCELLED.value
        else:
            outcome = Reason.INTERNAL.value
        model = facts.candidates[0].model if facts.candidates else ""
        self._journal.add(facts, model, outcome)

    def _left(self, deadline: float, budget: float, what: str) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise deadline_exceeded(what)
        return min(budget, left)

    def _require(self, principal: Principal, scope: str) -> None:
        if scope not in principal.scopes:
            raise Failure(
                Reason.PERMISSION_DENIED,
                f"the key lacks the scope {scope!r}; use a key that has it",
                metadata={"needs": scope},
            )

    def _check_id(self, principal: Principal, request_id: str) -> None:
        validation.check_request_id(request_id)
        self._require(principal, "inference")

    # Embeddings

    async def _embed(
        self,
        principal: Principal,
        request: inference_service_pb2.EmbedRequest,
        deadline: float,
        forward: Metadata,
        request_key: bytes = b"",
    ) -> inference_service_pb2.EmbedResponse:
        # The facts of an embedding are those of a request without a conversation.
        facts = self._facts(
            principal,
            inference_service_pb2.GenerateRequest(
                request_id=request.request_id, metadata=request.metadata, end_user=request.end_user
            ),
            "embed",
            request_key,
        )
        facts.cache_status = receipt_pb2.CACHE_STATUS_BYPASS
        facts.cache_reason = "embeddings are not cached"
        self._enter()
        try:
            return await self._run_embed(facts, request, deadline, forward)
        except BaseException as error:
            self._fail(facts, error)
            raise
        finally:
            self._leave(facts)

    async def _run_embed(
        self, facts: Facts, request: inference_service_pb2.EmbedRequest, deadline: float, forward: Metadata
    ) -> inference_service_pb2.EmbedResponse:
        principal = facts.principal
        self._require(principal, "inference")
        facts.shape = shape = validation.check_embed(request, self._limits.max_request_bytes)
        facts.taken_tokens = tokens = shape.byte_count // 4 + 1
        lease = self._leases.admit(principal.key_id, tokens)
        if lease is None:
            lease = await self._leases.admit_waiting(
                principal.tenant_id, principal.key_id, tokens, self._left(deadline, self._limits.lease, "metering")
            )
        facts.lease = lease
        key_needs: tuple[str, ...] = ("embeddings",)
        if request.HasField("dimension_count"):
            key_needs = ("embeddings", "field:dimension_count")
        key = PlanKey(
            principal.tenant_id, request.model, receipt_pb2.TASK_TYPE_SIMPLE, key_needs, "", None, principal.allowed_models,
            False, 0, 0, round_up(tokens), 0, 0, 0, -1,
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            plan, is_old = await self._plans.fetch(key, self._left(deadline, self._limits.plan, "routing"), forward)
            if is_old:
                facts.degrade("routing: last good plan, service unavailable")
        facts.plan, facts.candidates = plan, plan.candidates
        if not plan.candidates:
            raise no_candidate(plan.response, request.model)
        if principal.limited_models:
            await self._admit_model(facts, deadline)
        # A byte is at least a token's worth: the bound needs no tokenizer, and the prompt is all that an embedding costs.
        facts.input_count = estimated_count(shape)
        await self._hold_embedding(facts, shape, deadline)
        response = await self._execute_embed(facts, request, deadline, forward)
        facts.end_ns = time.monotonic_ns()
        facts.cost = response.cost_nano_usd
        facts.answer = answer_pb2.Answer(model=response.model, usage=response.usage)
        facts.attempts = response.attempts
        facts.attempt_count = len(facts.attempts)
        self._journal.add(facts, response.model, "ok")
        return inference_service_pb2.EmbedResponse(
            operation_id=facts.operation_id,
            embeddings=response.embeddings,
            usage=response.usage,
            cost_nano_usd=response.cost_nano_usd,
            model=response.model,
        )

    async def _hold_embedding(self, facts: Facts, shape: Shape, deadline: float) -> None:
        worst = 0
        for candidate in facts.candidates:
            if candidate.tariff is not None:
                worst = max(worst, worst_cost(candidate.tariff, byte_bound(shape), 0, 0))
        if not worst:
            return
        lease = facts.lease
        assert lease is not None, "admitted before"
        if self._leases.take(lease, worst) or await self._leases.take_waiting(
            lease, worst, self._left(deadline, self._limits.lease, "metering")
        ):
            facts.hold = worst
            facts.generation = lease.generation
        else:
            await self._hold_alone(facts, worst, worst, deadline)

    async def _execute_embed(
        self, facts: Facts, request: inference_service_pb2.EmbedRequest, deadline: float, forward: Metadata
    ) -> execution_service_pb2.EmbedResponse:
        cost: int | None = 0
        try:
            timeout = self._left(deadline, 1e9, "a provider")
            cost = None
            response = await self._peers.execution.Embed(embed_to_proto(facts, request), timeout=timeout, metadata=forward)
            cost = response.cost_nano_usd
        except Failure as failure:
            if cost is None:
                cost = settled_cost(failure)
            raise
        finally:
            self._release(facts, cost)
        return response


def _weigh(event: StreamEvent) -> int:
    """Bytes that an event of a stream takes."""
    if isinstance(event, bytes):
        return len(event)
    return event.ByteSize() if isinstance(event, execution_service_pb2.DeltaBatch) else 0


def _model(request: inference_service_pb2.GenerateRequest) -> str:
    return request.routing.model or "auto"


def _loss_of(passed_on: Call | None) -> Callable[[], bool]:
    """Whether the gateway that passed a request on is gone."""
    return (lambda: passed_on.is_lost) if passed_on is not None else _never


def _never() -> bool:
    return False


def _scope(principal: Principal) -> str:
    """Whose request ids these are: another key may not be allowed what this one is, and must not get its answers."""
    return f"{principal.tenant_id}/{principal.key_id}"
