"""The price book: dated prices by model, each with its source and a version that is a hash of the row.

Prices come from the catalogue, where it states them, else from the seed. `free` in the catalogue is a written zero. A model that
neither knows has no price: policy decides what that means, and it is never a silent zero.

    prices:                       # overrides, dollars per million tokens, decimal text
      "openai/gpt-4o": [{input: "2.50", output: "10", cached_input: "1.25", from: 2026-01-01}]
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Protocol

from services.metering.cost import Price
from services.runtime.config import ConfigError

_NANO: Final = 1_000_000_000
_MOST: Final = 1 << 60
"""Nano-dollars per million tokens; a price must fit an int64."""
_FIELDS: Final = ("input", "output", "cached_input", "reasoning", "cache_write", "image", "request")
_REQUIRED: Final = ("input", "output")


class Seed(Protocol):
    """Where prices come from that the catalogue doesn't state."""

    def __call__(self, kind: str, upstream_model: str, context_window: int) -> list[Price]:
        """Dated prices of a provider's model, oldest first, without version and model id; empty: unknown.

        Prices may depend on the prompt's length: they hold for prompts that fit `context_window` tokens; 0: any.
        """


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the catalogue names it."""

    id: str
    kind: str
    """Kind of its provider: `openai`, `anthropic`, `gemini`, `local`, `echo`."""
    upstream_model: str
    price: object
    """Its `price` as written; None: not written."""
    context_window: int = 0
    """Tokens; 0: not written."""


class PriceBook:
    """Prices by model and time. Immutable."""

    def __init__(self, prices: Mapping[str, list[Price]]) -> None:
        self._prices = prices
        self._by_version = {price.version: price for rows in prices.values() for price in rows}
        digest = hashlib.blake2b(digest_size=8)
        for version in sorted(self._by_version):
            digest.update(version.encode())
        self.version = digest.hexdigest()
        """Hash of the whole book."""

    def at(self, model: str, time: float) -> Price | None:
        """The price of `model` at the Unix time `time`; None: unknown."""
        rows = self._prices.get(model)
        if not rows:
            return None
        index = bisect.bisect_right([row.effective_from for row in rows], time) - 1
        if index < 0:
            return None
        ends = rows[index].effective_to
        return rows[index] if ends is None or time < ends else None

    def by_version(self, version: str) -> Price | None:
        """The row with this version."""
        return self._by_version.get(version)

    def all_at(self, time: float) -> Iterator[Price]:
        """The prices that hold at `time`, by model."""
        for model in sorted(self._prices):
            price = self.at(model, time)
            if price is not None:
                yield price


def versioned(model: str, rows: list[Price]) -> list[Price]:
    """The rows in order of time, each ending where the next begins, with versions."""
    ordered = sorted(rows, key=lambda row: row.effective_from)
    dated = []
    for index, row in enumerate(ordered):
        end = ordered[index + 1].effective_from if index + 1 < len(ordered) else row.effective_to
        row = dataclasses.replace(row, model=model, effective_to=end, version="")
        text = "\x1f".join(str(getattr(row, field.name)) for field in dataclasses.fields(row) if field.name != "effective_to")
        dated.append(dataclasses.replace(row, version=hashlib.blake2b(text.encode(), digest_size=8).hexdigest()))
    return dated


def build(catalogue: Mapping[str, Any], seed: Seed) -> PriceBook:
    """The book of a catalogue file's content. Raises ConfigError with every problem of the prices in it."""
    problems: list[str] = []
    prices: dict[str, list[Price]] = {}
    overrides = catalogue.get("prices") or {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(["prices: must be a mapping of catalogue ids"])
    for model in models_of(catalogue):
        written = overrides.get(model.id, model.price)
        rows = (
            seed(model.kind, model.upstream_model, model.context_window)
            if written is None
            else _written(model.id, written, problems)
        )
        if rows:
            prices[model.id] = versioned(model.id, rows)
    if problems:
        raise ConfigError(problems)
    return PriceBook(prices)


def models_of(catalogue: Mapping[str, Any]) -> Iterator[Model]:
    """The models that the catalogue names; faults in other fields are routing's business."""
    providers = catalogue.get("providers")
    models = catalogue.get("models")
    for name, entry in models.items() if isinstance(models, Mapping) else ():
        if not isinstance(entry, Mapping):
            continue
        provider = providers.get(str(entry.get("provider"))) if isinstance(providers, Mapping) else None
        kind = str(provider.get("kind", "")) if isinstance(provider, Mapping) else ""
        window = entry.get("context_window")
        upstream = str(entry.get("upstream_model") or str(name).rpartition("/")[2])
        yield Model(str(name), kind, upstream, entry.get("price"), window if isinstance(window, int) else 0)


def _written(model: str, value: object, problems: list[str]) -> list[Price]:
    if value == "free":
        return [Price("", model, 0, 0, source="catalogue: free")]
    entries = value if isinstance(value, list) else [value]
    rows = []
    for index, entry in enumerate(entries):
        where = f"prices.{model}[{index}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{where}: must be `free` or have input and output in dollars per million tokens")
            continue
        unknown = set(entry) - {*_FIELDS, "from"}
        missing = [name for name in _REQUIRED if name not in entry]
        problems += [f"{where}.{name}: unknown" for name in sorted(map(str, unknown))]
        problems += [f"{where}.{name}: must be set" for name in missing]
        if unknown or missing:
            continue
        amounts = {name: _amount(entry.get(name), f"{where}.{name}", problems) for name in _FIELDS}
        start = _moment(entry.get("from"), f"{where}.from", problems)
        rows.append(
            Price(
                "",
                model,
                amounts["input"] or 0,
                amounts["output"] or 0,
                amounts["cached_input"],
                amounts["reasoning"],
                amounts["cache_write"],
                amounts["image"] or 0,
                amounts["request"] or 0,
                start,
                None,
                "catalogue",
            )
        )
    return rows


def _amount(value: object, where: str, problems: list[str]) -> int | None:
    if value is None:
        return None
    try:
        # Through text, so that a YAML float such as 0.1 means what was written.
        nano = Decimal(str(value)) * _NANO
        if nano.is_finite() and 0 <= nano <= _MOST and nano == nano.to_integral_value():
            return int(nano)
    except InvalidOperation:
        pass
    problems.append(f"{where}: {value!r} is not an amount of dollars with at most 9 decimals, up to a billion")
    return None


def _moment(value: object, where: str, problems: list[str]) -> float:
    if value is None:
        return 0.0
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp()
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC).timestamp()
    problems.append(f"{where}: {value!r} is not a date")
    return 0.0
