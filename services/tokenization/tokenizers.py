"""The tokenizers at hand: loaded at first use, off the event loop, chosen by the catalogue's rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from services.tokenization.catalogue import Rule, Rules
from services.tokenization.conversation import Conversation
from services.tokenization.counting import Count, Counter, Method
from services.tokenization.errors import TokenizerMissing
from services.tokenization.estimator import EstimatedCounter, Estimator


class Loader(Protocol):
    """Loads the tokenizer that a rule names; blocking. Raises TokenizerMissing when it isn't on this machine."""

    def __call__(self, rule: Rule) -> Counter: ...


@dataclass(frozen=True, slots=True)
class Listed:
    """A tokenizer as it is listed."""

    name: str
    method: Method
    patterns: tuple[str, ...]
    error_bound: float


class Tokenizers:
    """Counters by model id. A tokenizer that is missing is reported once to `on_missing`, and its models are estimated."""

    def __init__(
        self, load: Loader, estimator: Estimator, rules: Rules, on_missing: Callable[[Rule, TokenizerMissing], None]
    ) -> None:
        self._load = load
        self._estimator = estimator
        self._rules = rules
        self._on_missing = on_missing
        self._loaded: dict[tuple[str, str], Counter | None] = {}
        self._loading: dict[tuple[str, str], asyncio.Task[Counter | None]] = {}
        self._by_model: dict[str, Counter] = {}

    def use(self, rules: Rules) -> None:
        """Takes new rules; tokenizers that are loaded stay so."""
        self._rules = rules
        self._by_model.clear()
        for key in [key for key, counter in self._loaded.items() if counter is None]:
            # What was missing may be there by now.
            del self._loaded[key]

    def known(self, model: str) -> Counter | None:
        """The counter of a model that was asked for before; None: use `counter`. Hot path, no waiting."""
        return self._by_model.get(model)

    async def counter(self, model: str) -> Counter:
        """The counter of a model."""
        rule = self._rules.rule_for(model)
        found: Counter | None = None
        if rule is not None and rule.kind != "estimate":
            found = await self._counter_of(rule)
        counter = found if found is not None else EstimatedCounter(model, self._estimator)
        if len(self._by_model) >= 10_000:
            self._by_model.clear()
        self._by_model[model] = counter
        return counter

    async def _counter_of(self, rule: Rule) -> Counter | None:
        key = (rule.kind, rule.place)
        if key in self._loaded:
            return self._loaded[key]
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load_one(rule), name=f"load {rule.place}")
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        # A caller that goes away must not end the load for the others.
        return await asyncio.shield(task)

    async def _load_one(self, rule: Rule) -> Counter | None:
        counter: Counter | None
        try:
            counter = await asyncio.to_thread(self._load, rule)
        except TokenizerMissing as error:
            self._on_missing(rule, error)
            counter = None
        self._loaded[rule.kind, rule.place] = counter
        return counter

    async def load_all(self) -> None:
        """Loads whatever the rules name, so that no request waits for it."""
        for rule in self._rules.rules:
            if rule.kind != "estimate":
                await self._counter_of(rule)

    def listed(self) -> Iterator[Listed]:
        """Every tokenizer of the rules, by name, the estimator included."""
        groups: dict[str, tuple[Counter, list[str]]] = {}
        estimated: list[str] = []
        for rule in self._rules.rules:
            counter = self._loaded.get((rule.kind, rule.place)) if rule.kind != "estimate" else None
            if counter is None:
                estimated.append(rule.pattern)
            else:
                groups.setdefault(counter.name, (counter, []))[1].append(rule.pattern)
        listed = [Listed(name, c.method, tuple(patterns), c.error_bound) for name, (c, patterns) in groups.items()]
        listed.append(Listed(EstimatedCounter.name, Method.ESTIMATED, (*estimated, "*"), 1.0))
        yield from sorted(listed, key=lambda one: one.name)


def count_all(counters: list[Counter], conversation: Conversation) -> list[Count]:
    """One count per counter; equal counters count once."""
    done: dict[int, Count] = {}
    counts = []
    for counter in counters:
        key = id(counter)
        if key not in done:
            done[key] = counter.count(conversation)
        counts.append(done[key])
    return counts
