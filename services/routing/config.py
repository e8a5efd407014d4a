"""Settings of the routing service. Models and policies stand in the catalogue file."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the routing service."""

    reload_interval: float = setting(2.0, "Time between two looks at the catalogue file", unit="s", minimum=0.1, maximum=3600)
    plan_reuse: float = setting(
        2.0,
        "How long a gateway may reuse a plan for equal requests; health takes this long to be seen",
        unit="s",
        minimum=0,
        maximum=60,
    )
    price_interval: float = setting(60.0, "Time between two looks at the price book", unit="s", minimum=1, maximum=3600)
    latency_samples: int = setting(256, "Durations per model from which percentiles are taken", minimum=5, maximum=10_000)
    latency_age: float = setting(600.0, "Durations older than this don't count", unit="s", minimum=1, maximum=86_400)
    report_silence: float = setting(
        30.0,
        "What an execution process said of its targets holds this long without a word from it",
        unit="s",
        minimum=1,
        maximum=3600,
    )
    max_reporters: int = setting(1000, "Execution processes whose reports are kept", minimum=1, maximum=100_000)
