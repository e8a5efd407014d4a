"""What tenants do with jobs: submit, look, cancel, run again. Order of writes and who wins when two race is decided here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from services.batching.errors import Conflict, JobIdReused, JobNotFound, JobState
from services.batching.job import Job, State
from services.batching.ports import JobTable, Queues, Row, Ticket


@dataclass(frozen=True, slots=True)
class Owner:
    """Who submits: out of the key, never out of the request."""

    tenant_id: str
    project_id: str
    key_id: str
    allowed_models: tuple[str, ...] = ()
    cache_namespace: str = ""


class CancelHere(Protocol):
    """Ends a job's attempt if it runs in this process."""

    def __call__(self, job_id: str) -> None: ...


class Jobs:
    """The jobs of all tenants; each call names the tenant and sees nothing else."""

    def __init__(
        self, table: JobTable, queues: Queues, cancel_here: CancelHere, *, lifetime: float, clock: Callable[[], float]
    ) -> None:
        self._table = table
        self._queues = queues
        self._cancel_here = cancel_here
        self._lifetime = lifetime
        self._clock = clock

    async def submit(self, job: Job, request_id: str) -> Job:
        """Accepts a job; the ticket is durable before the table says so, and either alone leads to the job being run.

        Raises JobIdReused, QueueFull, QueueUnavailable.
        """
        known = await self._table.get(job.tenant_id, job.id)
        if known is None:
            if job.not_before_time > self._clock():
                await self._queues.put_later(Ticket(job, 1), job.not_before_time)
            else:
                await self._queues.put(Ticket(job, 1))
            try:
                await self._table.create(job)
            except Conflict:
                # A worker, or a second submit of the same id, was faster: the table's word holds.
                known = await self._table.get(job.tenant_id, job.id)
            else:
                return job
        if known is None:
            return job
        if known.job.submit_sha256 != job.submit_sha256:
            raise JobIdReused(request_id)
        return known.job

    async def get(self, tenant_id: str, job_id: str) -> Job:
        """The job. Raises JobNotFound."""
        return (await self._row(tenant_id, job_id)).job

    async def _row(self, tenant_id: str, job_id: str) -> Row:
        row = await self._table.get(tenant_id, job_id)
        if row is None:
            raise JobNotFound(job_id)
        return row

    async def list(self, tenant_id: str, state: State | None) -> list[Job]:
        """Jobs of a tenant, newest first."""
        found = [job async for job in self._table.list(tenant_id) if state is None or job.state is state]
        return sorted(found, key=lambda job: (-job.create_time, job.id))

    async def watch(self, tenant_id: str, job_id: str) -> AsyncGenerator[Job, None]:
        """The job now and at every change, until it is final. Raises JobNotFound."""
        await self._row(tenant_id, job_id)
        async with contextlib.aclosing(self._table.watch(tenant_id, job_id)) as changes:
            async for job in changes:
                yield job
                if job.is_final:
                    return

    async def cancel(self, tenant_id: str, job_id: str) -> Job:
        """The job, CANCELLED unless it had finished. Raises JobNotFound."""
        while True:
            row = await self._row(tenant_id, job_id)
            if row.job.is_final:
                return row.job
            cancelled = row.job.ended(State.CANCELLED, self._clock())
            try:
                await self._table.replace(cancelled, row.revision)
            except Conflict:
                continue
            self._cancel_here(job_id)
            await self._queues.announce_cancel(tenant_id, job_id)
            return cancelled

    async def redrive(self, tenant_id: str, job_id: str) -> Job:
        """Runs a dead job again; as for `submit`, the ticket comes first and either write alone leads to the job being run.

        Raises JobNotFound, JobState, QueueFull, QueueUnavailable.
        """
        row = await self._row(tenant_id, job_id)
        if row.job.state is not State.DEAD:
            raise JobState(job_id, row.job.state.value, State.DEAD.value)
        queued = row.job.redriven(self._clock(), self._lifetime)
        await self._queues.put(Ticket(queued, 1))
        try:
            await self._table.replace(queued, row.revision)
        except Conflict:
            # A worker, or a second redrive, was faster: the table's word holds.
            return (await self._row(tenant_id, job_id)).job
        return queued
