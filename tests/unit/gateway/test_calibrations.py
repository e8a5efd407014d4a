"""What the estimator is told of the usage that providers report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from services.gateway.calibrations import Calibrations
from services.gateway.holds import Tariff
from services.gateway.plans import Plan, PlannedCandidate
from services.gateway.receipts import Facts
from services.gateway.validation import check_generate
from services.runtime.call import Call
from services.tokenization.catalogue import parse
from services.tokenization.estimator import Estimator
from services.tokenization.service import TokenizationServicer
from services.tokenization.tokenizers import Tokenizers
from sluice.inference.v1 import answer_pb2, conversation_pb2, receipt_pb2
from sluice.routing.v1 import routing_service_pb2
from tests.unit.gateway.fakes import PRINCIPAL, FakeTokenization, World, answer, down, generate

ESTIMATED = receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED


def estimating() -> World:
    """A core whose prompts have to be estimated."""
    world = World()
    world.tokenization.method = ESTIMATED
    world.tokenization.tokenizer = "estimator@1"
    return world


async def reports(world: World) -> list[Any]:
    """The observations that were posted."""
    await world.calibrations.flush()
    return [one for request in world.tokenization.asked("Calibrate") for one in request.observations]


def facts_of(text: str = "hello", *, model: str = "a/one") -> Facts:
    """Facts of an operation whose prompt was estimated for `model`."""
    request = generate(text)
    facts = Facts("A" * 26, PRINCIPAL, request, "generate", 1, 1)
    tariff: Tariff | None = None
    planned = PlannedCandidate(model, "a", tariff, 0, 0, routing_service_pb2.Candidate(model=model))
    facts.plan = Plan(routing_service_pb2.PlanResponse(), (planned,), 1e12)
    facts.shape = check_generate(request, 1_000_000)
    facts.input_count = receipt_pb2.TokenCount(token_count=10, method=ESTIMATED, tokenizer="estimator@1")
    return facts


def add(calibrations: Calibrations, text: str = "hello", *, model: str = "a/one") -> None:
    """Takes in an answer of `model`."""
    calibrations.add(facts_of(text, model=model), answer(model=model))


async def test_the_reported_usage_of_an_estimated_prompt_is_told_with_what_execution_was_sent() -> None:
    world = estimating()
    world.execution.answer = answer(inputs=17)
    await world.generate(generate("what is it?"))
    await world.stream(generate("and that?"))
    told = await reports(world)
    assert [(one.model, one.reported.input_token_count) for one in told] == [("a/one", 17)] * 2
    assert all(one.reported.source == answer_pb2.USAGE_SOURCE_REPORTED for one in told)
    assert told[0].conversation.messages == world.execution.asked("Complete")[0].conversation.messages
    assert told[1].conversation.messages == world.execution.asked("StreamComplete")[0].conversation.messages
    assert world.calibrations.sent_count == 2


async def test_a_prompt_that_was_counted_is_not_told() -> None:
    world = World()
    await world.generate()
    assert await reports(world) == []


@pytest.mark.parametrize("source", [answer_pb2.USAGE_SOURCE_COUNTED, answer_pb2.USAGE_SOURCE_ESTIMATED])
async def test_the_estimator_does_not_learn_from_our_own_counts(source: answer_pb2.UsageSource.ValueType) -> None:
    world = estimating()
    world.execution.answer.usage.source = source
    await world.generate()
    assert await reports(world) == []


async def test_a_fallback_that_may_have_a_tokenizer_is_not_told() -> None:
    world = estimating()
    world.execution.answer = answer(model="b/two")
    await world.generate()
    assert await reports(world) == []


async def test_an_estimate_made_since_tokenization_is_away_is_not_told() -> None:
    """The model may have a public tokenizer."""
    world = World()
    world.tokenization.failures["Count"] = down("tokenization")
    completion = await world.generate()
    assert completion.receipt().input_count.method == ESTIMATED
    assert await reports(world) == []


async def test_prompts_with_pictures_are_not_told() -> None:
    world = estimating()
    request = generate()
    picture = conversation_pb2.Image(data=b"\x89PNG\r\n\x1a\n" + b"\0" * 32, media_type="image/png")
    request.conversation.messages[0].parts.add(image=picture)
    await world.generate(request)
    assert await reports(world) == []


async def test_a_sample_per_model_and_interval_is_told() -> None:
    world = World()
    calibrations = world.calibrations
    for _ in range(5):
        add(calibrations)
    add(calibrations, model="b/two")
    assert calibrations.dropped_count == 0, "what isn't in the sample isn't lost"
    worker = asyncio.create_task(calibrations.post_forever())
    try:
        await until(lambda: calibrations.sent_count == 4)
        for _ in range(5):
            add(calibrations)
        await until(lambda: calibrations.sent_count == 7)
    finally:
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
    models = [one.model for request in world.tokenization.asked("Calibrate") for one in request.observations]
    assert models == ["a/one"] * 3 + ["b/two"] + ["a/one"] * 3


async def test_the_queue_is_bounded_by_count() -> None:
    world = World()
    for number in range(12):
        add(world.calibrations, model=f"a/{number}")
    assert world.calibrations.dropped_count == 2
    assert len(await reports(world)) == 10
    add(world.calibrations, model="a/again")
    assert len(await reports(world)) == 11, "there is room again"


async def test_the_queue_is_bounded_by_bytes() -> None:
    world = World()
    for model in ("a/1", "a/2", "a/3"):
        add(world.calibrations, "x" * 4900, model=model)
    assert world.calibrations.dropped_count == 1
    assert [one.model for one in await reports(world)] == ["a/1", "a/2"]
    add(world.calibrations, "x" * 4900, model="a/4")
    assert world.calibrations.dropped_count == 1, "there is room again"


async def test_a_call_carries_no_more_than_the_threads_that_count_can_bear() -> None:
    world = World()
    calibrations = Calibrations(
        world.tokenization_stub, sample_count=1000, sample_seconds=1.0, max_count=1000, max_bytes=10**7, call_seconds=0.2
    )
    for _ in range(250):
        add(calibrations)
    add(calibrations, "x" * 200_000)
    add(calibrations, "x" * 300_000)
    await calibrations.flush()
    assert [len(request.observations) for request in world.tokenization.asked("Calibrate")] == [100, 100, 51, 1]
    assert calibrations.sent_count == 252


async def test_what_tokenization_does_not_take_is_counted_and_the_worker_goes_on() -> None:
    world = estimating()
    world.tokenization.failures["Calibrate"] = down("tokenization")
    worker = asyncio.create_task(world.calibrations.post_forever())
    try:
        assert (await world.generate()).answer.message.parts
        await until(lambda: world.calibrations.failed_count == 1)
        world.tokenization.failures.clear()
        await world.generate()
        await until(lambda: world.calibrations.sent_count == 1)
    finally:
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker


class Estimating(FakeTokenization):
    """The service itself, for models that no tokenizer is known of."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        super().__init__()
        estimator = Estimator(lambda text: len(text.split()))
        tokenizers = Tokenizers(_no_tokenizer, estimator, parse({}), lambda rule, error: None)
        self._servicer = TokenizationServicer(tokenizers, estimator, executor, inline_bytes=100_000)

    async def Count(self, request: Any, call: Call) -> Any:
        return await self._servicer.Count(request, call)

    async def Calibrate(self, request: Any, call: Call) -> Any:
        return await self._servicer.Calibrate(request, call)


def _no_tokenizer(rule: Any) -> Any:
    raise AssertionError(f"no rule names one: {rule}")


async def test_estimates_come_to_agree_with_what_providers_report() -> None:
    with ThreadPoolExecutor(1) as executor:
        world = World(tokenization=Estimating(executor))
        fresh = (await world.generate(generate("word " * 100))).receipt().input_count
        for number in range(250):
            words = 20 + number % 40
            world.execution.answer = answer(inputs=2 * words + 7)
            await world.generate(generate("word " * words))
            await world.calibrations.flush()
            world.calibrations._taken.clear()
        learnt = (await world.generate(generate("word " * 50))).receipt().input_count
    assert fresh.tokenizer == "estimator@1"
    assert learnt.tokenizer.startswith("estimator@1/a/one/")
    assert abs(learnt.token_count - 107) <= 2
    assert learnt.error_bound < fresh.error_bound / 4


async def until(condition: Callable[[], bool]) -> None:
    """Waits for `condition`, a second at most."""
    async with asyncio.timeout(1):
        while not condition():
            await asyncio.sleep(0.005)
