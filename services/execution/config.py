"""Settings of the execution service."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the execution service."""

    reload_interval: float = setting(2.0, "Time between two looks at the catalogue file", unit="s", minimum=0.1, maximum=3600)
    connect_timeout: float = setting(5.0, "Time to connect to a provider", unit="s", minimum=0.05, maximum=60)
    first_byte_timeout: float = setting(120.0, "Time to the first byte of an answer", unit="s", minimum=0.1, maximum=3600)
    idle_timeout: float = setting(60.0, "Time between two pieces of a streamed answer", unit="s", minimum=0.1, maximum=3600)
    max_connections: int = setting(
        512, "Connections to one provider at once; further calls are refused as overloaded", minimum=1, maximum=65_535
    )
    keep_alive: float = setting(4.0, "Time that an idle connection to a provider is kept", unit="s", minimum=0, maximum=3600)
    max_answer_bytes: int = setting(32 * 1024 * 1024, "Largest answer of a provider", unit="bytes", minimum=64 * 1024)
    probe_interval: float = setting(15.0, "Time between two free probes of a provider", unit="s", minimum=0.1, maximum=3600)
    probe_timeout: float = setting(3.0, "Time that a probe may take", unit="s", minimum=0.05, maximum=60)
    report_interval: float = setting(1.0, "Time between two reports to routing", unit="s", minimum=0.05, maximum=60)
    breaker_failures: int = setting(5, "Consecutive failures that open a breaker", minimum=1, maximum=1000)
    breaker_window: float = setting(10.0, "Window over which the share of failures counts", unit="s", minimum=0.1, maximum=600)
    breaker_calls: int = setting(20, "Calls in the window from which the share of failures counts", minimum=2, maximum=100_000)
    breaker_share: float = setting(0.5, "Share of failures that opens a breaker", minimum=0.01, maximum=1)
    breaker_cooldown: float = setting(
        30.0, "Time that a breaker stays open; doubles with each failed probe", unit="s", minimum=0.05, maximum=600
    )
    breaker_longest: float = setting(300.0, "Longest time that a breaker stays open", unit="s", minimum=0.05, maximum=3600)
    breaker_successes: int = setting(3, "Successes that close a half-open breaker", minimum=1, maximum=100)
    spool_group: float = setting(0.005, "Longest time between a settlement and its fsync", unit="s", minimum=0.0005, maximum=1)
    spool_segment_bytes: int = setting(16 * 1024 * 1024, "Size at which a new spool file is begun", unit="bytes", minimum=4096)
    spool_bytes: int = setting(
        2 * 1024 * 1024 * 1024,
        "Most bytes of unposted settlements; beyond it calls are refused, never run unmetered",
        unit="bytes",
        minimum=65_536,
    )
    count_timeout: float = setting(
        0.5,
        "Counting a prompt that was sent uncounted and has to be charged by our count; then it is charged by its size",
        unit="s",
        minimum=0.05,
        maximum=60,
    )
    warm_local: bool = setting(False, "Start local models at once instead of at their first use")
