"""Settings of the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.edge.config import EdgeConfig
from services.runtime.config import setting

_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseConfig:
    """What is leased from metering at a time, for each key and replica. Rates may overshoot by replicas times these; money never."""

    request_count: int = setting(32, "Requests of a rate slice", minimum=1, maximum=1_000_000)
    token_count: int = setting(200_000, "Tokens of a rate slice", minimum=1, maximum=1_000_000_000)
    concurrency: int = setting(
        8, "Concurrent requests asked for at first; twice as many as run where more run", minimum=1, maximum=1_000_000
    )
    nano_usd: int = setting(100_000_000, "Money of a slice; grows with the holds that are seen", unit="nano-USD", minimum=0)
    max_count: int = setting(10_000, "Keys that may hold a lease at once", minimum=1, maximum=10_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """Longest time that a request waits for each step; the caller's deadline may be shorter."""

    authenticate: float = setting(2.0, "Finding out whom a key stands for", unit="s", minimum=0.001, maximum=60)
    lease: float = setting(2.0, "Renewing a lease, or a hold of its own", unit="s", minimum=0.001, maximum=60)
    lookup: float = setting(0.25, "Asking the cache; then the request goes on without", unit="s", minimum=0.001, maximum=60)
    plan: float = setting(1.0, "Asking routing; then the last good plan serves", unit="s", minimum=0.001, maximum=60)
    count: float = setting(0.25, "Counting tokens; then they are estimated", unit="s", minimum=0.001, maximum=60)
    background: float = setting(
        5.0,
        "Calls behind the path: stores, settlements of hits, observations, returned leases",
        unit="s",
        minimum=0.01,
        maximum=60,
    )
    drain: float = setting(10.0, "Waiting for requests under way at the end of the process", unit="s", minimum=0, maximum=600)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which of the prompts that had to be estimated are reported to the estimator with the usage that their provider stated."""

    sample_count: int = setting(
        20, "Prompts of a model that are reported in an interval; 0: none, the estimator doesn't learn", minimum=0, maximum=1000
    )
    sample_seconds: float = setting(
        5.0, "Length of the interval, at whose end they are sent", unit="s", minimum=0.1, maximum=3600
    )
    max_count: int = setting(
        1000, "Prompts of all models that may wait to be sent; more are dropped", minimum=1, maximum=100_000
    )
    max_bytes: int = setting(
        2 * _MEBIBYTE,
        "Bytes of the prompts that may wait to be sent; more, and any prompt that is larger, are dropped",
        unit="bytes",
        minimum=1024,
        maximum=8 * _MEBIBYTE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedReplayConfig:
    """Answers to requests with a request id, kept in NATS for all gateways: a repetition gets them also after a crash."""

    enabled: bool = setting(True, "Whether they are kept. Without it each gateway has those that it gave itself, in its memory")
    seconds: float = setting(86_400.0, "How long they are kept", unit="s", minimum=60, maximum=2_592_000)
    max_bytes: int = setting(
        1024 * _MEBIBYTE, "Disk of all of them; when it is used up new ones are not kept", unit="bytes", minimum=_MEBIBYTE
    )
    max_entry_bytes: int = setting(
        4 * _MEBIBYTE,
        "Largest answer that is kept; NATS's own max_payload must be larger",
        unit="bytes",
        minimum=1024,
        maximum=60 * _MEBIBYTE,
    )
    replicas: int = setting(1, "Servers of the NATS cluster that keep each", minimum=1, maximum=5)
    read_timeout: float = setting(0.1, "Longest wait to look one up", unit="s", minimum=0.005, maximum=5)
    write_timeout: float = setting(
        0.25, "Longest wait to keep one, before the caller gets its end", unit="s", minimum=0.01, maximum=5
    )
    max_waiting: int = setting(256, "Answers that wait to be kept at once; more are not kept", minimum=1, maximum=100_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the gateway."""

    edge: EdgeConfig = setting(EdgeConfig(), "The HTTP edge")
    lease: LeaseConfig = setting(LeaseConfig(), "What is leased from metering at a time, for each key and replica")
    budgets: BudgetConfig = setting(BudgetConfig(), "Longest time that a request waits for each step")
    calibration: CalibrationConfig = setting(CalibrationConfig(), "What the estimator of token counts is told to learn from")
    max_request_bytes: int = setting(
        16 * _MEBIBYTE, "Largest conversation", unit="bytes", minimum=1024, maximum=256 * _MEBIBYTE
    )
    default_max_output_tokens: int = setting(
        4096,
        "Longest answer of a model whose own limit is unknown, when the caller sets none",
        unit="tokens",
        minimum=1,
        maximum=1_000_000,
    )
    min_output_tokens: int = setting(
        16,
        "Shortest answer that is worth a hold: with less money left the request is refused",
        unit="tokens",
        minimum=1,
        maximum=100_000,
    )
    uncounted_bytes: int = setting(
        8192,
        "Largest prompt that may be sent without its tokens being counted: where the answer comes as a whole, no receipt is asked for and "
        "the budget has room for as many tokens as bytes. 0: every prompt is counted",
        unit="bytes",
        minimum=0,
        maximum=_MEBIBYTE,
    )
    recheck_seconds: float = setting(
        30.0, "Longest time that an identity is used without asking metering again", unit="s", minimum=1, maximum=300
    )
    max_identities: int = setting(10_000, "Keys whose identity is remembered", minimum=1, maximum=10_000_000)
    max_plans: int = setting(4096, "Plans that are remembered", minimum=1, maximum=1_000_000)
    replay_count: int = setting(
        10_000, "Finished requests with a request id that can be replayed", minimum=1, maximum=10_000_000
    )
    replay_bytes: int = setting(64 * _MEBIBYTE, "Memory of their answers", unit="bytes", minimum=0)
    replay_seconds: float = setting(86_400.0, "How long they are kept, memory permitting", unit="s", minimum=1)
    linger_seconds: float = setting(
        10.0,
        "How long a request with a request id goes on when its caller has gone, so that its repetition joins it. 0: it is cancelled at once, "
        "as requests without one are",
        unit="s",
        minimum=0,
        maximum=600,
    )
    shared_replays: SharedReplayConfig = setting(SharedReplayConfig(), "Answers that all gateways can replay")
    store_count: int = setting(1024, "Answers that may wait to be stored in the cache; more are dropped", minimum=1)
    store_bytes: int = setting(32 * _MEBIBYTE, "Bytes of the answers that may wait to be stored", unit="bytes", minimum=1)
    hit_count: int = setting(100_000, "Cache hits that may wait to be booked; more are dropped", minimum=1)
    outcome_count: int = setting(100_000, "Operations whose reported outcome is remembered", minimum=1)
    log_requests: bool = setting(True, "Whether a line is logged for each request")
