"""What jobs need of the world: a table that compares and sets, and queues that keep."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from services.batching.job import Job
from services.runtime.errors import Failure


@dataclass(frozen=True, slots=True)
class Row:
    """A job as read, with the revision that a change must name."""

    job: Job
    revision: int


class JobTable(Protocol):
    """The job table. Every call raises QueueUnavailable when the store can't be reached in time."""

    async def get(self, tenant_id: str, job_id: str) -> Row | None:
        """The job, or None."""

    async def create(self, job: Job) -> int:
        """Inserts a job and returns its revision. Raises Conflict when there is one, TooLarge."""

    async def replace(self, job: Job, revision: int) -> int:
        """Replaces the job if its revision is still `revision`. Raises Conflict otherwise, TooLarge."""

    def list(self, tenant_id: str) -> AsyncIterator[Job]:
        """Every job of a tenant, in no order."""

    def watch(self, tenant_id: str, job_id: str) -> AsyncGenerator[Job, None]:
        """The job now and at every change, the latest at least when they come fast; ends never by itself."""


@dataclass(frozen=True, slots=True)
class QueueName:
    """One queue: a tenant and a class."""

    tenant_id: str
    job_class: str


@dataclass(frozen=True, slots=True)
class Ticket:
    """What travels through a queue: enough to rebuild the job when the table lost it."""

    job: Job
    attempt: int
    """The attempt that it asks for, from 1."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A ticket that was handed to this worker."""

    ticket: Ticket
    extend: Callable[[], Awaitable[None]]
    """Says that work goes on: the ticket isn't delivered to another worker yet."""
    done: Callable[[], Awaitable[None]]
    """Removes the ticket, confirmed by the server. May raise QueueUnavailable: then it is delivered again."""


class Queues(Protocol):
    """The queues. Every call raises QueueUnavailable when the broker can't be reached in time."""

    async def put(self, ticket: Ticket) -> None:
        """Appends a ticket, durably. Raises QueueFull, TooLarge."""

    async def put_later(self, ticket: Ticket, at: float) -> None:
        """Appends a ticket at the Unix time `at`, durably kept until then. Raises TooLarge."""

    async def bury(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """Puts a ticket among the dead letters, durably."""

    async def waiting(self) -> dict[QueueName, int]:
        """Queues that have tickets, with their number, those handed out included."""

    async def take(self, queue: QueueName, most: int) -> list[Delivery]:
        """Up to `most` tickets; returns soon when there is none."""

    async def announce_cancel(self, tenant_id: str, job_id: str) -> None:
        """Tells all workers that a job was cancelled. Best effort."""
