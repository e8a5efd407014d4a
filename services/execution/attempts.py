"""The chain of attempts of one operation: in plan order, inside the caller's deadline, each recorded before it is sent.

This is one of the few places with retries (style.md). Candidates change freely before the first token and never after it. A fault
of the caller ends the chain. A kept connection that turned out closed gets the same candidate a second, recorded, attempt.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

from services.execution.draining import Draining
from services.execution.errors import AllFailed, AttemptFailed, ConnectionStale, SpoolFull
from services.execution.pricing import cost_of, prompt_cost
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt, Provider
from services.execution.spool import Spool
from services.execution.targets import Target, Targets
from services.runtime.call import Call
from services.runtime.errors import Failure, Reason, deadline_exceeded
from sluice.errors.v1 import error_reason_pb2
from sluice.execution.v1 import execution_service_pb2 as pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2, price_pb2
from sluice.routing.v1 import routing_service_pb2

_MARGIN: Final = 0.02
"""Seconds of the caller's deadline that are kept for what comes after the provider's answer."""
_LEAST: Final = 0.01
_BILLION: Final = 1_000_000_000
_TEXTS: Final = re.compile(
    rb'"(?:content|reasoning_content|reasoning|refusal|arguments|text|thinking|partial_json)": ?"((?:[^"\\]|\\.)+)"'
).findall
"""What a piece in a wire format says, of OpenAI's and Anthropic's kinds. 0.8 us for a piece; parsing it costs ten times as much."""
_ENDED: Final = re.compile(rb'"(?:finish_reason|stop_reason)": ?"').search
_LONGEST_TOKEN: Final = 12
"""Bytes of text; where pieces are longer on average, they have several tokens each."""
_BYTES_PER_TOKEN: Final = 5
"""Of English, on the high side: a stream that keeps to its limit isn't cut."""
_BYTES_PER_DEAR_TOKEN: Final = 3
"""As a whole answer without usage is estimated."""
_MOST_TOKENS: Final = 100_000_000
"""Of one answer; a provider that reports more reports nonsense."""
_OVERRUN: Final = 1.1
"""A stream is cut when it has produced this many times the tokens that its hold covers: providers keep max_tokens, mostly."""
_REASONS: Final = {reason: error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason.value}") for reason in Reason}


class Tried(NamedTuple):
    """An attempt that ended, or a candidate that was passed over."""

    record: metering_service_pb2.Settlement
    provider_status: int
    """HTTP status; 0: there was none."""
    first_token_ns: int
    """From its begin to the first token; 0: none came, or not in pieces."""


Report = Callable[[Tried], None]
"""Takes an attempt that ended, for what routing wants to know of it."""
Count = Callable[[str, conversation_pb2.Conversation], Awaitable[int | None]]
"""Tokens of a prompt for a model (its catalogue id); None: they can't be counted now. Raises nothing but a cancellation."""
Later = Callable[[Coroutine[Any, Any, None]], None]
"""Runs what nobody waits for, to its end before the process goes down."""


def fill_attempt(attempt: receipt_pb2.Attempt, tried: Tried) -> None:
    """Fills an empty message with what a receipt shows."""
    record = tried.record
    attempt.attempt_id = record.attempt_id
    attempt.model = record.model
    attempt.provider = record.provider
    attempt.start_time.CopyFrom(record.start_time)
    if record.HasField("duration"):
        attempt.duration.CopyFrom(record.duration)
    attempt.outcome = record.outcome
    attempt.error_reason = record.error_reason
    attempt.cost_nano_usd = record.cost_nano_usd
    if record.HasField("usage"):
        attempt.usage.CopyFrom(record.usage)
    attempt.provider_status = tried.provider_status
    if tried.first_token_ns:
        first = attempt.first_token_duration
        first.seconds, first.nanos = divmod(tried.first_token_ns, _BILLION)


