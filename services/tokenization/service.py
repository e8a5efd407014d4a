"""The servicer of `sluice.tokenization.v1.TokenizationService`."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Final

from services.runtime.call import Call
from services.runtime.errors import invalid
from services.tokenization.counting import Counter
from services.tokenization.estimator import Estimator
from services.tokenization.fitting import fit
from services.tokenization.proto import conversation_from_proto, count_to_proto, fill_count, method_to_proto
from services.tokenization.tokenizers import Tokenizers, count_all
from sluice.inference.v1 import conversation_pb2
from sluice.tokenization.v1 import tokenization_service_pb2 as pb2

MAX_MODELS: Final = 16
MAX_TEXTS: Final = 2048
MAX_OBSERVATIONS: Final = 1000
MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100


class TokenizationServicer:
    """Translates, counts, translates."""

    def __init__(self, tokenizers: Tokenizers, estimator: Estimator, executor: Executor, *, inline_bytes: int) -> None:
        self._tokenizers = tokenizers
        self._estimator = estimator
        self._executor = executor
        self._inline = inline_bytes

    async def _counter(self, model: str) -> Counter:
        return self._tokenizers.known(model) or await self._tokenizers.counter(model)

    async def Count(self, request: pb2.CountRequest, call: Call) -> pb2.CountResponse:
        """See the proto."""
        models = request.models
        if not 1 <= len(models) <= MAX_MODELS:
            raise invalid("models", f"must have 1 to {MAX_MODELS} entries, got {len(models)}")
        _require(request.HasField("conversation"))
        conversation = conversation_from_proto(request.conversation)
        is_short = conversation.size <= self._inline
        response = pb2.CountResponse()
        if is_short and len(models) == 1 and (counter := self._tokenizers.known(models[0])) is not None:
            # What nearly every call is.
            fill_count(response.counts.add(), counter.count(conversation))
            return response
        counters = [await self._counter(model) for model in models]
        if is_short:
            counts = count_all(counters, conversation)
        else:
            loop = asyncio.get_running_loop()
            counts = await loop.run_in_executor(self._executor, count_all, counters, conversation)
        for count in counts:
            fill_count(response.counts.add(), count)
        return response

    async def CountTexts(self, request: pb2.CountTextsRequest, call: Call) -> pb2.CountTextsResponse:
        """See the proto."""
        if not 1 <= len(request.texts) <= MAX_TEXTS:
            raise invalid("texts", f"must have 1 to {MAX_TEXTS} entries, got {len(request.texts)}")
        counter = await self._counter(request.model)
        texts = list(request.texts)
        if sum(map(len, texts)) <= self._inline:
            counts = [counter.count_text(text) for text in texts]
        else:
            loop = asyncio.get_running_loop()
            counts = await loop.run_in_executor(self._executor, lambda: [counter.count_text(text) for text in texts])
        return pb2.CountTextsResponse(counts=[count_to_proto(count) for count in counts])

    async def Fit(self, request: pb2.FitRequest, call: Call) -> pb2.FitResponse:
        """See the proto."""
        _require(request.HasField("conversation"))
        if request.max_input_tokens < 1:
            raise invalid("max_input_tokens", f"must be positive, got {request.max_input_tokens}")
        conversation = conversation_from_proto(request.conversation)
        counter = await self._counter(request.model)
        loop = asyncio.get_running_loop()
        fitted = await loop.run_in_executor(self._executor, fit, conversation, request.max_input_tokens, counter.count)
        kept = conversation_pb2.Conversation()
        kept.CopyFrom(request.conversation)
        del kept.messages[:]
        kept.messages.extend(request.conversation.messages[index] for index in fitted.kept)
        return pb2.FitResponse(conversation=kept, count=count_to_proto(fitted.count), dropped_message_count=fitted.dropped)

    async def Calibrate(self, request: pb2.CalibrateRequest, call: Call) -> pb2.CalibrateResponse:
        """See the proto."""
        if len(request.observations) > MAX_OBSERVATIONS:
            raise invalid("observations", f"must have at most {MAX_OBSERVATIONS} entries, got {len(request.observations)}")
        seen = [
            (observation.model, conversation_from_proto(observation.conversation), observation.reported.input_token_count)
            for observation in request.observations
        ]

        def learn() -> None:
            for model, conversation, reported in seen:
                self._estimator.observe(model, conversation, reported)

        await asyncio.get_running_loop().run_in_executor(self._executor, learn)
        return pb2.CalibrateResponse()

    async def ListTokenizers(self, request: pb2.ListTokenizersRequest, call: Call) -> pb2.ListTokenizersResponse:
        """See the proto."""
        if not 0 <= request.page_size <= MAX_PAGE:
            raise invalid("page_size", f"must be 0 to {MAX_PAGE}, got {request.page_size}")
        size = request.page_size or DEFAULT_PAGE
        listed = [one for one in self._tokenizers.listed() if one.name > request.page_token]
        page = listed[:size]
        return pb2.ListTokenizersResponse(
            tokenizers=[
                pb2.Tokenizer(
                    name=one.name,
                    method=method_to_proto(one.method),
                    model_patterns=one.patterns,
                    error_bound=one.error_bound,
                )
                for one in page
            ],
            next_page_token=page[-1].name if len(listed) > size else "",
        )


def _require(present: bool) -> None:
    if not present:
        raise invalid("conversation", "must be set")
