"""What is done around every call, in a chain of named stages.

    request_id      accepts or makes `x-request-id`, collects what is forwarded to peers
    trace           a span per call, when traces are on
    logging         failures and slow calls
    metrics         calls by method and code, latency by method
    errors          anything unexpected becomes INTERNAL with an incident id
    deadline        a call that is late already isn't begun
    authentication  deny by default
    message         bytes to request, the innermost

A stage gives the chain plain functions to run before and after a call, bound once per method; the chain is one coroutine around
the handler, however many stages there are, since a coroutine per stage would cost more than what the stages do. Calls
inside the process use the same stages without those that only make sense at a process' border.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import types
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from services.runtime.authentication import ACCESS, Access, Authenticator, check
from services.runtime.call import ANONYMOUS, Call
from services.runtime.deadlines import waited
from services.runtime.dispatch import Method, StreamHandler, UnaryHandler
from services.runtime.errors import Code, Failure, Reason, deadline_exceeded
from services.runtime.metrics import Registry

Before = Callable[[Call], None]
After = Callable[[Call, float, Failure | None], None]
Ended = Callable[[BaseException | None], BaseException | None]

_MAX_REQUEST_ID: Final = 128
_MAX_FORWARDED_VALUE: Final = 512
_LOG_LINES_PER_SECOND: Final = 20.0
_CLOCK_RESOLUTION: Final = 0.005
"""uvloop's clock stands still within a turn of the loop, so a timer may seem to fire early."""


class Stage(Protocol):
    """One named part of the chain."""

    @property
    def name(self) -> str:
        """Its name."""

    def before(self, method: Method) -> Before | None:
        """Run before the call; a Failure it raises is the call's answer."""

    def after(self, method: Method) -> After | None:
        """Run after the call with the seconds it took and what it failed with; must not raise. Runs for refused calls, too."""


class Log(Protocol):
    """The part of a structlog logger that is used here."""

    def debug(self, event: str, **values: Any) -> Any:
        """Writes a line."""

    def warning(self, event: str, **values: Any) -> Any:
        """Writes a line."""

    def error(self, event: str, **values: Any) -> Any:
        """Writes a line."""


class RequestId:
    """Gives every call a request id, and to `call.forward` what travels on: the id and the trace context."""

    name: Final = "request_id"

    def before(self, method: Method) -> Before | None:
        def run(call: Call) -> None:
            metadata = call.metadata
            request_id = metadata.get("x-request-id")
            if request_id is None or not 0 < len(request_id) <= _MAX_REQUEST_ID or not request_id.isprintable():
                request_id = secrets.token_hex(16)
            forward = [("x-request-id", request_id)]
            for key in ("traceparent", "tracestate"):
                value = metadata.get(key)
                if value is not None and len(value) <= _MAX_FORWARDED_VALUE:
                    forward.append((key, value))
            call.forward = tuple(forward)

        return run

    def after(self, method: Method) -> After | None:
        return None


