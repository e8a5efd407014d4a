"""Hard filters: what a model must be to be a candidate at all. Each says in words why it refuses.

The order is the order of what a caller can do about it: a model that can't do what is asked is told so before its price or health.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.routing.catalogue import Model
from services.routing.classifier import Features, TaskType
from services.routing.prices import Rates

NO_FEATURES: Final = Features()
_WORDS: Final = {"field:reasoning_effort": "reasoning_effort where a tool must be called or stands for the response format"}
"""For needs whose name alone doesn't say what is lacking."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a plan is asked for."""

    tenant: str
    model: str = ""
    """Catalogue id, alias or `policy/<name>`; empty: the default policy."""
    task_type: TaskType | None = None
    """None: to be inferred."""
    features: Features = NO_FEATURES
    needs: tuple[str, ...] = ()
    input_bound: int = 0
    """Upper bound of the prompt, tokens."""
    max_output: int = 0
    """Upper bound of the answer, tokens; 0: the model's own."""
    max_cost: int = 0
    """Nano-dollars; 0: no limit."""
    max_latency: float = 0.0
    """Seconds; 0: no limit."""
    region: str = ""
    affinity: int = -1
    """Bucket 0 to 63; -1: none."""
    allow_fallback: bool = True
    allowed: frozenset[str] = frozenset()
    """Models that the key may use; empty: all."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A model of the chain with what is known of it now."""

    model: Model
    place: int
    """In the chain, from 0."""
    rates: Rates | None
    """None: no price is known."""
    permitted: bool
    latency: float | None
    """Median seconds of a whole answer; None: not known."""
    in_flight: int
    problem: str
    """Why no call passes at the moment; empty: calls pass."""

    def output_bound(self, ask: Ask) -> int:
        """Upper bound of the answer, tokens."""
        own = self.model.max_output_tokens
        room = max(0, self.model.context_window - ask.input_bound)
        return min(ask.max_output or own, own, room)

    def cost(self, ask: Ask) -> int:
        """Nano-dollars that the request may cost; 0 where no price is known."""
        return 0 if self.rates is None else self.rates.cost(ask.input_bound, self.output_bound(ask))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model is no candidate."""

    model: str
    filter: str
    """permission, capability, region, context_window, price, cost, health or latency."""
    reason: str
    missing: str = ""
    """The need that it lacks, for `capability`."""


def _permission(ask: Ask, prospect: Prospect) -> Refusal | None:
    if prospect.permitted:
        return None
    return Refusal(prospect.model.id, "permission", "the key may not use it")


def _capability(ask: Ask, prospect: Prospect) -> Refusal | None:
    for need in ask.needs:
        if need not in prospect.model.abilities:
            return Refusal(
                prospect.model.id, "capability", f"it has no {_WORDS.get(need) or need.removeprefix('field:')}", need
            )
    return None


def _region(ask: Ask, prospect: Prospect) -> Refusal | None:
    regions = prospect.model.regions
    if not ask.region or ask.region in regions:
        return None
    where = f"it runs in {', '.join(regions)}" if regions else "the catalogue doesn't say where it runs"
    return Refusal(prospect.model.id, "region", f"{where}, and the request must stay in {ask.region}")


def _context_window(ask: Ask, prospect: Prospect) -> Refusal | None:
    window = prospect.model.context_window
    if ask.input_bound < window:
        return None
    return Refusal(
        prospect.model.id, "context_window", f"the prompt has up to {ask.input_bound} tokens and the window {window}"
    )


def _price(ask: Ask, prospect: Prospect, *, allows_unknown: bool) -> Refusal | None:
    if prospect.rates is not None or allows_unknown:
        return None
    return Refusal(prospect.model.id, "price", "no price is known, and the policy refuses such models")


def _cost(ask: Ask, prospect: Prospect) -> Refusal | None:
    if not ask.max_cost or prospect.rates is None:
        return None
    # The answer is cut to what the limit pays for, so what must fit is the prompt and one token.
    least = prospect.rates.cost(ask.input_bound, min(1, prospect.output_bound(ask)))
    if least <= ask.max_cost:
        return None
    return Refusal(
        prospect.model.id, "cost", f"the prompt alone may cost {least} nano-USD, and the limit is {ask.max_cost} nano-USD"
    )


def _health(ask: Ask, prospect: Prospect) -> Refusal | None:
    return Refusal(prospect.model.id, "health", prospect.problem) if prospect.problem else None


def _latency(ask: Ask, prospect: Prospect) -> Refusal | None:
    if not ask.max_latency or prospect.latency is None or prospect.latency <= ask.max_latency:
        return None
    return Refusal(
        prospect.model.id,
        "latency",
        f"half of its answers take {prospect.latency:.2f} s, and the limit is {ask.max_latency:g} s",
    )


_BEFORE_PRICE: Final[tuple[Callable[[Ask, Prospect], Refusal | None], ...]] = (
    _permission,
    _capability,
    _region,
    _context_window,
)
_AFTER_PRICE: Final[tuple[Callable[[Ask, Prospect], Refusal | None], ...]] = (_cost, _health, _latency)


def check(ask: Ask, prospect: Prospect, *, allows_unknown_price: bool) -> Refusal | None:
    """The first refusal; None: it is a candidate."""
    for one in _BEFORE_PRICE:
        refusal = one(ask, prospect)
        if refusal is not None:
            return refusal
    refusal = _price(ask, prospect, allows_unknown=allows_unknown_price)
    if refusal is not None:
        return refusal
    for one in _AFTER_PRICE:
        refusal = one(ask, prospect)
        if refusal is not None:
            return refusal
    return None


def is_permitted(allowed: frozenset[str], names: tuple[str, ...]) -> bool:
    """Whether a key that may use `allowed` may use a thing of these names."""
    return not allowed or any(name in allowed for name in names)
