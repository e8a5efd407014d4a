"""Metrics and one log line per request, gathered on the path and written behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import orjson

from services.gateway.receipts import Facts

if TYPE_CHECKING:
    from services.runtime.metrics import Counter, Histogram, Registry

_STATUS_NAMES: Final = ("none", "hit_exact", "hit_semantic", "miss", "bypass", "refresh", "unavailable")


class Journal:
    """Counts requests by kind, model, outcome and cache verdict, and writes a JSON line for each.

    `write` gets whole lines, many at a time: every `batch_seconds`, or as soon as `max_count` wait; None: no lines are wanted.
    """

    def __init__(self, registry: Registry, write: Callable[[bytes], None] | None, *, max_count: int, batch_seconds: float) -> None:
        labels = ("kind", "model", "outcome", "cache")
        self._requests = registry.counter("gateway_requests", "Requests by kind, model, outcome and cache verdict", labels)
        self._seconds = registry.histogram("gateway_request_seconds", "Time from arrival to the end of the answer", labels)
        self._degraded = registry.counter("gateway_degradations", "Steps that went on without a dependency", ("dependency",))
        self._children: dict[tuple[str, str, str, int], tuple[Counter, Histogram]] = {}
        self._write = write
        self._max_count = max_count
        self._batch_seconds = batch_seconds
        self._lines: list[tuple[Facts, str]] = []
        self._work = asyncio.Event()

    def add(self, facts: Facts, model: str, outcome: str) -> None:
        """Takes in a finished operation. `outcome` is `ok` or the reason of its failure."""
        key = (facts.kind, model, outcome, facts.cache_status)
        children = self._children.get(key)
        if children is None:
            children = self._bind(key)
        children[0].inc()
        children[1].observe((facts.end_ns - facts.start) / 1e9)
        if facts.degradations is not None:
            for degradation in facts.degradations:
                self._degraded.labels(degradation.partition(":")[0]).inc()
        if self._write is None:
            return
        lines = self._lines
        if not lines:
            self._work.set()
        lines.append((facts, outcome))
        if len(lines) >= self._max_count:
            self.flush()

    async def write_forever(self) -> None:
        """The worker."""
        while True:
            await self._work.wait()
            await asyncio.sleep(self._batch_seconds)
            self._work.clear()
            self.flush()

    def flush(self) -> None:
        """Writes the lines that wait."""
        lines, self._lines = self._lines, []
        if lines and self._write is not None:
            self._write(b"".join(_line(facts, outcome) for facts, outcome in lines))

    def _bind(self, key: tuple[str, str, str, int]) -> tuple[Counter, Histogram]:
        kind, model, outcome, status = key
        cache = _STATUS_NAMES[status] if status < len(_STATUS_NAMES) else "unknown"
        children = (
            self._requests.labels(kind, model, outcome, cache),
            self._seconds.labels(kind, model, outcome, cache),
        )
        if len(self._children) < self._max_count:
            self._children[key] = children
        return children


def _line(facts: Facts, outcome: str) -> bytes:
    principal = facts.principal
    answer = facts.answer
    fields: dict[str, object] = {
        "event": "request",
        "time_unix_ms": facts.receive_ns // 1_000_000,
        "operation_id": facts.operation_id,
        "kind": facts.kind,
        "outcome": outcome,
        "tenant_id": principal.tenant_id,
        "project_id": principal.project_id,
        "key_id": principal.key_id,
        "cache": _STATUS_NAMES[facts.cache_status] if facts.cache_status < len(_STATUS_NAMES) else "unknown",
        "duration_us": (facts.end_ns - facts.start) // 1000,
        "hold_nano_usd": facts.hold,
        "cost_nano_usd": facts.cost,
        "saved_nano_usd": facts.saved,
    }
    if facts.first_byte_ns:
        fields["first_byte_us"] = (facts.first_byte_ns - facts.start) // 1000
    if answer is not None:
        usage = answer.usage
        fields["model"] = answer.model
        fields["input_tokens"] = usage.input_token_count
        fields["output_tokens"] = usage.output_token_count
    if facts.attempts:
        fields["attempts"] = len(facts.attempts)
    if facts.plan is not None:
        fields["policy"] = facts.plan.response.policy
        fields["policy_version"] = facts.plan.response.policy_version
    if facts.degradations is not None:
        fields["degradations"] = facts.degradations
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
