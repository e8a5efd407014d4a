"""Metrics and one log line per request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from services.gateway.receipts import Facts

if TYPE_CHECKING:
    from services.runtime.metrics import Counter, Histogram, Registry


class RequestLine(Protocol):
    """Takes a line of the request log."""

    def __call__(self, values: Mapping[str, Any], *, is_plain: bool = False) -> None: ...


_STATUS_NAMES: Final = ("none", "hit_exact", "hit_semantic", "miss", "bypass", "refresh", "unavailable")
_MAX_BOUND: Final = 4096


class Journal:
    """Counts requests by kind, model, outcome and cache verdict, and gives a line for each to `log`; None: no lines are wanted.

    `log` must take a line without waiting: rendering and writing happen behind the path.
    """

    def __init__(self, registry: Registry, log: RequestLine | None) -> None:
        labels = ("kind", "model", "outcome", "cache")
        self._requests = registry.counter("gateway_requests", "Requests by kind, model, outcome and cache verdict.", labels)
        self._seconds = registry.histogram("gateway_request_seconds", "Time from arrival to the end of the answer.", labels)
        self._degraded = registry.counter("gateway_degradations", "Steps that went on without a dependency.", ("dependency",))
        self._children: dict[tuple[str, str, str, int], tuple[Counter, Histogram]] = {}
        self._log = log

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
        if self._log is not None:
            # Words come into a line by what went wrong alone.
            self._log(line_of(facts, model, outcome), is_plain=facts.degradations is None)

    def _bind(self, key: tuple[str, str, str, int]) -> tuple[Counter, Histogram]:
        kind, model, outcome, status = key
        children = (
            self._requests.labels(kind, model, outcome, _STATUS_NAMES[status]),
            self._seconds.labels(kind, model, outcome, _STATUS_NAMES[status]),
        )
        if len(self._children) < _MAX_BOUND:
            self._children[key] = children
        return children


def line_of(facts: Facts, model: str, outcome: str) -> dict[str, Any]:
    """The facts of an operation for the log: no text of the conversation, no secret."""
    principal = facts.principal
    line: dict[str, Any] = {
        "event": "request",
        "time_unix_ms": facts.receive_ns // 1_000_000,
        "operation_id": facts.operation_id,
        "kind": facts.kind,
        "outcome": outcome,
        "model": model,
        "tenant_id": principal.tenant_id,
        "project_id": principal.project_id,
        "key_id": principal.key_id,
        "cache": _STATUS_NAMES[facts.cache_status],
        "duration_us": (facts.end_ns - facts.start) // 1000,
        "first_byte_us": (facts.first_byte_ns - facts.start) // 1000 if facts.first_byte_ns else None,
        "hold_nano_usd": facts.hold,
        # The ledger knows it where nobody here does.
        "cost_nano_usd": None if facts.is_cost_unknown else facts.cost,
        "saved_nano_usd": facts.saved,
        "attempts": facts.attempt_count,
    }
    answer = facts.answer
    if answer is not None:
        usage = answer.usage
        line["input_tokens"] = usage.input_token_count
        line["output_tokens"] = usage.output_token_count
    plan = facts.plan
    if plan is not None:
        line["policy"] = plan.policy
        line["policy_version"] = plan.policy_version
    if facts.degradations is not None:
        line["degradations"] = facts.degradations
    return line