class _Attempt:
    """One attempt under way."""

    __slots__ = ("began", "candidate", "first", "gate", "id", "number", "operation", "price", "record", "settled", "target")

    def __init__(self, operation: Operation, number: int, candidate: routing_service_pb2.Candidate, target: Target) -> None:
        """Begins to record it; raises SpoolFull."""
        self.operation = operation
        self.number = number
        self.candidate = candidate
        self.target = target
        self.began = began = time.time_ns()
        self.first = 0
        self.settled = False
        billing = operation.billing
        # What is known at the start: enough to settle an attempt of which nothing more is ever heard. Field by field: the constructor
        # takes half as long again.
        self.record = record = metering_service_pb2.Settlement()
        record.attempt_id = self.id = f"{operation.id}/{number}"
        record.operation_id = operation.id
        record.tenant_id = billing.tenant_id
        record.project_id = billing.project_id
        record.key_id = billing.key_id
        record.lease_id = billing.lease_id
        record.hold_id = billing.hold_id
        record.hold_nano_usd = billing.hold_nano_usd
        record.model = target.model
        record.provider = target.provider
        moment = record.start_time
        moment.seconds, moment.nanos = divmod(began, _BILLION)
        record.task_type = billing.task_type
        if billing.request_key:
            record.request_key = billing.request_key
        record.attempt_number = number
        count = operation.input_count
        if count:
            usage = record.usage
            usage.input_token_count = count
            usage.source = answer_pb2.USAGE_SOURCE_ESTIMATED
        self.price: price_pb2.Price | None = None
        if candidate.HasField("price"):
            self.price = price = candidate.price
            record.price_version = price.price_version
            if count:
                # What a crash of ours may have cost: the prompt at least.
                record.cost_nano_usd = prompt_cost(price, count)
        self.gate = operation.spool.begin(record)

    def end(
        self,
        outcome: receipt_pb2.AttemptOutcome.ValueType,
        *,
        usage: answer_pb2.Usage | None,
        is_final: bool,
        failure: Failure | None = None,
        observed: int = 0,
    ) -> None:
        """Settles: into the spool, what the operation tried, and routing's statistics. `observed` as `end_well` has it."""
        if usage is not None and usage.source == answer_pb2.USAGE_SOURCE_REPORTED:
            self._observe(observed)
        self.operation.spool.settle(self._settle(outcome, usage, is_final=is_final, failure=failure))

    def end_well(self, usage: answer_pb2.Usage, observed: int) -> None:
        """Settles a success; it is written before anything of the answer leaves the process.

        `observed`: the answer's tokens by our own count, kept beside what the provider reports.
        """
        if usage.source == answer_pb2.USAGE_SOURCE_REPORTED:
            self._observe(observed)
        self.operation.spool.end(self._settle(receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED, usage, is_final=True, failure=None))

    def _observe(self, tokens: int) -> None:
        own = self.record.observed_usage
        own.output_token_count = tokens
        own.source = answer_pb2.USAGE_SOURCE_ESTIMATED
        operation = self.operation
        if operation.is_counted:
            own.input_token_count = operation.input_count

    def _settle(
        self,
        outcome: receipt_pb2.AttemptOutcome.ValueType,
        usage: answer_pb2.Usage | None,
        *,
        is_final: bool,
        failure: Failure | None,
    ) -> metering_service_pb2.Settlement:
        self.settled = True
        took = time.time_ns() - self.began
        # The start's record was written as bytes; it becomes the settlement's.
        record = self.record
        cost = 0
        if usage is not None:
            record.usage.CopyFrom(usage)
            if self.price is not None:
                cost = cost_of(self.price, usage)
        else:
            record.ClearField("usage")
        if not cost and usage is None:
            record.price_version = ""
        record.cost_nano_usd = cost
        span = record.duration
        span.seconds, span.nanos = divmod(took, _BILLION)
        record.outcome = outcome
        record.is_final = is_final
        operation = self.operation
        operation.unended = None if is_final else record
        operation.cost += cost
        if usage is not None and self.price is not None:
            operation.price_version = record.price_version
        status = 200
        if failure is not None:
            record.error_reason = _REASONS[failure.reason]
            status = getattr(failure, "status", 0)
        tried = Tried(record, status, self.first - self.began if self.first else 0)
        operation.tried.append(tried)
        operation.report(tried)
        return record


