"""Makes plans: a chain, filtered, scored, ranked, with a reason for every model of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.routing import scorers
from services.routing.catalogue import DEFAULT_POLICY, MAX_CHAIN, Catalogue, Policy
from services.routing.classifier import TaskType, Verdict, classify, said
from services.routing.errors import ModelNotFound
from services.routing.filters import Ask, Prospect, Refusal, check, is_permitted
from services.routing.prices import Prices
from services.routing.statistics import Statistics

_MAX_COMPARED: Final = 500
POLICY_PREFIX: Final = "policy/"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its rank's reasons."""

    prospect: Prospect
    cost: int
    """Expected at most, nano-dollars."""
    scores: Mapping[str, float]
    total: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A ranked plan."""

    candidates: tuple[Ranked, ...]
    refusals: tuple[Refusal, ...]
    policy: str
    verdict: Verdict
    named: str
    """The model that the caller named; empty: a policy chose."""


@dataclass(frozen=True, slots=True)
class _Chain:
    models: tuple[str, ...]
    policy: Policy
    is_scored: bool
    permitted: frozenset[str]
    name: str


class Planner:
    """Plans by a catalogue, prices and statistics."""

    def __init__(self, catalogue: Catalogue, prices: Prices[Any], statistics: Statistics) -> None:
        self.catalogue = catalogue
        """The one in use; replaced as a whole when the file changes."""
        self.prices = prices
        self.statistics = statistics

    def plan(self, ask: Ask) -> Plan:
        """The plan for a request. Raises ModelNotFound."""
        verdict = classify(ask.features) if ask.task_type is None else said(ask.task_type)
        chain = self._chain(ask, verdict.task_type)
        field, refusals = [], []
        for place, name in enumerate(chain.models):
            prospect = self._prospect(name, place, permitted=name in chain.permitted)
            refusal = check(ask, prospect, allows_unknown_price=chain.policy.allows_unknown_price)
            if refusal is None:
                field.append(prospect)
            else:
                refusals.append(refusal)
        ranked = self._rank(ask, chain, field, self.catalogue.times[verdict.task_type].latency_target)
        named = "" if chain.name else chain.models[0]
        return Plan(tuple(ranked), tuple(refusals), chain.name, verdict, named)

    def health(self, name: str) -> str:
        """Why a model can't be called at the moment; empty: it can."""
        return self.statistics.problem(name)

    def _chain(self, ask: Ask, task_type: TaskType) -> _Chain:
        catalogue = self.catalogue
        wanted = "" if ask.model == "auto" else ask.model
        if not wanted or wanted.startswith(POLICY_PREFIX):
            name = wanted.removeprefix(POLICY_PREFIX) or DEFAULT_POLICY
            policy = catalogue.policies.get(name)
            if policy is None or (policy.tenants and ask.tenant not in policy.tenants):
                raise ModelNotFound(wanted)
            models = policy.chains[task_type]
            if is_permitted(ask.allowed, (f"{POLICY_PREFIX}{name}", name)):
                permitted = frozenset(models)
            else:
                permitted = self._permitted(ask, models)
            return _Chain(models if ask.allow_fallback else models[:1], policy, policy.is_scored, permitted, name)
        found = catalogue.names.get(wanted)
        if found is None:
            raise ModelNotFound(wanted, self._near(ask, wanted))
        models = (found, *(catalogue.models[found].fallbacks if ask.allow_fallback else ()))
        permitted = self._permitted(ask, models)
        if found not in permitted:
            # Whoever may not use it needn't learn that it is there.
            raise ModelNotFound(wanted)
        # Whoever names a model gets it while it can answer; its fallbacks stand in the order of the catalogue.
        return _Chain(models[:MAX_CHAIN], catalogue.policies[DEFAULT_POLICY], False, permitted, "")

    def _near(self, ask: Ask, wanted: str) -> list[str]:
        """Names like the wanted one, of models that the key may use."""
        names = [name for name in self.catalogue.names if is_permitted(ask.allowed, (name,))][:_MAX_COMPARED]
        ends = [name for name in names if name.rpartition("/")[2] == wanted]
        return ends[:2] or difflib.get_close_matches(wanted[:200], names, n=2)

    def _permitted(self, ask: Ask, models: tuple[str, ...]) -> frozenset[str]:
        entries = self.catalogue.models
        return frozenset(name for name in models if is_permitted(ask.allowed, (name, *entries[name].aliases)))

    def _prospect(self, name: str, place: int, *, permitted: bool) -> Prospect:
        statistics = self.statistics
        return Prospect(
            model=self.catalogue.models[name],
            place=place,
            rates=self.prices.rates(name),
            permitted=permitted,
            latency=statistics.latency(name),
            in_flight=statistics.in_flight(name),
            problem=statistics.problem(name),
        )

    def _rank(self, ask: Ask, chain: _Chain, field: list[Prospect], latency_target: float) -> list[Ranked]:
        if not field:
            return []
        by_scorer = {name: scorer(ask, field, latency_target) for name, scorer in scorers.ALL.items()}
        weights = chain.policy.weights
        ranked = []
        for index, prospect in enumerate(field):
            scores = {name: found[index] for name, found in by_scorer.items()}
            total = sum(weights[name] * score for name, score in scores.items())
            ranked.append(Ranked(prospect, prospect.cost(ask), scores, total, _reason(ask, chain, prospect, scores)))
        if chain.is_scored:
            # Ties keep the order of the chain; a fake never stands before a real model, whatever it costs.
            ranked.sort(key=lambda one: (one.prospect.model.is_fake, -one.total, one.prospect.place))
        return ranked


def _reason(ask: Ask, chain: _Chain, prospect: Prospect, scores: Mapping[str, float]) -> str:
    if not chain.name:
        return "named by the caller" if prospect.place == 0 else f"fallback {prospect.place} of {chain.models[0]}"
    if not chain.is_scored:
        return f"place {prospect.place + 1} of policy {chain.name}"
    return ", ".join(f"{name} {score:.2f} x {chain.policy.weights[name]:.2f}" for name, score in scores.items())
