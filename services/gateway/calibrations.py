"""What providers report of prompts that had to be estimated, told to the estimator so that it learns.

Behind the path and by sample: the estimator learns a model from a few hundred prompts, so the first ones of each interval do, and a
busy model neither fills the queue nor keeps the tokenization service busy. What finds the queue full or the service away is dropped and
counted; it costs nothing but a bound that narrows later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from services.gateway.estimates import estimated_count
from services.gateway.receipts import Facts
from services.gateway.validation import Shape
from services.runtime.errors import Failure
from sluice.inference.v1 import answer_pb2
from sluice.tokenization.v1 import tokenization_service_pb2

if TYPE_CHECKING:
    from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceAsyncStub

_MAX_BATCH: Final = 100
_MAX_BATCH_BYTES: Final = 256 * 1024
"""Each report is counted by the reference encoding again: more at a time would keep requests from the threads that count."""


class Calibrations:
    """A bounded queue of observations: conversations and the tokens that their provider reported."""

    def __init__(
        self,
        stub: TokenizationServiceAsyncStub,
        *,
        sample_count: int,
        sample_seconds: float,
        max_count: int,
        max_bytes: int,
        call_seconds: float,
    ) -> None:
        """Takes the first `sample_count` observations of a model in each interval of `sample_seconds`."""
        self._calibrate = stub.Calibrate
        self._sample_count = sample_count
        self._sample_seconds = sample_seconds
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._call_seconds = call_seconds
        self._gateways_own = estimated_count(Shape(0)).tokenizer
        self._taken: dict[str, int] = {}
        """Observations of this interval, by model."""
        self._queue: deque[tuple[tokenization_service_pb2.Observation, int]] = deque()
        """With the size of the conversation in bytes."""
        self._bytes = 0
        self._work = asyncio.Event()
        self.dropped_count = 0
        self.failed_count = 0
        self.sent_count = 0

    def add(self, facts: Facts, answer: answer_pb2.Answer) -> None:
        """Queues what was reported of a prompt whose count is an estimate, if it is one to learn from and within the sample."""
        plan, shape, count = facts.plan, facts.shape, facts.input_count
        assert plan is not None, "planned before"
        assert shape is not None, "checked before"
        assert count is not None, "counted before"
        model = answer.model
        # The prompt was counted for the plan's first candidate: whether another model has to be estimated isn't known. Nor is it after
        # an estimate of the gateway's own, made while tokenization didn't answer.
        if (
            answer.usage.source != answer_pb2.USAGE_SOURCE_REPORTED
            or model != plan.candidates[0].model
            or count.tokenizer == self._gateways_own
            # The estimator doesn't learn from pictures, and they are large.
            or shape.image_count
        ):
            return
        taken = self._taken.get(model, 0)
        if taken >= self._sample_count:
            return
        self._taken[model] = taken + 1
        # Even when nothing is queued: the interval has to end.
        self._work.set()
        size = shape.byte_count
        if len(self._queue) >= self._max_count or self._bytes + size > self._max_bytes:
            self.dropped_count += 1
            return
        observation = tokenization_service_pb2.Observation()
        observation.model = model
        # As the caller sent it: execution was asked with the same turns and tools, only the length of the answer may have been clamped.
        observation.conversation.CopyFrom(facts.request.conversation)
        observation.reported.CopyFrom(answer.usage)
        self._queue.append((observation, size))
        self._bytes += size

    async def post_forever(self) -> None:
        """The worker: an interval begins with the first observation, and at its end what was taken is posted."""
        while True:
            await self._work.wait()
            await asyncio.sleep(self._sample_seconds)
            self._work.clear()
            self._taken.clear()
            await self.flush()

    async def flush(self) -> None:
        """Posts what is queued."""
        while self._queue:
            batch = tokenization_service_pb2.CalibrateRequest()
            count = size = 0
            # The first goes whatever its size.
            while self._queue and count < _MAX_BATCH and (not count or size + self._queue[0][1] <= _MAX_BATCH_BYTES):
                observation, weight = self._queue.popleft()
                batch.observations.append(observation)
                count += 1
                size += weight
            self._bytes -= size
            try:
                await self._calibrate(batch, timeout=self._call_seconds)
            except Failure:
                # Not repeated: it isn't idempotent, and there are more prompts where these came from.
                self.failed_count += count
            else:
                self.sent_count += count
