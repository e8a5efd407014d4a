"""Settings of the batching service."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the batching service."""

    classes: tuple[str, ...] = setting(
        ("default",), "Queue classes that jobs may name; each tenant has a queue of its own per class", minimum=1, maximum=16
    )
    queue_capacity: int = setting(
        10_000,
        "Jobs that may wait in one queue (a tenant and class); more are refused as QUEUE_FULL",
        minimum=1,
        maximum=10_000_000,
    )
    concurrency: int = setting(16, "Jobs that this process runs at once", minimum=1, maximum=10_000)
    tenant_concurrency: int = setting(8, "Jobs of one tenant that this process runs at once", minimum=1, maximum=10_000)
    max_retries: int = setting(3, "Further attempts after the first before a job is dead", minimum=0, maximum=20)
    first_backoff: float = setting(
        1.0, "Time before the first retry; each further one waits twice as long", unit="s", minimum=0.1, maximum=3600
    )
    longest_backoff: float = setting(300.0, "Longest time before a retry", unit="s", minimum=0.1, maximum=86_400)
    attempt_timeout: float = setting(300.0, "Time that one attempt may take", unit="s", minimum=1, maximum=3600)
    ack_wait: float = setting(
        30.0,
        "Time without a sign of life after which a job's message is delivered to another worker",
        unit="s",
        minimum=1,
        maximum=3600,
    )
    lifetime: float = setting(
        86_400.0, "Time after which a job that was not started expires, unless it says otherwise", unit="s", minimum=1
    )
    retention: float = setting(7 * 86_400.0, "Time for which jobs and their results are kept", unit="s", minimum=60)
    idle_queue: float = setting(600.0, "Time after which the consumer of an empty queue is removed", unit="s", minimum=10)
    replicas: int = setting(1, "Copies of streams and job table; 3 on a NATS cluster", minimum=1, maximum=5)
    poll_interval: float = setting(1.0, "Longest time between two looks for waiting jobs", unit="s", minimum=0.05, maximum=60)
    max_request_bytes: int = setting(1_000_000, "Largest job", unit="bytes", minimum=1024, maximum=8_000_000)
