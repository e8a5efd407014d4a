"""Providers and breakers as they are now: replaced as a whole when the catalogue changes, breakers stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from services.execution.breaker import Breaker, Figures
from services.execution.provider import Provider

_MOST_BREAKERS = 10_000


@dataclass(slots=True)
class Probe:
    """What the last free probe of a provider said."""

    healthy: bool | None = None
    detail: str = ""
    time: float = 0.0
    """Unix seconds; 0: not yet."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """One model at one provider, under one credential."""

    model: str
    provider: str
    breaker: Breaker


class Targets:
    """What can be called."""

    def __init__(self, figures: Figures, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        """`rng` gives the breakers' jitter; None: each has its own."""
        self._figures = figures
        self._clock = clock
        self._rng = rng
        self.providers: Mapping[str, Provider] = {}
        self.probes: dict[str, Probe] = {}
        self.drain_seconds: Mapping[str, float] = {}
        """For how long a provider's stream is read on after its caller has left; those that aren't here are cut."""
        self._targets: dict[tuple[str, str, str], Target] = {}

    def use(self, providers: Mapping[str, Provider], drain_seconds: Mapping[str, float] | None = None) -> None:
        """Takes other providers."""
        self.providers = providers
        self.drain_seconds = drain_seconds or {}
        self.probes = {name: self.probes.get(name, Probe()) for name in providers}
        self._targets = {key: target for key, target in self._targets.items() if key[0] in providers}

    def target(self, provider_id: str, provider: Provider, model: str) -> Target:
        """The target of a model; made at its first use."""
        key = (provider_id, model, provider.credential)
        target = self._targets.get(key)
        if target is None:
            if len(self._targets) >= _MOST_BREAKERS:
                del self._targets[next(iter(self._targets))]
            target = self._targets[key] = Target(model, provider_id, Breaker(self._figures, self._clock, self._rng))
        return target

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._targets.values()))
