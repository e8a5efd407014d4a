"""The facts of one operation, and the receipt that is made of them when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.gateway.leases import Lease
from services.gateway.plans import Plan, PlannedCandidate
from services.gateway.principals import Principal
from services.gateway.validation import Shape
from sluice.caching.v1 import caching_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2


class Facts:
    """What is known of an operation. Filled on the way; times are nanoseconds."""

    __slots__ = (
        "answer", "attempt_count", "attempts", "budget_before", "budget_level", "cache_reason", "cache_status", "candidates", "cost", "degradations",
        "end_ns", "first_byte_ns", "generation", "hold", "hold_id", "input_count", "is_cost_unknown", "is_hit", "is_uncounted", "kind", "lease", "lookup", "lookup_ns",
        "max_output", "model_lease", "operation_id", "plan", "price_version", "principal", "receive_ns", "rejections", "request", "request_key", "saved", "shape", "start",
        "taken_tokens",
    )  # fmt: skip

    def __init__(
        self,
        operation_id: str,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        kind: str,
        receive_ns: int,
        start: int,
        request_key: bytes = b"",
    ) -> None:
        self.operation_id = operation_id
        self.principal = principal
        self.request = request
        self.kind = kind
        """`generate`, `stream`, `embed`."""
        self.receive_ns = receive_ns
        """Unix time of arrival."""
        self.start = start
        """Monotonic time of arrival."""
        self.request_key = request_key
        """What its request id stands for, as in Settlement; empty: it has none."""
        self.first_byte_ns = 0
        self.end_ns = 0
        self.shape: Shape | None = None
        self.lease: Lease | None = None
        self.model_lease: Lease | None = None
        """Of the model that is asked first, where that has limits of its own."""
        self.taken_tokens = 0
        self.lookup: caching_service_pb2.LookupResponse | None = None
        self.lookup_ns = 0
        self.cache_status: int = receipt_pb2.CACHE_STATUS_UNSPECIFIED
        self.cache_reason = ""
        self.is_hit = False
        """The cache has answered."""
        self.plan: Plan | None = None
        self.candidates: Sequence[PlannedCandidate] = ()
        """Those of the plan that are left after the gateway's own checks."""
        self.rejections: list[tuple[str, str]] | None = None
        self.input_count: receipt_pb2.TokenCount | None = None
        self.is_uncounted = False
        """`input_count` goes by the prompt's size, since nothing depends on it."""
        self.max_output = 0
        """Clamped answer length; 0: as the caller wished."""
        self.hold = 0
        self.hold_id = ""
        self.generation = 0
        self.budget_before: int | None = None
        self.budget_level = ""
        self.answer: answer_pb2.Answer | None = None
        self.attempts: Sequence[receipt_pb2.Attempt] = ()
        """Left out where nobody will ask for a receipt."""
        self.attempt_count = 0
        self.cost = 0
        self.is_cost_unknown = False
        """Something may have been charged that only the ledger knows of: the caller left, or execution was lost."""
        self.saved = 0
        self.price_version = ""
        self.degradations: list[str] | None = None

    def reject(self, model: str, why: str) -> None:
        """Notes a candidate that is left out here and wasn't in the plan."""
        if self.rejections is None:
            self.rejections = []
        self.rejections.append((model, why))

    def degrade(self, what: str) -> None:
        """Notes a step that went on without a dependency."""
        if self.degradations is None:
            self.degradations = [what]
        else:
            self.degradations.append(what)


class Completion:
    """One finished answer."""

    __slots__ = ("_facts", "answer", "cache_status", "cost_nano_usd", "created", "model", "operation_id", "request_id")

    def __init__(self, facts: Facts, answer: answer_pb2.Answer) -> None:
        self._facts = facts
        self.operation_id = facts.operation_id
        self.request_id = facts.request.request_id
        self.answer = answer
        self.model = answer.model
        self.cost_nano_usd = facts.cost
        self.created = facts.receive_ns // 1_000_000_000
        """Unix seconds."""
        self.cache_status = facts.cache_status
        """A value of `receipt_pb2.CacheStatus`."""

    def receipt(self) -> receipt_pb2.Receipt:
        """What happened, built when asked for."""
        return receipt_to_proto(self._facts)


