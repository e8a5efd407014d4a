"""Routing, tokenization and caching, as far as a request needs them: they keep what the gateway may rely on, and no money depends on them."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from services.metering.cost import Price
from services.metering.pricebook import PriceBook, versioned
from services.metering.proto import price_to_proto
from services.runtime.call import Call
from services.runtime.dispatch import Binding
from sluice.caching.v1 import caching_service_pb2
from sluice.inference.v1 import receipt_pb2
from sluice.routing.v1 import routing_service_pb2
from sluice.tokenization.v1 import tokenization_service_pb2
from tests.simulation.vendor import prompt_tokens

MODELS: Final = ("a/large", "b/small")
_LONGEST: Final = 80


def book() -> PriceBook:
    """The price book: one model at 1,000 and 3,000 nano-dollars a token and a little for each request, one at a third of it."""
    rows = {
        "a/large": [Price("", "", 1_000_000_000, 3_000_000_000, request=7, source="simulation")],
        "b/small": [Price("", "", 333_333_333, 1_000_000_001, source="simulation")],
    }
    return PriceBook({model: versioned(model, prices) for model, prices in rows.items()})


def prices(made: PriceBook) -> dict[str, Price]:
    """The price of each model."""
    found = {model: made.at(model, 1.0) for model in MODELS}
    return {model: price for model, price in found.items() if price is not None}


class Routing:
    """One plan for everybody."""

    def __init__(self, made: PriceBook) -> None:
        self._prices = prices(made)

    async def Plan(self, request: Any, call: Call) -> Any:
        """See the proto."""
        candidates = [
            routing_service_pb2.Candidate(
                model=model,
                provider=model.partition("/")[0],
                upstream_model=model.partition("/")[2],
                price=price_to_proto(price),
                max_output_tokens=_LONGEST,
                attempt_timeout=Duration(seconds=2),
            )
            for model, price in self._prices.items()
        ]
        return routing_service_pb2.PlanResponse(
            candidates=candidates,
            policy="default",
            policy_version="1",
            task_type=receipt_pb2.TASK_TYPE_SIMPLE,
            reuse_duration=Duration(seconds=5),
        )

    async def ListModels(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return routing_service_pb2.ListModelsResponse()

    async def ReportExecution(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return routing_service_pb2.ReportExecutionResponse()


class Tokenization:
    """Counts as the provider does."""

    async def Count(self, request: Any, call: Call) -> Any:
        """See the proto."""
        count = receipt_pb2.TokenCount(
            token_count=prompt_tokens(request.conversation),
            method=receipt_pb2.TOKEN_COUNT_METHOD_EXACT,
            tokenizer="simulation@1",
        )
        return tokenization_service_pb2.CountResponse(counts=[count] * len(request.models))

    async def CountTexts(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return tokenization_service_pb2.CountTextsResponse()

    async def Fit(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return tokenization_service_pb2.FitResponse()

    async def Calibrate(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return tokenization_service_pb2.CalibrateResponse()

    async def ListTokenizers(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return tokenization_service_pb2.ListTokenizersResponse()


class Caching:
    """An exact tier without bounds."""

    def __init__(self) -> None:
        self._answers: dict[bytes, Any] = {}

    async def Lookup(self, request: Any, call: Call) -> Any:
        """See the proto."""
        key = request.conversation.SerializeToString(deterministic=True)
        known = self._answers.get(key)
        status = receipt_pb2.CACHE_STATUS_MISS if known is None else receipt_pb2.CACHE_STATUS_HIT_EXACT
        return caching_service_pb2.LookupResponse(
            verdict=receipt_pb2.CacheVerdict(status=status), ticket=key, answer=None if known is None else known
        )

    async def Store(self, request: Any, call: Call) -> Any:
        """See the proto."""
        self._answers[request.ticket] = request.answer
        return caching_service_pb2.StoreResponse(stored_exact=True)

    async def BatchStore(self, request: Any, call: Call) -> Any:
        """See the proto."""
        for one in request.requests:
            self._answers[one.ticket] = one.answer
        results = [caching_service_pb2.StoreResult(stored_exact=True)] * len(request.requests)
        return caching_service_pb2.BatchStoreResponse(results=results)

    async def Purge(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return caching_service_pb2.PurgeResponse()

    async def GetStats(self, request: Any, call: Call) -> Any:
        """See the proto."""
        return caching_service_pb2.GetStatsResponse()


def bindings(made: PriceBook) -> list[Binding]:
    """What the process of peers serves."""
    return [
        Binding(Routing(made), routing_service_pb2.DESCRIPTOR.services_by_name["RoutingService"]),
        Binding(Tokenization(), tokenization_service_pb2.DESCRIPTOR.services_by_name["TokenizationService"]),
        Binding(Caching(), caching_service_pb2.DESCRIPTOR.services_by_name["CachingService"]),
    ]
