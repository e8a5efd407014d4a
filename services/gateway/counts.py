"""Counts of prompts: asked of tokenization where something depends on them, else told by size.

A count takes a seventh of all that a passed-on request costs. On a short prompt whose answer comes as a whole nothing depends on it but the
money that is held meanwhile, and for that its size will do, which no tokenizer that works on bytes passes: what is charged is what the
provider reports. Where that is missing, execution has the prompt counted afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from services.gateway.breakers import Breaker
from services.gateway.estimates import byte_bound, estimated_count
from services.gateway.receipts import Facts
from services.gateway.validation import Shape
from services.runtime.call import Metadata
from services.runtime.errors import Failure, deadline_exceeded
from sluice.inference.v1 import conversation_pb2, inference_service_pb2, receipt_pb2
from sluice.tokenization.v1 import tokenization_service_pb2

if TYPE_CHECKING:
    from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceAsyncStub

_NO_RECEIPT: Final = inference_service_pb2.RECEIPT_VIEW_NONE
_ESTIMATED: Final = receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED


class Counts:
    """Asks tokenization. `clock` is the loop's."""

    def __init__(
        self, stub: TokenizationServiceAsyncStub, clock: Callable[[], float], *, call_seconds: float, uncounted_bytes: int
    ) -> None:
        """Prompts of up to `uncounted_bytes` may go uncounted; 0: none."""
        self._call = stub.Count
        self._clock = clock
        self._call_seconds = call_seconds
        self._uncounted_bytes = uncounted_bytes
        self._breaker = Breaker()
        self._methods: dict[str, int] = {}
        """How a model's prompts were counted last: as many models as the catalogue has."""

    def is_needless(self, facts: Facts, shape: Shape) -> bool:
        """Whether nothing depends on the count of a prompt whose answer comes as a whole. Hot path."""
        request = facts.request
        if (
            shape.byte_count > self._uncounted_bytes
            or shape.image_count
            or request.receipt_view != _NO_RECEIPT
            # Others may join, who want a receipt.
            or request.request_id
        ):
            return False
        candidates = facts.candidates
        # An estimate costs little, and the estimator learns from those that it made.
        if self._methods.get(candidates[0].model, _ESTIMATED) == _ESTIMATED:
            return False
        needed = byte_bound(shape) + (shape.max_output_tokens or 1)
        for candidate in candidates:  # noqa: SIM110  # a generator in any() costs as much as all the rest
            if 0 < candidate.context_window < needed:
                return False
        return True

    async def count(
        self,
        facts: Facts | None,
        model: str,
        conversation: conversation_pb2.Conversation,
        shape: Shape,
        deadline: float,
        forward: Metadata,
    ) -> receipt_pb2.TokenCount:
        """The count of a prompt for a model of the catalogue; where it had to be told by size, `facts` say so.

        Raises Failure DEADLINE_EXCEEDED when `deadline` has passed.
        """
        now = self._clock()
        breaker = self._breaker
        if not breaker.failure_count or breaker.allows(now):
            left = deadline - now
            if left <= 0:
                raise deadline_exceeded("tokenization")
            budget = self._call_seconds
            request = tokenization_service_pb2.CountRequest()
            request.models.append(model)
            request.conversation.CopyFrom(conversation)
            try:
                response = await self._call(request, timeout=min(left, budget), metadata=forward)
                if breaker.failure_count:
                    breaker.succeeded()
                count = response.counts[0]
                self._methods[model] = count.method
                return count
            except Failure as failure:
                breaker.failed(self._clock())
                reason = failure.reason.value
        else:
            reason = "it didn't answer lately"
        if facts is not None:
            facts.degrade(f"tokenization: estimated, {reason}")
        return estimated_count(shape)
