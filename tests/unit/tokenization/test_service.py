from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.runtime.call import Call
from services.runtime.errors import Failure, Reason
from services.tokenization.adapters import encodings
from services.tokenization.catalogue import Rule, parse
from services.tokenization.counting import Counter
from services.tokenization.errors import TokenizerMissing
from services.tokenization.estimator import Estimator
from services.tokenization.openai import EncodingCounter
from services.tokenization.service import TokenizationServicer
from services.tokenization.tokenizers import Tokenizers
from sluice.inference.v1 import answer_pb2, conversation_pb2, receipt_pb2
from sluice.tokenization.v1 import tokenization_service_pb2 as pb2

CALL = Call("/sluice.tokenization.v1.TokenizationService/Count", deadline=1e9)


def load(rule: Rule) -> Counter:
    if rule.place == "gone":
        raise TokenizerMissing("gone", "it isn't here")
    return EncodingCounter(rule.place, encodings.read(rule.place))


@pytest.fixture
async def servicer() -> AsyncIterator[TokenizationServicer]:
    rules = parse({"openai/*": {"encoding": "o200k_base"}, "lost/*": {"encoding": "gone"}})
    estimator = Estimator(encodings.read("o200k_base"))
    missing: list[str] = []
    tokenizers = Tokenizers(load, estimator, rules, lambda rule, error: missing.append(rule.place))
    with ThreadPoolExecutor(1) as executor:
        yield TokenizationServicer(tokenizers, estimator, executor, inline_bytes=200)


def hello(times: int = 1) -> conversation_pb2.Conversation:
    part = conversation_pb2.Part(text="hello " * times)
    return conversation_pb2.Conversation(messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[part])])


async def test_each_model_is_counted_by_its_own_method(servicer: TokenizationServicer) -> None:
    request = pb2.CountRequest(models=["openai/gpt-4o", "anthropic/claude", "lost/model"], conversation=hello())
    counts = (await servicer.Count(request, CALL)).counts
    assert [count.method for count in counts] == [
        receipt_pb2.TOKEN_COUNT_METHOD_ENCODING,
        receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED,
        receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED,
    ]
    assert all(count.tokenizer for count in counts)
    assert counts[1].error_bound > counts[0].error_bound


async def test_large_conversations_are_counted_alike(servicer: TokenizationServicer) -> None:
    small, large = [
        (await servicer.Count(pb2.CountRequest(models=["openai/gpt-4o"], conversation=hello(n)), CALL)).counts[0].token_count
        for n in (1, 1000)
    ]
    assert 900 < large - small < 1100


async def test_fit_returns_a_conversation_that_fits(servicer: TokenizationServicer) -> None:
    conversation = hello(50)
    conversation.messages.add(role=conversation_pb2.ROLE_ASSISTANT).parts.add(text="yes " * 50)
    conversation.messages.add(role=conversation_pb2.ROLE_USER).parts.add(text="and now?")
    response = await servicer.Fit(pb2.FitRequest(model="openai/gpt-4o", conversation=conversation, max_input_tokens=40), CALL)
    assert [message.parts[0].text for message in response.conversation.messages] == ["and now?"]
    assert response.dropped_message_count == 2
    assert len(conversation.messages) == 3, "the caller's message is not changed"
    with pytest.raises(Failure) as caught:
        await servicer.Fit(pb2.FitRequest(model="openai/gpt-4o", conversation=hello(99), max_input_tokens=5), CALL)
    assert caught.value.reason is Reason.CONTEXT_WINDOW_EXCEEDED


async def test_reports_calibrate_the_estimate(servicer: TokenizationServicer) -> None:
    request = pb2.CountRequest(models=["p/m"], conversation=hello(20))
    before = (await servicer.Count(request, CALL)).counts[0]
    observations = [
        pb2.Observation(model="p/m", conversation=hello(n % 40 + 1), reported=answer_pb2.Usage(input_token_count=n % 40 + 8))
        for n in range(600)
    ]
    await servicer.Calibrate(pb2.CalibrateRequest(observations=observations), CALL)
    after = (await servicer.Count(request, CALL)).counts[0]
    assert abs(after.token_count - 27) <= 2
    assert after.error_bound < before.error_bound


async def test_tokenizers_are_listed_in_pages(servicer: TokenizationServicer) -> None:
    await servicer.Count(pb2.CountRequest(models=["openai/gpt-4o"], conversation=hello()), CALL)
    first = await servicer.ListTokenizers(pb2.ListTokenizersRequest(page_size=1), CALL)
    second = await servicer.ListTokenizers(pb2.ListTokenizersRequest(page_size=1, page_token=first.next_page_token), CALL)
    names = [one.name for page in (first, second) for one in page.tokenizers]
    assert names == ["estimator@1", "o200k_base"]
    assert not second.next_page_token


@pytest.mark.parametrize(
    "request_",
    [
        pb2.CountRequest(conversation=hello()),
        pb2.CountRequest(models=["m"]),
        pb2.CountRequest(models=["m"], conversation=conversation_pb2.Conversation(messages=[conversation_pb2.Message()])),
    ],
)
async def test_bad_requests_are_named(servicer: TokenizationServicer, request_: pb2.CountRequest) -> None:
    with pytest.raises(Failure) as caught:
        await servicer.Count(request_, CALL)
    assert caught.value.reason is Reason.REQUEST_INVALID
    assert caught.value.metadata["field"]
