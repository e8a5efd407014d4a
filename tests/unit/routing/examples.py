"""A small catalogue for tests."""

from __future__ import annotations

from typing import Any

from services.routing.catalogue import Catalogue, parse
from services.routing.planner import Planner
from services.routing.prices import Prices, Rates
from services.routing.statistics import Statistics


def model(provider: str, **changes: Any) -> dict[str, Any]:
    return {
        "provider": provider,
        "context_window": 1000,
        "max_output_tokens": 100,
        "capabilities": ["chat", "streaming"],
        **changes,
    }


def content() -> dict[str, Any]:
    """A file's content: `a/cheap`, `b/dear`, `c/seeing`, `d/secret` and a fake."""
    return {
        "providers": {
            "a": {"kind": "openai", "regions": ["eu"]},
            "b": {"kind": "openai"},
            "c": {"kind": "gemini"},
            "fake": {"kind": "echo"},
        },
        "models": {
            "a/cheap": model("a", aliases=["cheap"], fallbacks=["b/dear", "c/seeing"], fields=["seed"]),
            "b/dear": model("b", capabilities=["chat", "streaming", "tools"], context_window=8000, max_output_tokens=4000),
            "c/seeing": model("c", capabilities=["chat", "streaming", "vision", "tools"]),
            "c/near": model("c", capabilities=["chat", "vision"]),
            "fake/echo": model("fake", capabilities=["chat", "streaming", "vision", "tools"]),
        },
        "policies": {
            "default": {
                "weights": {"cost": 1},
                "task_types": {
                    "simple": ["b/dear", "a/cheap", "fake/echo"],
                    "reasoning": ["b/dear", "a/cheap", "c/seeing"],
                    "code": ["b/dear", "a/cheap", "c/seeing"],
                    "vision": ["c/seeing", "c/near", "fake/echo"],
                },
            },
            "house": {
                "order": "fixed",
                "tenants": ["acme"],
                "waive_fallbacks": "one machine only",
                "task_types": {task: ["c/seeing"] for task in ("simple", "reasoning", "code", "vision")},
            },
        },
        "task_types": {
            task: {"latency_target": "2s", "attempt_timeout": "500ms"} for task in ("simple", "reasoning", "code", "vision")
        },
    }


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def statistics(clock: Clock) -> Statistics:
    return Statistics(clock, samples=10, max_age=60.0, silence=30.0, max_models=3, max_reporters=2)


def planner(catalogue: Catalogue | None = None) -> Planner:
    prices: Prices[str] = Prices()
    prices.use(
        [
            ("a/cheap", Rates(1_000_000, 2_000_000), "row a"),
            ("b/dear", Rates(5_000_000, 9_000_000), "row b"),
            ("c/seeing", Rates(2_000_000, 3_000_000), "row c"),
            ("fake/echo", Rates(0, 0), "row fake"),
        ]
    )
    return Planner(catalogue or parse(content()), prices, statistics(Clock()))