class Logging:
    """Logs failures and slow calls; each method at most 20 lines a second, so that a flood of errors stays cheap."""

    name: Final = "logging"

    def __init__(self, log: Log, *, slow_seconds: float) -> None:
        self._log = log
        self._slow_seconds = slow_seconds

    def before(self, method: Method) -> Before | None:
        return None

    def after(self, method: Method) -> After | None:
        log = self._log
        slow_seconds = self._slow_seconds
        streaming = method.stream is not None
        allowance = _LOG_LINES_PER_SECOND
        refilled = time.monotonic()
        suppressed = 0

        def run(call: Call, seconds: float, failure: Failure | None) -> None:
            nonlocal allowance, refilled, suppressed
            if failure is None:
                if seconds < slow_seconds or streaming:
                    return
            elif failure.reason is Reason.CANCELLED:
                return
            now = time.monotonic()
            allowance = min(_LOG_LINES_PER_SECOND, allowance + (now - refilled) * _LOG_LINES_PER_SECOND)
            refilled = now
            if allowance < 1:
                suppressed += 1
                return
            allowance -= 1
            values: dict[str, Any] = {
                "method": method.path,
                "caller": call.caller.name or call.caller.kind.value,
                "request_id": dict(call.forward).get("x-request-id", ""),
                "milliseconds": round(seconds * 1000, 3),
            }
            if suppressed:
                values["suppressed"] = suppressed
                suppressed = 0
            if failure is None:
                log.warning("slow call", **values)
                return
            ours = failure.code in (Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
            write = log.warning if ours else log.debug
            write("call failed", code=failure.code.name, reason=failure.reason.value, message=failure.message, **values)

        return run


class Metrics:
    """Counts calls by method and code, and their latency by method."""

    name: Final = "metrics"

    def __init__(self, registry: Registry) -> None:
        self._calls = registry.counter("calls", "Calls served, by method and canonical code.", ("method", "code"))
        self._seconds = registry.histogram("call_seconds", "Time from arrival to answer, by method.", ("method",))

    def before(self, method: Method) -> Before | None:
        return None

    def after(self, method: Method) -> After | None:
        calls = self._calls
        path = method.path
        succeeded = calls.labels(path, "OK")
        latency = self._seconds.labels(path)
        counts, bounds = latency.counts, latency.bounds

        def run(call: Call, seconds: float, failure: Failure | None) -> None:
            # As `observe` does it, without the call.
            counts[bisect_left(bounds, seconds)] += 1
            latency.total += seconds
            if failure is None:
                succeeded.value += 1
            else:
                calls.labels(path, failure.code.name).inc()

        return run


class Deadline:
    """Refuses a call whose deadline has passed when it arrives: nobody waits for its answer."""

    name: Final = "deadline"

    def before(self, method: Method) -> Before | None:
        get_loop = asyncio.get_running_loop
        path = method.path

        def run(call: Call) -> None:
            if call.deadline <= get_loop().time():
                raise deadline_exceeded(path)

        return run

    def after(self, method: Method) -> After | None:
        return None


class Authentication:
    """Says who calls and whether they may. A caller that the transport has proved already is taken as it is."""

    name: Final = "authentication"

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def before(self, method: Method) -> Before | None:
        identify = self._authenticator.caller
        service = method.service
        anyone = ACCESS.get(service) is Access.ANYONE

        def run(call: Call) -> None:
            if call.caller is ANONYMOUS:
                call.caller = identify(call.metadata)
            if not anyone:
                check(service, call.caller)

        return run

    def after(self, method: Method) -> After | None:
        return None


class ErrorMapping:
    """Turns what a handler raised into a Failure. The unexpected is logged with its traceback under an incident id; the caller
    gets the id and nothing of the inside."""

    name: Final = "errors"

    def __init__(self, log: Log) -> None:
        self._log = log

    def failure(self, method: Method, call: Call, error: BaseException) -> Failure:
        """The failure that the caller gets for `error`."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, asyncio.CancelledError | TimeoutError) and call.time_left() <= _CLOCK_RESOLUTION:
            return deadline_exceeded(method.path)
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            return Failure(Reason.CANCELLED, "the call was cancelled")
        incident = secrets.token_hex(8)
        self._log.error(
            "unexpected error",
            incident=incident,
            method=method.path,
            request_id=dict(call.forward).get("x-request-id", ""),
            exc_info=(type(error), error, error.__traceback__),
        )
        return Failure(
            Reason.INTERNAL,
            f"something went wrong on our side; quote incident {incident} when you report it",
            metadata={"incident": incident},
        )


class Messages:
    """The innermost stage of calls that arrive as bytes: parses the request. Not a Stage: it changes what the handler gets."""

    name: Final = "message"

    def unary(self, method: Method, handler: UnaryHandler) -> UnaryHandler:
        """`handler` for serialised requests."""
        parse = _parser(method)
        return lambda data, call: handler(parse(data), call)

    def stream(self, method: Method, handler: StreamHandler) -> StreamHandler:
        """`handler` for serialised requests."""
        parse = _parser(method)
        return lambda data, call: handler(parse(data), call)


def _parser(method: Method) -> Callable[[bytes], Any]:
    from_string = method.request_class.FromString
    name = method.request_class.DESCRIPTOR.full_name

    def parse(data: bytes) -> Any:
        try:
            return from_string(data)
        except DecodeError:
            raise Failure(
                Reason.REQUEST_INVALID, f"the request is not a valid {name} message", metadata={"field": ""}
            ) from None

    return parse


class StagedStream:
    """The handler of a stream within the stages.

    Called, it is a generator around the handler's. Whoever has an iterator of its own around the replies runs the stages from there,
    by `open` and what it returns: that is a generator less at every piece.
    """

    def __init__(
        self,
        method: Method,
        handler: StreamHandler,
        before: tuple[Before, ...],
        after: tuple[After, ...],
        to_failure: Callable[[Method, Call, BaseException], Failure],
    ) -> None:
        self._method = method
        self._handler = handler
        self._before = before
        self._after = after
        self._to_failure = to_failure

    def open(self, request: Any, call: Call) -> tuple[Any, Ended]:
        """The replies, and what is to be called with their end: None, or what was raised; it returns what to raise instead.

        Raises what a stage refuses the call with.
        """
        began = time.perf_counter()

        def ended(error: BaseException | None) -> BaseException | None:
            failure = None if error is None else self._to_failure(self._method, call, error)
            seconds = time.perf_counter() - began
            for end in self._after:
                end(call, seconds, failure)
            return failure if isinstance(error, Exception) else error

        try:
            for step in self._before:
                step(call)
            return self._handler(request, call), ended
        except BaseException as error:  # noqa: BLE001  # raised again, or as what it stands for
            failure = ended(error)
            try:
                if failure is error or failure is None:
                    raise
                raise failure from None
            finally:
                # See BoundedStream.
                del failure

    async def __call__(self, request: Any, call: Call) -> AsyncIterator[Any]:
        replies, ended = self.open(request, call)
        try:
            async for reply in replies:
                yield reply
        except BaseException as error:  # noqa: BLE001  # raised again, or as what it stands for
            await replies.aclose()
            failure = ended(error)
            try:
                if failure is error or failure is None:
                    raise
                raise failure from None
            finally:
                # See BoundedStream.
                del failure
        ended(None)


class Chain:
    """The stages, as one interceptor of a method table."""

    name: Final = "chain"

    def __init__(self, stages: Sequence[Stage], errors: ErrorMapping) -> None:
        self._stages = tuple(stages)
        self._errors = errors

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stages, outermost first. Error mapping is what the chain itself does for all of them."""
        return (*(stage.name for stage in self._stages), self._errors.name)

    def _bound(self, method: Method) -> tuple[tuple[Before, ...], tuple[After, ...]]:
        before = [step for stage in self._stages if (step := stage.before(method)) is not None]
        after = [end for stage in reversed(self._stages) if (end := stage.after(method)) is not None]
        return tuple(before), tuple(after)

    def unary(self, method: Method, handler: UnaryHandler) -> UnaryHandler:
        """`handler` within the stages and the call's deadline."""
        before, after = self._bound(method)
        to_failure = self._errors.failure
        path = method.path
        clock = time.perf_counter

        # Also what keeps the deadline: together they are one frame at every step of the call.
        @types.coroutine
        def run(request: Any, call: Call) -> Generator[Any, Any, Any]:
            began = clock()
            try:
                for step in before:
                    step(call)
                work: Any = handler(request, call)
                try:
                    pending = work.send(None)
                except StopIteration as done:
                    reply = done.value
                else:
                    reply = yield from waited(work, pending, call.deadline, path)
            # A process boundary for the caller: whatever it is, it leaves as a Failure, and cancellation as itself.
            except BaseException as error:  # noqa: BLE001  # raised again, or as what it stands for
                failure = to_failure(method, call, error)
                seconds = clock() - began
                for end in after:
                    end(call, seconds, failure)
                try:
                    if failure is error or not isinstance(error, Exception):
                        raise
                    raise failure from None
                finally:
                    # See BoundedStream.
                    del failure
            seconds = clock() - began
            for end in after:
                end(call, seconds, None)
            return reply

        return run

    def stream(self, method: Method, handler: StreamHandler) -> StreamHandler:
        """`handler` within the stages."""
        return StagedStream(method, handler, *self._bound(method), self._errors.failure)


def border_chain(
    *, log: Log, registry: Registry, authenticator: Authenticator, slow_seconds: float, trace: Stage | None = None
) -> tuple[Chain, Messages]:
    """Interceptors of calls that arrive over a socket."""
    stages: list[Stage] = [RequestId()]
    if trace is not None:
        stages.append(trace)
    stages += [
        Logging(log, slow_seconds=slow_seconds),
        Metrics(registry),
        Deadline(),
        Authentication(authenticator),
    ]
    return Chain(stages, ErrorMapping(log)), Messages()


def inner_chain(*, log: Log, registry: Registry, slow_seconds: float, trace: Stage | None = None) -> tuple[Chain]:
    """Interceptors of calls between services of one process. The caller is known, the request is a message already, and the channel
    has just looked at the deadline."""
    stages: list[Stage] = [trace] if trace is not None else []
    stages += [Logging(log, slow_seconds=slow_seconds), Metrics(registry)]
    return (Chain(stages, ErrorMapping(log)),)
