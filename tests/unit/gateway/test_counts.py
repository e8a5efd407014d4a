"""Which prompts are counted before they are sent, and what goes by the size of the others."""

from __future__ import annotations

from typing import Any

import pytest

from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import conversation_pb2, inference_service_pb2, receipt_pb2
from tests.unit.gateway.fakes import World, candidate, down, generate, price

_NONE = inference_service_pb2.RECEIPT_VIEW_NONE
_PICTURE = conversation_pb2.Part(image=conversation_pb2.Image(data=b"\x89PNG", media_type="image/png"))


def plain(text: str = "hello", **fields: Any) -> Any:
    """A request of which nobody will read a receipt."""
    return generate(text, receipt_view=_NONE, **fields)


def counted(world: World) -> int:
    """How often tokenization was asked."""
    return len(world.tokenization.asked("Count"))


async def warm(**fields: Any) -> World:
    """A world that knows that its model has a tokenizer: one request was counted."""
    world = World(**fields)
    await world.generate(plain("the first"))
    assert counted(world) == 1
    return world


async def test_a_short_prompt_of_which_nothing_depends_is_not_counted_again() -> None:
    world = await warm()
    await world.generate(plain())
    assert counted(world) == 1
    before, request = world.execution.asked("Complete")
    assert (before.count_when_needed, before.input_count.token_count) == (False, 10)
    assert request.count_when_needed
    assert request.input_count.method == receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED


@pytest.mark.parametrize(
    "request_",
    [
        generate(),
        plain(request_id="r-1"),
        plain("x" * 8193),
        plain(conversation_fields={"max_output_tokens": 4000}),
    ],
    ids=["a receipt is wanted", "others may join", "it is long", "the window is tight"],
)
async def test_where_something_depends_on_it_it_is_counted(request_: Any) -> None:
    world = World()
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", window=4017))
    await world.generate(plain("the first"))
    await world.generate(request_)
    assert counted(world) == 2
    assert not world.execution.asked("Complete")[-1].count_when_needed


async def test_pictures_and_streams_are_counted() -> None:
    world = await warm()
    picture = plain()
    picture.conversation.messages[0].parts.append(_PICTURE)
    await world.generate(picture)
    assert counted(world) == 2
    await world.stream(plain())
    assert counted(world) == 3


async def test_what_can_only_be_estimated_is_always_asked_for() -> None:
    """The estimator learns from those that it made."""
    world = World()
    world.tokenization.method = receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED
    for _ in range(3):
        await world.generate(plain())
    assert counted(world) == 3


async def test_the_estimator_is_not_told_of_prompts_that_went_by_their_size() -> None:
    world = await warm()
    for _ in range(3):
        await world.generate(plain())
    assert not world.calibrations._queue


async def test_the_hold_covers_a_token_for_each_byte() -> None:
    world = World(nano_usd=10_000_000)
    world.metering.budget = 10_000_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    await world.generate(plain("the first"))
    await world.generate(plain("x" * 400))
    first, second = world.execution.asked("Complete")
    assert first.billing.hold_nano_usd == 10 * 1000 + 100 * 2000
    assert second.count_when_needed
    assert 400 * 1000 + 100 * 2000 <= second.billing.hold_nano_usd <= 450 * 1000 + 100 * 2000


async def test_where_money_is_short_it_is_counted_and_less_is_held() -> None:
    """500,000 do not cover a token for each byte, but what there really is."""
    world = World(nano_usd=500_000)
    world.metering.budget = 500_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    await world.generate(plain("the first"))
    await world.generate(plain("x" * 400))
    assert counted(world) == 2
    request = world.execution.asked("Complete")[-1]
    assert not request.count_when_needed
    assert request.input_count.token_count == 10
    assert request.billing.hold_nano_usd == 10 * 1000 + 100 * 2000
    assert not world.metering.asked("Hold")


async def test_under_a_cost_limit_that_its_size_would_pass_it_is_counted() -> None:
    world = World()
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    await world.generate(plain("the first"))
    wishes = inference_service_pb2.RoutingWishes(max_cost_nano_usd=10 * 1000 + 100 * 2000)
    await world.generate(plain("x" * 400, routing=wishes))
    assert counted(world) == 2
    assert world.execution.asked("Complete")[-1].billing.hold_nano_usd == 10 * 1000 + 100 * 2000
    wishes.max_cost_nano_usd = 1
    with pytest.raises(Failure) as caught:
        await world.generate(plain("x" * 400, routing=wishes))
    assert caught.value.reason is Reason.COST_LIMIT


async def test_without_tokenization_known_models_go_on_uncounted_and_others_by_size() -> None:
    world = await warm()
    world.tokenization.failures["Count"] = down("tokenization")
    await world.generate(plain())
    assert world.execution.asked("Complete")[-1].count_when_needed
    completion = await world.generate(generate())
    assert completion.receipt().degradations == ["tokenization: estimated, DEPENDENCY_UNAVAILABLE"]
    assert not world.execution.asked("Complete")[-1].count_when_needed


async def test_every_prompt_can_be_counted() -> None:
    world = World(uncounted_bytes=0)
    for _ in range(2):
        await world.generate(plain())
    assert counted(world) == 2
