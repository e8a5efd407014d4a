"""A job and its states. Pure: every change is a new value, times are given.

QUEUED ─start─► RUNNING ─► SUCCEEDED | FAILED | DEAD
   │               │ ▲
   │            retry│start
   ▼               ▼ │
EXPIRED         RETRYING         (CANCELLED from any state that is not final)
"""

from __future__ import annotations

import base64
import enum
import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import Final

from services.runtime.errors import Code, Failure, Reason


class State(enum.Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


FINAL: Final = frozenset({State.SUCCEEDED, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Job:
    """A request that runs later. Times are Unix seconds; 0: not yet."""

    id: str
    tenant_id: str
    project_id: str
    key_id: str
    job_class: str
    request: object
    """The GenerateRequest: carried from submit to worker, never looked into here."""
    submit_sha256: bytes
    create_time: float
    not_before_time: float
    deadline_time: float
    state: State = State.QUEUED
    attempts: int = 0
    """Times that it was started."""
    response: object | None = None
    """The GenerateResponse, once there is one."""
    failure: Failure | None = None
    start_time: float = 0.0
    end_time: float = 0.0
    next_attempt_time: float = 0.0
    generation: int = 0
    """Times that it was redriven."""
    allowed_models: tuple[str, ...] = ()
    """Models that the key could use when the job was accepted; empty: all."""
    cache_namespace: str = ""
    """Cache namespace of the key."""

    @property
    def is_final(self) -> bool:
        """Whether it will never change again, redrive apart."""
        return self.state in FINAL

    def started(self, now: float) -> Job:
        """Running, one attempt more."""
        return replace(self, state=State.RUNNING, attempts=self.attempts + 1, start_time=now, next_attempt_time=0.0)

    def succeeded(self, response: object, now: float) -> Job:
        """Answered."""
        return replace(self, state=State.SUCCEEDED, response=response, failure=None, end_time=now)

    def ended(self, state: State, now: float, failure: Failure | None = None) -> Job:
        """In a final state without an answer."""
        return replace(self, state=state, failure=failure or self.failure, end_time=now, next_attempt_time=0.0)

    def retrying(self, failure: Failure, at: float) -> Job:
        """Waiting for its next attempt."""
        return replace(self, state=State.RETRYING, failure=failure, next_attempt_time=at)

    def redriven(self, now: float, lifetime: float) -> Job:
        """Queued anew with fresh attempts."""
        return replace(
            self,
            state=State.QUEUED,
            attempts=0,
            failure=None,
            end_time=0.0,
            next_attempt_time=0.0,
            not_before_time=0.0,
            deadline_time=now + lifetime,
            generation=self.generation + 1,
        )


@dataclass(frozen=True, slots=True)
class Retries:
    """When a failed attempt is tried again."""

    most: int
    first: float
    """Seconds before the first retry; doubles."""
    longest: float
    """Seconds."""

    def delay(self, attempts: int, failure: Failure) -> float | None:
        """Seconds until the next attempt after `attempts` of them; None: there is none.

        The caller's own faults are not tried again. A retry delay that the failure names is a lower bound.
        """
        if attempts > self.most or not may_succeed_later(failure):
            return None
        # Jobs that failed together must not come back together, those that wait longest included.
        backoff = min(self.longest / 1.25, self.first * 2.0 ** (attempts - 1))
        backoff *= 0.75 + secrets.randbelow(1000) / 2000
        return max(backoff, min(failure.retry_delay or 0.0, self.longest))


_FAULTS: Final = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.PERMISSION_DENIED,
        Code.FAILED_PRECONDITION,
        Code.UNIMPLEMENTED,
        Code.UNAUTHENTICATED,
    }
)


def may_succeed_later(failure: Failure) -> bool:
    """Whether the same request may succeed at another time."""
    return failure.code not in _FAULTS and failure.reason is not Reason.REQUEST_TOO_LARGE


def job_id(tenant_id: str, request_id: str) -> str:
    """The id of a job: a hash of tenant and request id, so that a repeated submit finds the first job; random without one."""
    if not request_id:
        return "job_" + base64.b32encode(secrets.token_bytes(20)).decode().lower()
    digest = hashlib.sha256(f"{len(tenant_id)}:{tenant_id}:{request_id}".encode()).digest()
    return "job_" + base64.b32encode(digest[:20]).decode().lower()
