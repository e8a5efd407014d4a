"""A provider that keeps its own bill, and the adapter through which execution calls it.

It bills what it has worked on, by its own count and its own sum. Answers are of a length that counts the same however it is looked at,
so that what execution estimates where the provider reports nothing is what the provider bills.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from services.execution.errors import AttemptFailed, ConnectionStale
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt
from services.metering.cost import Price
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.simulation.universe import Loop, Universe

_PIECE: Final = "xyz"
"""One token."""
_MILLION: Final = 1_000_000
_TROUBLES: Final = ("unreached", "stale", "refuses", "rejects", "hangs", "breaks", "silent usage", "odd usage", "overruns")
"""The last two are of answers in tokens."""


def prompt_tokens(conversation: conversation_pb2.Conversation) -> int:
    """How many tokens a prompt has, for everybody."""
    return sum(5 + len(part.text) // 4 for message in conversation.messages for part in message.parts)


def embedding_tokens(inputs: Sequence[str]) -> int:
    """How many tokens texts to be embedded have, for everybody."""
    return sum(len(text.encode()) // 3 + 1 for text in inputs)


@dataclass(slots=True)
class Vendor:
    """The provider, whatever the names under which it is called. `attempt_of` says which attempt a gate belongs to."""

    universe: Universe
    loop: Loop
    prices: dict[str, Price]
    """By model."""
    trouble: float = 0.0
    bill: dict[str, int] = field(default_factory=dict)
    """Nano-dollars by attempt."""
    crossed: set[str] = field(default_factory=set)
    """Attempts that execution gave up while something of the provider's was on its way: neither can know what the other has booked."""
    calls: int = 0

    def charge(self, attempt: str, model: str, inputs: int, outputs: int) -> None:
        """Puts it on the bill."""
        price = self.prices[model]
        micro = inputs * price.input + outputs * price.output
        self.universe.log(f"vendor bills {attempt} {inputs}+{outputs}")
        if attempt in self.bill:
            self.universe.complain(f"the provider was called twice for attempt {attempt}")
        self.bill[attempt] = micro // _MILLION + (1 if micro % _MILLION else 0) + price.request


