"""The failure that says best why no candidate is left."""

from __future__ import annotations

from typing import Final

from services.gateway.needs import field_of
from services.runtime.errors import Failure, Reason
from sluice.routing.v1 import routing_service_pb2

_MAX_LISTED: Final = 16


def no_candidate(plan: routing_service_pb2.PlanResponse, model: str) -> Failure:
    """The failure for a plan without candidates.

    When one filter alone refused all of them the reason is that filter's: FIELD_UNSUPPORTED by name, MODEL_NOT_FOUND, PRICE_UNKNOWN,
    COST_LIMIT. When some are only unhealthy, PROVIDER_UNAVAILABLE, since a retry may find them well. Otherwise NO_CANDIDATE.
    """
    rejections = plan.rejections
    filters = {rejection.filter for rejection in rejections}
    metadata = {
        f"candidate/{rejection.model}": f"{rejection.filter}: {rejection.reason}" for rejection in rejections[:_MAX_LISTED]
    }
    words = "; ".join(f"{rejection.model}: {rejection.reason}" for rejection in rejections[:4])
    if filters == {"capability"}:
        field = field_of(rejections[0].missing_need)
        return Failure(
            Reason.FIELD_UNSUPPORTED,
            f"no candidate supports {field!r}; leave it out or choose another model ({words})",
            metadata={"field": field},
        )
    if filters == {"permission"}:
        return Failure(Reason.MODEL_NOT_FOUND, f"no model or policy {model!r} is there for this key", metadata={"model": model})
    if filters == {"price"}:
        return Failure(
            Reason.PRICE_UNKNOWN,
            f"no price is known and the policy refuses such models; add a price or choose another model ({words})",
            metadata={"model": rejections[0].model},
        )
    if filters == {"cost"}:
        return Failure(
            Reason.COST_LIMIT,
            f"every candidate costs more than max_cost_nano_usd allows; raise it or shorten the request ({words})",
            metadata=metadata,
        )
    if "health" in filters:
        provider = next(rejection.model for rejection in rejections if rejection.filter == "health").partition("/")[0]
        return Failure(
            Reason.PROVIDER_UNAVAILABLE,
            f"no candidate can be called at the moment ({words})",
            metadata={"provider": provider, "status": "0", **metadata},
            retry_delay=2.0,
        )
    return Failure(
        Reason.NO_CANDIDATE,
        f"no candidate can take the request ({words})" if words else "the policy has no candidates for such requests",
        metadata=metadata,
    )


def context_window_exceeded(tokens: int, window: int) -> Failure:
    """The failure of a request that fits into no candidate's window. `window` is the largest; 0: not known."""
    return Failure(
        Reason.CONTEXT_WINDOW_EXCEEDED,
        f"prompt and answer need {tokens} tokens and the largest window has {window}; shorten the conversation or max_output_tokens",
        metadata={"input_tokens": str(tokens), "context_window": str(window)},
    )


def cost_limit(limit: int, needed: int) -> Failure:
    """The failure of a request whose own limit doesn't cover its prompt and a short answer. Nano-dollars."""
    return Failure(
        Reason.COST_LIMIT,
        f"the request may cost {limit} nano-USD and its prompt with a short answer costs up to {needed}; "
        "raise max_cost_nano_usd or shorten the prompt",
        metadata={"max_cost_nano_usd": str(limit)},
    )


def budget_exhausted(level: str, remaining: int, needed: int) -> Failure:
    """The failure of a request that what is left of the budget doesn't cover. Nano-dollars."""
    return Failure(
        Reason.BUDGET_EXHAUSTED,
        f"{remaining} nano-USD are left of the budget; the prompt with a short answer costs up to {needed}",
        metadata={"level": level or "key", "remaining_nano_usd": str(remaining), "needed_nano_usd": str(needed)},
    )
