"""Errors of the batching service.

Failure
└── BatchingError
    ├── QueueFull         the tenant's queue takes no more
    ├── TooLarge          more bytes than the broker takes in a message
    ├── QueueUnavailable  NATS can't be reached: nothing is accepted in memory
    ├── JobNotFound       no such job of this tenant
    ├── JobIdReused       the request id was used for another body
    └── JobState          the job's state doesn't allow it
Conflict                  a compare-and-set lost; inside the service only
"""

from __future__ import annotations

from services.runtime.errors import Failure, Reason


class BatchingError(Failure):
    """Base of the service's own errors."""


class QueueFull(BatchingError):
    """The tenant's queue takes no more."""

    def __init__(self, capacity: int) -> None:
        super().__init__(
            Reason.QUEUE_FULL,
            f"the queue holds {capacity} jobs and takes no more; wait until some are done",
            metadata={"limit": str(capacity)},
            retry_delay=5.0,
        )


class TooLarge(BatchingError):
    """More bytes than the broker takes in a message."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            Reason.REQUEST_TOO_LARGE,
            f"the job, with its answer if it has one, has {size} bytes, and the queue takes at most {limit}",
            metadata={"limit": str(limit)},
        )


class QueueUnavailable(BatchingError):
    """NATS can't be reached."""

    def __init__(self) -> None:
        super().__init__(
            Reason.DEPENDENCY_UNAVAILABLE,
            "the job queue can't be reached; nothing was accepted, submit again with the same request_id",
            metadata={"dependency": "nats"},
            retry_delay=2.0,
        )


class JobNotFound(BatchingError):
    """No such job of this tenant."""

    def __init__(self, job_id: str) -> None:
        super().__init__(Reason.RESOURCE_NOT_FOUND, f"there is no job {job_id!r}", metadata={"resource": f"jobs/{job_id}"})


class JobIdReused(BatchingError):
    """The request id was used for another body."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            Reason.REQUEST_ID_REUSED,
            f"request_id {request_id!r} was used for another job; use a new one",
            metadata={"request_id": request_id},
        )


class JobState(BatchingError):
    """The job's state doesn't allow it."""

    def __init__(self, job_id: str, state: str, wanted: str) -> None:
        super().__init__(
            Reason.STATE_CONFLICT, f"job {job_id!r} is {state}; only a {wanted} one can be run again", metadata={"state": state}
        )


class Conflict(Exception):
    """A compare-and-set lost against another writer: read again and decide anew."""
