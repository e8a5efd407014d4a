"""Requests with a request id: several callers, one operation, one charge.

The operation runs in a task of its own, so that it outlives the caller that began it. Who gives a request id says that it may ask again:
when the last caller has left, the operation goes on for a while for those who come back, and is cancelled then. Streams are joined from their first piece, or given whole at their end where that can't be.

Each caller waits until its own deadline. The operation has the deadline of the caller that began it: execution was given that with the
call, plans its attempts by it and settles what is unfinished when it passes. So who joins with a later one may be refused for a deadline
that wasn't its own, and begins anew when it asks again: the failed operation is forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Final

from google.protobuf.message import Message

from services.gateway.operations import Requests, Shared, fingerprint
from services.gateway.receipts import Completion
from services.gateway.replays import Answered, Replays, key_of, record_of, request_key_of, result_of
from services.runtime.errors import Failure, Reason, deadline_exceeded

Weigh = Callable[[Any], int]
_ENDLESS: Final = "the answer ended without its end"
_AWAITED: Final = "the operation of this request id"


class Sharing:
    """The operations that callers share, by tenant and request id."""

    def __init__(self, requests: Requests[Answered], replays: Replays, linger: float) -> None:
        """`linger`: seconds that an operation goes on when nobody waits for it."""
        self._requests = requests
        self._replays = replays
        self._linger = linger

    async def run(
        self,
        tenant_id: str,
        request_id: str,
        body: Message,
        kind: str,
        work: Callable[[bytes], Coroutine[Any, Any, Answered]],
        deadline: float,
        is_lost: Callable[[], bool],
    ) -> Answered:
        """What the operation of this request id results in; `work` is run when there is none yet, with the key that the ledger knows the
        request by.

        Failure REQUEST_ID_REUSED when the id was used with another body, DEADLINE_EXCEEDED at `deadline`, when the operation goes on for
        those who still wait, or the operation's own. `is_lost`: whether the caller has not left but the gateway that passed it on is gone;
        then the operation goes on for its caller's repetition.
        """
        shared, _ = self._find_or_begin(tenant_id, request_id, body, kind, lambda _, request_key: work(request_key))
        with self._waiting(shared, is_lost):
            while not shared.is_done():
                await _change(shared, deadline)
        return _result(shared)

    async def stream(
        self,
        tenant_id: str,
        request_id: str,
        body: Message,
        kind: str,
        wire: int,
        work: Callable[[bytes], AsyncGenerator[Any, None]],
        weigh: Weigh,
        deadline: float,
        is_lost: Callable[[], bool],
    ) -> AsyncGenerator[Any, None]:
        """The pieces of the operation's stream and last its Completion; the Completion alone when the pieces can't be had in the
        format `wire` from the first one on. Failures as in `run`.
        """

        async def pump(shared: Shared[Answered], request_key: bytes) -> Answered:
            async with contextlib.aclosing(work(request_key)) as events:
                async for event in events:
                    if isinstance(event, Completion):
                        return event
                    shared.add(event, weigh(event))
                    while shared.is_full():
                        # By the deadline of the caller that began it, which is the operation's.
                        await _change(shared, deadline)
            raise Failure(Reason.INTERNAL, _ENDLESS)

        shared, is_new = self._find_or_begin(tenant_id, request_id, body, kind, pump)
        if is_new:
            shared.wire = wire
        with self._waiting(shared, is_lost), shared.read() as reader:
            while reader.is_whole and shared.wire in (wire, 0):
                event = reader.next()
                if event is not None:
                    _check(deadline)
                    yield event
                elif shared.is_done():
                    break
                else:
                    await _change(shared, deadline)
            reader.close()
            while not shared.is_done():
                await _change(shared, deadline)
        yield _result(shared)

    @contextlib.contextmanager
    def _waiting(self, shared: Shared[Answered], is_lost: Callable[[], bool]) -> Iterator[None]:
        """Counts a caller that waits. When the last one leaves before the end, nobody may be without the operation for longer than it
        lingers, unless that caller `is_lost`.
        """
        shared.waiters += 1
        try:
            yield
        finally:
            shared.waiters -= 1
            if shared.waiters == 0 and not shared.is_done() and not is_lost():
                if shared.leaving is not None:
                    shared.leaving.cancel()
                if self._linger > 0.0:
                    shared.leaving = asyncio.get_running_loop().call_later(self._linger, _let_go, shared)
                else:
                    _let_go(shared)

    def _find_or_begin(
        self,
        tenant_id: str,
        request_id: str,
        body: Message,
        kind: str,
        work: Callable[[Shared[Answered], bytes], Coroutine[Any, Any, Answered]],
    ) -> tuple[Shared[Answered], bool]:
        mark = _mark(kind, body)
        requests = self._requests
        known = requests.find(tenant_id, request_id, mark)
        if known is not None:
            return known, False
        shared = requests.begin(tenant_id, request_id, mark)
        shared.abandon = lambda: requests.abandon(tenant_id, request_id, shared)

        async def run() -> None:
            size = 0
            key = key_of(tenant_id, request_id)
            try:
                kept = await self._replays.find(key)
                found = None if kept is None else result_of(kept, request_id, mark)
                if found is not None:
                    result = found
                else:
                    result = await work(shared, request_key_of(key, mark))
                    # Before anybody gets its end.
                    await self._replays.keep(key, record_of(mark, result))
                size = result.answer.ByteSize() if isinstance(result, Completion) else result.ByteSize()
                shared.finish(result)
            except asyncio.CancelledError:
                shared.fail(Failure(Reason.CANCELLED, "the request was cancelled"))
                raise
            except BaseException as error:  # noqa: BLE001  # The boundary of the task: whoever waits gets the error.
                shared.fail(error)
            finally:
                requests.end(tenant_id, request_id, shared, size)

        shared.work = asyncio.get_running_loop().create_task(run())
        return shared, True


def _mark(kind: str, body: Message) -> bytes:
    """What tells what is asked. How its answer is wanted, whole or in pieces, with a receipt or without, is no part of that."""
    if getattr(body, "receipt_view", 0):
        asked = type(body)()
        asked.CopyFrom(body)
        asked.ClearField("receipt_view")
        body = asked
    return fingerprint(kind.encode() + b"\0" + body.SerializeToString(deterministic=True))


def _let_go(shared: Shared[Answered]) -> None:
    """Cancels an operation that nobody waits for."""
    if shared.waiters or shared.is_done() or shared.work is None:
        return
    if shared.abandon is not None:
        shared.abandon()
    shared.work.cancel()


def _check(deadline: float) -> None:
    """A caller that reads slowly finds the next piece there and never waits; its deadline holds all the same."""
    if asyncio.get_running_loop().time() >= deadline:
        raise deadline_exceeded(_AWAITED)


async def _change(shared: Shared[Answered], deadline: float) -> None:
    try:
        async with asyncio.timeout_at(deadline):
            await shared.change()
    except TimeoutError:
        raise deadline_exceeded(_AWAITED) from None


def _result(shared: Shared[Answered]) -> Answered:
    if shared.failure is not None:
        raise shared.failure
    assert shared.result is not None, "done without a failure"
    return shared.result