class _Work:
    """One call at the provider. What comes of it is in `events`, in order; the last one ends it."""

    def __init__(
        self, vendor: Vendor, client: Loop, attempt: str, prompt: Prompt | EmbeddingPrompt, *, streaming: bool
    ) -> None:
        self._vendor = vendor
        self._client = client
        self._attempt = attempt
        self._prompt = prompt
        self._streaming = streaming
        self._events: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None
        embeds = isinstance(prompt, EmbeddingPrompt)
        self._inputs = (
            embedding_tokens(prompt.inputs) if isinstance(prompt, EmbeddingPrompt) else prompt_tokens(prompt.conversation)
        )
        self._sent = 0
        self._started = self._over = self._is_told = False
        self._back = 0.0
        vendor.calls += 1
        rng = vendor.universe.rng
        kind = "answers"
        if vendor.universe.may(vendor.trouble):
            kind = rng.choice(_TROUBLES[:-2] if embeds else _TROUBLES)
        self._kind = kind
        most = prompt.max_output_tokens or 40 if isinstance(prompt, Prompt) else 0
        self._outputs = rng.randint(2, max(2, most)) if most else 0
        if kind == "overruns":
            self._outputs = 3 * most
        vendor.universe.log(f"{client.name} calls vendor for {attempt}: {kind}")
        vendor.loop.call_later(vendor.universe.pause(), self._arrive)

    def _arrive(self) -> None:
        rng, vendor = self._vendor.universe.rng, self._vendor
        if self._over:
            return
        match self._kind:
            case "unreached":
                self._end(AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "refused"))
            case "stale":
                self._end(ConnectionStale())
            case "refuses":
                delay = rng.choice([None, 2.0])
                self._end(AttemptFailed(Reason.PROVIDER_OVERLOADED, "busy", status=503, retry_delay=delay))
            case "rejects":
                self._end(AttemptFailed(Reason.PROVIDER_REJECTED, "bad request", status=400))
            case "hangs":
                self._started = True
            case _:
                self._started = True
                if self._streaming:
                    vendor.loop.call_later(0.2 * rng.random(), self._piece)
                else:
                    vendor.loop.call_later(3.0 * rng.random() ** 3, self._answer)

    def _answer(self) -> None:
        if self._over:
            return
        if self._kind == "breaks":
            # It has read the prompt and bills it.
            self._bill(0)
            self._end(AttemptFailed(Reason.PROVIDER_MALFORMED, "half an answer", was_read=True))
        else:
            self._bill(self._outputs)
            self._end(self._completed())

    def _piece(self) -> None:
        if self._over:
            return
        if self._sent >= self._outputs - 1:
            self._bill(self._outputs)
            self._end(self._completed())
        elif self._kind == "breaks" and self._sent and self._vendor.universe.may(0.2):
            self._bill(self._sent)
            self._end(AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the stream broke"))
        else:
            count = min(self._vendor.universe.rng.randint(1, 6), self._outputs - 1 - self._sent)
            self._sent += count
            self._give(execution_service_pb2.DeltaBatch(deltas=[answer_pb2.Delta(text=_PIECE) for _ in range(count)]))
            self._vendor.loop.call_later(self._vendor.universe.pause() * 3, self._piece)

    def _completed(self) -> Completed | Embedded:
        usage = answer_pb2.Usage(
            input_token_count=self._inputs, output_token_count=self._outputs, source=answer_pb2.USAGE_SOURCE_REPORTED
        )
        if self._kind == "silent usage":
            usage.Clear()
        elif self._kind == "odd usage":
            usage.output_token_count = -3
        if isinstance(self._prompt, EmbeddingPrompt):
            return Embedded([[0.5, 0.25] for _ in self._prompt.inputs], usage)
        # As many characters as make a third of them and one more the number of tokens.
        part = conversation_pb2.Part(text=_PIECE * (self._outputs - 1))
        message = conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[part])
        return Completed(
            answer_pb2.Answer(
                message=message, finish_reason=answer_pb2.FINISH_REASON_STOP, usage=usage, model=self._prompt.model
            )
        )

    def _bill(self, outputs: int) -> None:
        self._vendor.charge(self._attempt, self._prompt.model, self._inputs, outputs)

    def _give(self, event: Any) -> None:
        universe = self._vendor.universe
        self._back = max(self._back, universe.now + universe.pause())
        self._client.call_at(self._back, self._take, event)

    def _end(self, event: Any) -> None:
        self._over = True
        self._give(event)

    def _take(self, event: Any) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """The next event."""
        while not self._events:
            self._waiter = self._client.create_future()
            await self._waiter
        event = self._events.pop(0)
        if isinstance(event, AttemptFailed):
            self._is_told = True
            raise event
        self._is_told = isinstance(event, Completed | Embedded)
        return event

    def close(self) -> None:
        """The connection is closed, by whom or by what ever."""
        if not self._is_told and not (self._kind == "hangs" and self._started):
            self._vendor.crossed.add(self._attempt)
        self._vendor.loop.call_later(self._vendor.universe.pause(), self._closed)

    def _closed(self) -> None:
        if self._started and not self._over:
            self._bill(self._sent)
        self._over = True


class Adapter:
    """The provider as one execution process has it."""

    kind: Final = "vendor"
    address: Final = ""
    wire: Final = 0
    credential: Final = "one"

    def __init__(self, vendor: Vendor, loop: Loop, attempt_of: Callable[[Any], str]) -> None:
        self._vendor = vendor
        self._loop = loop
        self._attempt_of = attempt_of
        self._open: dict[_Work, None] = {}

    def _begin(self, prompt: Prompt | EmbeddingPrompt, *, streaming: bool) -> _Work:
        prompt.gate()
        self._loop.check()
        work = _Work(self._vendor, self._loop, self._attempt_of(prompt.gate), prompt, streaming=streaming)
        self._open[work] = None
        return work

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        completed = await self._whole(prompt)
        assert isinstance(completed, Completed)
        return completed

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider."""
        embedded = await self._whole(prompt)
        assert isinstance(embedded, Embedded)
        return embedded

    async def _whole(self, prompt: Prompt | EmbeddingPrompt) -> Any:
        work = self._begin(prompt, streaming=False)
        try:
            async with asyncio.timeout_at(prompt.deadline):
                return await work.next()
        except TimeoutError:
            raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "no answer in time", was_read=True) from None
        finally:
            self._close(work)

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        work = self._begin(prompt, streaming=True)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(prompt.deadline):
                        event = await work.next()
                except TimeoutError:
                    raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "no answer in time", was_read=True) from None
                yield event
                if isinstance(event, Completed):
                    return
        finally:
            self._close(work)

    def _close(self, work: _Work) -> None:
        self._open.pop(work, None)
        if self._loop.alive:
            work.close()

    def died(self) -> None:
        """The process is gone: the system closes its connections."""
        for work in list(self._open):
            work.close()

    async def probe(self, deadline: float) -> None:
        """See Provider."""

    async def close(self) -> None:
        """See Provider."""