class Operation:
    """One operation: what it is, and what its attempts have done so far."""

    def __init__(
        self,
        request: Any,
        targets: Targets,
        spool: Spool,
        report: Report,
        call: Call,
        now: Callable[[], float],
        count: Count,
        later: Later,
        *,
        first_byte_seconds: float,
    ) -> None:
        """`request` is a CompleteRequest, StreamCompleteRequest or EmbedRequest, `now` the loop's clock."""
        self.id: str = request.operation_id
        self.billing: pb2.Billing = request.billing
        self.candidates: Sequence[routing_service_pb2.Candidate] = request.candidates
        self.spool = spool
        self.report = report
        self.tried: list[Tried] = []
        """In order."""
        self.cost = 0
        self.price_version = ""
        self.unended: metering_service_pb2.Settlement | None = None
        """The last attempt's settlement, when another attempt was to follow it."""
        self.input_count = 0
        self.is_counted = True
        """Whether `input_count` was counted, and isn't only what the prompt's size allows."""
        self._count = count
        self._later = later
        self._request = request
        self._targets = targets
        self._call = call
        self._deadline = call.deadline
        self._first_byte = first_byte_seconds
        self._now = now
        self._failed: list[tuple[str, Reason]] = []
        self._retry_delay: float | None = None
        self._number = 0

    # What one attempt may take.

    def _attempt_deadline(self, candidate: routing_service_pb2.Candidate, is_last: bool) -> float:
        now = self._now()
        ends = min(self._deadline - _MARGIN, now + self._first_byte)
        if not is_last and candidate.HasField("attempt_timeout"):
            limit = candidate.attempt_timeout
            ends = min(ends, now + limit.seconds + limit.nanos / 1e9)
        if ends - now < _LEAST:
            raise deadline_exceeded("a provider")
        return ends

    def _skip(self, candidate: routing_service_pb2.Candidate, reason: Reason, delay: float | None) -> None:
        """A candidate that isn't called: no attempt in the ledger, one line in the receipt."""
        self._failed.append((candidate.model, reason))
        if delay is not None:
            self._retry_delay = delay if self._retry_delay is None else min(delay, self._retry_delay)
        skipped = metering_service_pb2.Settlement(
            attempt_id=f"{self.id}/-",
            model=candidate.model,
            provider=candidate.provider,
            outcome=receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT,
            error_reason=_REASONS[reason],
        )
        skipped.start_time.FromNanoseconds(time.time_ns())
        self.tried.append(Tried(skipped, 0, 0))

    def _begin(self, candidate: routing_service_pb2.Candidate) -> tuple[Provider, _Attempt] | None:
        """The provider and an attempt, which is on record when its gate lets through; None when the candidate can't be called now.

        Raises SpoolFull.
        """
        name = candidate.provider
        provider = self._targets.providers.get(name)
        if provider is None:
            self._skip(candidate, Reason.PROVIDER_UNAVAILABLE, None)
            return None
        target = self._targets.target(name, provider, candidate.model)
        if not target.breaker.allow():
            self._skip(candidate, Reason.BREAKER_OPEN, target.breaker.retry_delay())
            return None
        self._number += 1
        try:
            attempt = _Attempt(self, self._number, candidate, target)
        except BaseException:
            target.breaker.ignored()
            raise
        return provider, attempt

    def _prompt(
        self,
        candidate: routing_service_pb2.Candidate,
        model: str,
        deadline: float,
        accepted_wire: int,
        gate: Callable[[], None],
    ) -> Prompt:
        request = self._request
        conversation = request.conversation
        wished = conversation.max_output_tokens if conversation.HasField("max_output_tokens") else 0
        return Prompt(
            candidate.upstream_model,
            model,
            conversation,
            self._longest(candidate, wished),
            deadline,
            request.end_user_hash,
            request.metadata,
            accepted_wire,
            gate,
        )

    def _longest(self, candidate: routing_service_pb2.Candidate, wished: int) -> int:
        """Most tokens that the provider is told to answer with: no more than the hold reckons with for this candidate. 0: it is not told."""
        own = candidate.max_output_tokens
        if not own or 0 < wished <= own:
            return wished
        window = candidate.context_window
        if not wished and window and self.input_count + own > window:
            # The window is the tighter bound, which the provider keeps by itself; some refuse a limit that reaches beyond it.
            return 0
        return own

    def _failure(self, attempt: _Attempt, failure: AttemptFailed, *, is_last: bool, is_stale: bool = False) -> None:
        """Settles a failed attempt; raises when no other candidate can help.

        `is_stale`: the connection had been kept too long, and the same candidate is tried again; that tells nothing of its health.
        """
        breaker = attempt.target.breaker
        if failure.ends_chain or is_stale or failure.reason is Reason.OVERLOADED or self._is_over(failure):
            # None of these tells of the provider's health: not our own full pool, and not the deadline of a caller in a hurry, by which
            # one tenant could take a model away from all.
            breaker.ignored()
        else:
            breaker.failed(failure.retry_delay)
        self._failed.append((attempt.candidate.model, failure.reason))
        if failure.retry_delay is not None:
            known = self._retry_delay
            self._retry_delay = failure.retry_delay if known is None else min(known, failure.retry_delay)
        # What the provider has read it bills, whether an answer came of it or not.
        usage = self._partial(0) if failure.was_read and self.input_count else None
        attempt.end(receipt_pb2.ATTEMPT_OUTCOME_FAILED, usage=usage, is_final=is_last or failure.ends_chain, failure=failure)
        if failure.ends_chain:
            raise failure

    def _is_over(self, failure: AttemptFailed) -> bool:
        """Whether it was the caller's own deadline that ended the attempt, not one of ours."""
        if failure.reason is not Reason.PROVIDER_TIMEOUT or failure.status:
            return False
        return self._now() >= self._deadline - _MARGIN - _LEAST

    def _dropped(self, attempt: _Attempt, usage: answer_pb2.Usage | None, error: BaseException) -> None:
        """Settles an attempt that ended by something else than its provider: its caller went away, or a fault of ours."""
        attempt.target.breaker.ignored()
        if isinstance(error, asyncio.CancelledError | GeneratorExit) and self._call.is_lost:
            # Not its caller left but a gateway of ours ended, and its caller got nothing.
            outcome, failure = receipt_pb2.ATTEMPT_OUTCOME_LOST, Failure(Reason.INTERNAL, "the gateway was lost")
            attempt.record.payer = metering_service_pb2.PAYER_PLATFORM
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            outcome, failure = receipt_pb2.ATTEMPT_OUTCOME_CANCELLED, Failure(Reason.CANCELLED, "the caller went away")
        else:
            outcome = (
                receipt_pb2.ATTEMPT_OUTCOME_BROKEN
                if usage is not None and usage.output_token_count
                else receipt_pb2.ATTEMPT_OUTCOME_FAILED
            )
            failure = Failure(Reason.INTERNAL, "a fault of ours")
        attempt.end(outcome, usage=usage, is_final=True, failure=failure)

    def close(self) -> None:
        """The operation is over. Where it was to go on and couldn't, since no other candidate could be called, this ends its hold, which
        would else be kept from others until its time is over.
        """
        last = self.unended
        if last is None or not last.hold_id:
            return
        self.unended = None
        ended = metering_service_pb2.Settlement()
        ended.CopyFrom(last)
        ended.attempt_number = self._number + 1
        ended.attempt_id = f"{self.id}/{ended.attempt_number}"
        ended.outcome = receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT
        ended.is_final = True
        ended.cost_nano_usd = 0
        for field in ("usage", "price_version", "duration"):
            ended.ClearField(field)
        ended.start_time.FromNanoseconds(time.time_ns())
        self.spool.settle(ended)

    def _exhausted(self) -> Failure:
        now = self._now()
        if self._deadline - _MARGIN - now < _LEAST:
            return deadline_exceeded("a provider")
        return AllFailed(self._failed, self._retry_delay)

    # Whole answers.

    async def complete(self) -> Completed:
        """The first answer of the chain. Raises AttemptFailed for a fault of the caller, AllFailed, Failure DEADLINE_EXCEEDED."""
        request = self._request
        self.input_count = request.input_count.token_count
        self.is_counted = not request.count_when_needed
        last = len(self.candidates) - 1
        for index, candidate in enumerate(self.candidates):
            is_last = index == last
            for again in (False, True):
                begun = self._begin(candidate)
                if begun is None:
                    break
                provider, attempt = begun
                answer = None
                try:
                    prompt = self._prompt(
                        candidate, attempt.target.model, self._attempt_deadline(candidate, is_last), 0, attempt.gate
                    )
                    try:
                        completed = await provider.complete(prompt)
                    except AttemptFailed as failure:
                        if failure.was_read and not self.is_counted:
                            await self._count_now(attempt)
                        raise
                    answer = completed.answer
                    usage = answer.usage
                    if _lacks_usage(usage):
                        if not self.is_counted:
                            await self._count_now(attempt)
                        self._estimate(answer, usage)
                except ConnectionStale as failure:
                    self._failure(attempt, failure, is_last=is_last and again, is_stale=not again)
                    continue
                except AttemptFailed as failure:
                    self._failure(attempt, failure, is_last=is_last)
                    break
                except SpoolFull:
                    # The record could not be written, so nothing was sent, and there is nothing to settle.
                    attempt.target.breaker.ignored()
                    raise
                except Failure as failure:
                    # The deadline passed before the call: nothing was sent.
                    attempt.target.breaker.ignored()
                    attempt.end(receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT, usage=None, is_final=True, failure=failure)
                    raise
                except BaseException as error:
                    produced = 0 if answer is None else _estimated_output(answer)
                    if not attempt.gate.passed:
                        # What was not sent is not billed.
                        self._dropped(attempt, None, error)
                    elif self.is_counted:
                        self._dropped(attempt, self._partial(produced) if self.input_count else None, error)
                    else:
                        # Nobody waits for it any more, and it ends the hold.
                        self.unended = None
                        self._later(self._dropped_counted(attempt, produced, error))
                    raise
                attempt.target.breaker.succeeded()
                attempt.end_well(usage, _estimated_output(answer))
                return completed
        raise self._exhausted()

    async def _count_now(self, attempt: _Attempt) -> None:
        """Counts the prompt for the attempt's model; what goes by its size stays where that can't be had."""
        count = await self._count(attempt.record.model, self._request.conversation)
        if count is not None:
            self.input_count = count

    async def _dropped_counted(self, attempt: _Attempt, produced: int, error: BaseException) -> None:
        await self._count_now(attempt)
        self._dropped(attempt, self._partial(produced), error)

    def _estimate(self, answer: answer_pb2.Answer, usage: answer_pb2.Usage) -> None:
        """Fills in `usage`, the answer's, which its provider did not report."""
        usage.input_token_count = self.input_count
        usage.output_token_count = _estimated_output(answer)
        usage.source = answer_pb2.USAGE_SOURCE_ESTIMATED

    # Streams.

    async def open_stream(self) -> AsyncGenerator[Any, None]:
        """The stream of the first candidate that begins to answer; to be read to its end or closed. Raises as `complete`.

        It gives first CompletionOpened, then bytes or DeltaBatch, last Completed, and raises after the first piece AttemptFailed
        PROVIDER_STREAM_BROKEN or the like: never another candidate.
        """
        self.input_count = self._request.input_count.token_count
        last = len(self.candidates) - 1
        for index, candidate in enumerate(self.candidates):
            is_last = index == last
            for again in (False, True):
                begun = self._begin(candidate)
                if begun is None:
                    break
                provider, attempt = begun
                accepted = self._request.accepted_wire
                wire = accepted if accepted and provider.wire == accepted else 0
                try:
                    deadline = self._attempt_deadline(candidate, is_last)
                except Failure as failure:
                    attempt.target.breaker.ignored()
                    attempt.end(receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT, usage=None, is_final=True, failure=failure)
                    raise
                prompt = self._prompt(candidate, attempt.target.model, self._deadline - _MARGIN, wire, attempt.gate)
                pieces = provider.stream(prompt)
                if self._targets.drain_seconds.get(candidate.provider):
                    pieces = Draining(pieces)
                try:
                    try:
                        async with asyncio.timeout_at(deadline):
                            piece = await anext(pieces)
                    except StopAsyncIteration:
                        raise AttemptFailed(Reason.PROVIDER_MALFORMED, "the provider's stream was empty") from None
                    except TimeoutError:
                        raise AttemptFailed(
                            Reason.PROVIDER_TIMEOUT, "the provider did not begin to answer in time", was_read=True
                        ) from None
                except ConnectionStale as failure:
                    await _closed(pieces)
                    self._failure(attempt, failure, is_last=is_last and again, is_stale=not again)
                    continue
                except AttemptFailed as failure:
                    await _closed(pieces)
                    self._failure(attempt, failure, is_last=is_last)
                    break
                except SpoolFull:
                    attempt.target.breaker.ignored()
                    await _closed(pieces)
                    raise
                except BaseException as error:
                    self._dropped(attempt, self._partial(0) if self.input_count and attempt.gate.passed else None, error)
                    await _closed(pieces)
                    raise
                attempt.first = time.time_ns()
                return self._flow(attempt, pieces, piece, bool(wire), prompt.max_output_tokens)
        raise self._exhausted()

    async def _flow(
        self, attempt: _Attempt, pieces: AsyncIterator[Any], piece: Any, is_wire: bool, most_tokens: int
    ) -> AsyncGenerator[Any, None]:
        """The answer from its first piece on. However it ends, the attempt is settled before this generator is done."""
        produced = _Produced()
        is_read_on = False
        # Without a limit of the caller's the hold covers what the model can give at most.
        most_tokens = most_tokens or attempt.candidate.max_output_tokens
        limit = int(most_tokens * _OVERRUN) + 16 if most_tokens and self.billing.hold_nano_usd else 0
        try:
            yield pb2.CompletionOpened(
                attempt_id=attempt.record.attempt_id,
                model=attempt.candidate.model,
                is_wire=is_wire and not isinstance(piece, pb2.DeltaBatch),
            )
            while type(piece) is bytes or not isinstance(piece, Completed):
                produced.add(piece)
                yield piece
                if limit and produced.tokens > limit and not _has_ended(piece):
                    piece = self._cut(attempt, produced.tokens)
                    break
                piece = await anext(pieces)
            usage = piece.answer.usage
            if _lacks_usage(usage):
                self._estimate(piece.answer, usage)
            attempt.target.breaker.succeeded()
            attempt.end_well(usage, produced.tokens)
            yield piece
        except StopAsyncIteration:
            failure = AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the provider's stream ended before its answer did")
            self._broken(attempt, failure, produced.most_tokens)
            raise failure from None
        except AttemptFailed as failure:
            self._broken(attempt, failure, produced.most_tokens)
            raise
        except BaseException as error:
            if not attempt.settled:
                if isinstance(pieces, Draining) and self._is_left(error):
                    # Nobody waits for it any more, and it ends the hold.
                    self.unended = None
                    self._later(self._drain(attempt, pieces, produced))
                    is_read_on = True
                else:
                    self._dropped(attempt, self._partial(produced.most_tokens), error)
            raise
        finally:
            if not is_read_on:
                await _closed(pieces)

    def _is_left(self, error: BaseException) -> bool:
        """Whether the caller has left, and no gateway of ours was lost."""
        return isinstance(error, asyncio.CancelledError | GeneratorExit) and not self._call.is_lost

    async def _drain(self, attempt: _Attempt, pieces: Draining, produced: _Produced) -> None:
        """Reads on until the provider has told what the answer took, or for its time; settles either way."""
        usage = None
        try:
            async with asyncio.timeout(self._targets.drain_seconds.get(attempt.candidate.provider, 0.0)):
                async for piece in pieces:
                    if type(piece) is bytes or not isinstance(piece, Completed):
                        produced.add(piece)
                    elif not _lacks_usage(piece.answer.usage):
                        usage = piece.answer.usage
        except (TimeoutError, AttemptFailed):
            pass
        finally:
            left = Failure(Reason.CANCELLED, "the caller went away")
            attempt.target.breaker.ignored()
            attempt.end(
                receipt_pb2.ATTEMPT_OUTCOME_CANCELLED,
                usage=usage or self._partial(produced.most_tokens),
                is_final=True,
                failure=left,
                observed=produced.tokens,
            )
            await _closed(pieces)

    def _partial(self, produced: int) -> answer_pb2.Usage:
        """Usage of an answer that did not end: the prompt as we counted it, and the tokens that came, as far as can be seen."""
        return answer_pb2.Usage(
            input_token_count=self.input_count, output_token_count=produced, source=answer_pb2.USAGE_SOURCE_ESTIMATED
        )

    def _broken(self, attempt: _Attempt, failure: AttemptFailed, produced: int) -> None:
        attempt.target.breaker.failed(failure.retry_delay)
        attempt.end(receipt_pb2.ATTEMPT_OUTCOME_BROKEN, usage=self._partial(produced), is_final=True, failure=failure)

    def _cut(self, attempt: _Attempt, produced: int) -> Completed:
        answer = answer_pb2.Answer(model=attempt.candidate.model, finish_reason=answer_pb2.FINISH_REASON_BUDGET)
        answer.usage.CopyFrom(self._partial(produced))
        return Completed(answer)

    # Embeddings.

    async def embed(self) -> tuple[Embedded, str]:
        """Vectors of the first candidate that answers, and its catalogue id. Raises as `complete`."""
        request: pb2.EmbedRequest = self._request
        # What a provider that doesn't say is taken to have read.
        self.input_count = sum(len(text.encode()) // 3 + 1 for text in request.inputs)
        self.is_counted = False
        last = len(self.candidates) - 1
        for index, candidate in enumerate(self.candidates):
            is_last = index == last
            for again in (False, True):
                begun = self._begin(candidate)
                if begun is None:
                    break
                provider, attempt = begun
                dimensions = request.dimension_count if request.HasField("dimension_count") else None
                try:
                    prompt = EmbeddingPrompt(
                        candidate.upstream_model,
                        candidate.model,
                        request.inputs,
                        dimensions,
                        self._attempt_deadline(candidate, is_last),
                        request.end_user_hash,
                        request.metadata,
                        attempt.gate,
                    )
                    embedded = await provider.embed(prompt)
                except ConnectionStale as failure:
                    self._failure(attempt, failure, is_last=is_last and again, is_stale=not again)
                    continue
                except AttemptFailed as failure:
                    self._failure(attempt, failure, is_last=is_last)
                    break
                except SpoolFull:
                    attempt.target.breaker.ignored()
                    raise
                except Failure as failure:
                    attempt.target.breaker.ignored()
                    attempt.end(receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT, usage=None, is_final=True, failure=failure)
                    raise
                except BaseException as error:
                    self._dropped(attempt, self._partial(0) if attempt.gate.passed else None, error)
                    raise
                attempt.target.breaker.succeeded()
                usage = embedded.usage
                if usage.source == answer_pb2.USAGE_SOURCE_UNSPECIFIED:
                    usage.input_token_count = self.input_count
                    usage.source = answer_pb2.USAGE_SOURCE_ESTIMATED
                attempt.end_well(usage, 0)
                return embedded, candidate.model
        raise self._exhausted()


class _Produced:
    """How many tokens a stream has given so far, seen from outside: one for each piece that has text; where pieces are longer than tokens
    are, since some providers put many into one, one for every few bytes of text.
    """

    __slots__ = ("_bytes", "_pieces")

    def __init__(self) -> None:
        self._bytes = 0
        self._pieces = 0

    def add(self, piece: Any) -> None:
        """Counts a piece."""
        if type(piece) is bytes:
            for text in _TEXTS(piece):
                self._pieces += 1
                self._bytes += len(text) if b"\\" not in text else len(text) - text.count(b"\\") - 2 * text.count(b"\\u")
        else:
            for delta in piece.deltas:
                size = len(delta.text) + len(delta.refusal) + len(delta.reasoning.text) + len(delta.tool_call.arguments_json)
                self._pieces += size > 0
                self._bytes += size

    @property
    def tokens(self) -> int:
        """Tokens so far, rather too few than too many: by this a stream is cut."""
        return self._count(_BYTES_PER_TOKEN)

    @property
    def most_tokens(self) -> int:
        """Tokens so far, rather too many than too few: what is charged of an answer that did not end."""
        return self._count(_BYTES_PER_DEAR_TOKEN)

    def _count(self, token_bytes: int) -> int:
        pieces, size = self._pieces, self._bytes
        return pieces if size <= pieces * _LONGEST_TOKEN else max(pieces, size // token_bytes)


def _has_ended(piece: Any) -> bool:
    """Whether a piece in a wire format is the one that says why the model stopped: what comes after it is no more text."""
    return type(piece) is bytes and _ENDED(piece) is not None


async def _closed(pieces: AsyncIterator[Any]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


def _lacks_usage(usage: answer_pb2.Usage) -> bool:
    """Whether it was not reported; numbers that can't be are cleared."""
    if not usage.source:
        return True
    if _is_possible(usage):
        return False
    # The ledger would refuse them, and what was spent would never be booked.
    usage.Clear()
    return True


def _is_possible(usage: answer_pb2.Usage) -> bool:
    return (
        0 <= usage.input_token_count <= _MOST_TOKENS
        and 0 <= usage.output_token_count <= _MOST_TOKENS
        and 0 <= usage.cached_input_token_count <= _MOST_TOKENS
        and 0 <= usage.cache_write_token_count <= _MOST_TOKENS
        and 0 <= usage.reasoning_token_count <= _MOST_TOKENS
        and 0 <= usage.image_count <= _MOST_TOKENS
    )


def _estimated_output(answer: answer_pb2.Answer) -> int:
    """Tokens of an answer whose provider reported none: a token for every three bytes, on the high side."""
    size = 0
    for part in answer.message.parts:
        for text in (part.text, part.refusal, part.reasoning.text, part.tool_call.arguments_json):
            size += len(text.encode())
    return size // _BYTES_PER_DEAR_TOKEN + 1


def lost(record: metering_service_pb2.Settlement) -> metering_service_pb2.Settlement:
    """The settlement of an attempt that a crash of ours cut off: what it may have cost is booked to the platform."""
    settled = metering_service_pb2.Settlement()
    settled.CopyFrom(record)
    settled.outcome = receipt_pb2.ATTEMPT_OUTCOME_LOST
    settled.error_reason = error_reason_pb2.ERROR_REASON_INTERNAL
    settled.payer = metering_service_pb2.PAYER_PLATFORM
    settled.is_final = True
    return settled