class RemoteCompletion(Completion):
    """An answer that another gateway has finished, or that was kept."""

    __slots__ = ("_receipt",)

    def __init__(
        self, operation_id: str, request_id: str, answer: answer_pb2.Answer, cost: int, receipt: receipt_pb2.Receipt
    ) -> None:
        self.operation_id = operation_id
        self.request_id = request_id
        self.answer = answer
        self.model = answer.model
        self.cost_nano_usd = cost
        self.created = receipt.receive_time.seconds
        self.cache_status = receipt.cache.status
        self._receipt = receipt

    def receipt(self) -> receipt_pb2.Receipt:
        """As it was made then."""
        return self._receipt


def receipt_to_proto(facts: Facts) -> receipt_pb2.Receipt:
    """The receipt of an operation."""
    principal = facts.principal
    receipt = receipt_pb2.Receipt(
        operation_id=facts.operation_id,
        tenant_id=principal.tenant_id,
        project_id=principal.project_id,
        key_id=principal.key_id,
        receive_time=timestamp(facts.receive_ns),
        cache=cache_verdict(facts),
        hold_nano_usd=facts.hold,
        cost_nano_usd=facts.cost,
        price_version=facts.price_version,
        attempts=facts.attempts,
        saved_nano_usd=facts.saved,
        degradations=facts.degradations or (),
    )
    if facts.end_ns:
        receipt.total_duration.CopyFrom(duration(facts.end_ns - facts.start))
    if facts.first_byte_ns:
        receipt.first_byte_duration.CopyFrom(duration(facts.first_byte_ns - facts.start))
    if facts.input_count is not None:
        receipt.input_count.CopyFrom(facts.input_count)
    if facts.plan is not None:
        _add_plan(receipt, facts, facts.plan)
    else:
        receipt.task_type = facts.request.task_type
        if facts.request.task_type:
            receipt.task_type_source = receipt_pb2.TASK_TYPE_SOURCE_CALLER
    if facts.budget_before is not None:
        receipt.budget_before_nano_usd = facts.budget_before
        receipt.budget_after_nano_usd = facts.budget_before - facts.cost
        receipt.budget_level = facts.budget_level
    return receipt


def cache_verdict(facts: Facts) -> receipt_pb2.CacheVerdict:
    """What the cache said, or why it wasn't asked."""
    if facts.lookup is not None:
        verdict = receipt_pb2.CacheVerdict()
        verdict.CopyFrom(facts.lookup.verdict)
    else:
        verdict = receipt_pb2.CacheVerdict(
            status=receipt_pb2.CacheStatus.ValueType(facts.cache_status), reason=facts.cache_reason
        )
    if facts.lookup_ns and not verdict.HasField("duration"):
        verdict.duration.CopyFrom(duration(facts.lookup_ns))
    return verdict


def timestamp(nanoseconds: int) -> Timestamp:
    """A moment."""
    return Timestamp(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)


def duration(nanoseconds: int) -> Duration:
    """A span of time, not negative."""
    nanoseconds = max(0, nanoseconds)
    return Duration(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)


def _add_plan(receipt: receipt_pb2.Receipt, facts: Facts, plan: Plan) -> None:
    response = plan.response
    receipt.task_type = response.task_type
    receipt.task_type_source = response.task_type_source
    receipt.task_type_reason = response.task_type_reason
    receipt.policy = response.policy
    receipt.policy_version = response.policy_version
    dropped = dict(facts.rejections or ())
    for candidate in response.candidates:
        if candidate.model not in dropped:
            receipt.candidates.add(
                model=candidate.model,
                planned=True,
                reason=candidate.reason or "planned",
                scores=candidate.scores,
                total_score=candidate.total_score,
                estimated_cost_nano_usd=candidate.estimated_cost_nano_usd,
            )
    for model, reason in dropped.items():
        receipt.candidates.add(model=model, reason=reason)
    for rejection in response.rejections:
        receipt.candidates.add(model=rejection.model, reason=f"{rejection.filter}: {rejection.reason}")
    if response.candidates:
        receipt.estimated_cost_nano_usd = response.candidates[0].estimated_cost_nano_usd
