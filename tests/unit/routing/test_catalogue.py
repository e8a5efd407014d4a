"""The catalogue is checked as a whole, and every problem is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.execution.catalogue import KINDS
from services.routing.catalogue import CAPABILITIES, FIELDS, UNCARRIED, WIRE_FIELDS, Catalogue, parse
from services.routing.classifier import TaskType
from services.runtime.config import ConfigError
from tests.unit.routing import examples


def test_a_good_file_is_read() -> None:
    found = parse(examples.content())
    assert found.models["a/cheap"].abilities == {"chat", "streaming", "field:seed", *(f"field:{one}" for one in WIRE_FIELDS)}
    assert found.models["c/seeing"].abilities == {
        "chat",
        "streaming",
        "vision",
        "tools",
        "field:tools.strict",
        "field:response_format.description",
        "field:reasoning_effort",
    }, "what the provider's wire format has no place for no model of it can do"
    assert found.models["a/cheap"].regions == ("eu",), "a model runs where its provider does unless it says otherwise"
    assert found.models["a/cheap"].upstream_model == "cheap"
    assert found.models["fake/echo"].is_fake
    assert found.names["cheap"] == "a/cheap"
    assert found.policies["default"].weights == {"cost": 1.0, "latency": 0.0, "load": 0.0, "affinity": 0.0}
    assert found.times[TaskType.CODE].attempt_timeout == 0.5


def test_the_catalogue_that_ships_is_good_and_has_no_fake_in_a_chain() -> None:
    found = parse(yaml.safe_load((Path(__file__).parents[3] / "deploy" / "catalogue.yaml").read_text()))
    for policy in found.policies.values():
        for chain in policy.chains.values():
            assert len(chain) >= 3
            assert not any(found.models[name].is_fake for name in chain)


def test_what_can_t_be_carried_is_known_of_every_kind() -> None:
    assert set(UNCARRIED) == set(KINDS)
    for uncarried in UNCARRIED.values():
        assert uncarried <= CAPABILITIES | FIELDS | WIRE_FIELDS


def test_equal_content_has_one_version_and_a_change_another() -> None:
    changed = examples.content()
    changed["models"]["a/cheap"]["max_output_tokens"] = 99
    assert parse(examples.content()).version == parse(examples.content()).version != parse(changed).version


def _drop(content: dict[str, Any]) -> None:
    content["policies"]["default"]["task_types"]["simple"] = ["a/cheap", "b/dear"]


BREAKS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("policies.default.task_types.simple: must have at least 2 fallbacks", _drop),
    ("policies.default.task_types.code: must be set", lambda c: c["policies"]["default"]["task_types"].pop("code")),
    (
        "policies.default.task_types.vision: 'b/dear' can't",
        lambda c: c["policies"]["default"]["task_types"]["vision"].append("b/dear"),
    ),
    ("'x/none' is not in the catalogue", lambda c: c["policies"]["default"]["task_types"]["code"].append("x/none")),
    ("names a model twice", lambda c: c["policies"]["default"]["task_types"]["code"].append("a/cheap")),
    ("policies.default.weights.luck", lambda c: c["policies"]["default"]["weights"].update(luck=1)),
    ("at least one must be above 0", lambda c: c["policies"]["default"].update(weights={"cost": 0})),
    ("must be a number from 0", lambda c: c["policies"]["default"].update(weights={"cost": -1})),
    ("policies: must be a mapping that has 'default'", lambda c: c["policies"].pop("default")),
    ("the default policy is everybody's", lambda c: c["policies"]["default"].update(tenants=["acme"])),
    ("models.a/cheap.provider: 'z'", lambda c: c["models"]["a/cheap"].update(provider="z")),
    ("models.a/cheap.capabilities: 'flight'", lambda c: c["models"]["a/cheap"]["capabilities"].append("flight")),
    ("models.a/cheap.fields: 'mood'", lambda c: c["models"]["a/cheap"]["fields"].append("mood")),
    ("models.a/cheap.fields: 'messages.name' is not", lambda c: c["models"]["a/cheap"]["fields"].append("messages.name")),
    (
        "models.c/seeing.fields: a provider of kind gemini can't carry 'logit_bias'",
        lambda c: c["models"]["c/seeing"].update(fields=["seed", "logit_bias"]),
    ),
    (
        "models.c/seeing.capabilities: a provider of kind gemini can't carry 'logprobs'",
        lambda c: c["models"]["c/seeing"]["capabilities"].append("logprobs"),
    ),
    ("models.a/cheap.wheels: unknown", lambda c: c["models"]["a/cheap"].update(wheels=4)),
    ("models.a/cheap.context_window", lambda c: c["models"]["a/cheap"].update(context_window=True)),
    ("can't be its own fallback", lambda c: c["models"]["a/cheap"]["fallbacks"].append("a/cheap")),
    ("'no/where' is not in the catalogue", lambda c: c["models"]["a/cheap"]["fallbacks"].append("no/where")),
    ("'cheap' already names a/cheap", lambda c: c["models"]["b/dear"].update(aliases=["cheap"])),
    ("'policy/x' can't be an alias", lambda c: c["models"]["b/dear"].update(aliases=["policy/x"])),
    ("models.nameless: the id must be", lambda c: c["models"].update(nameless=examples.model("a"))),
    ("task_types.code: must have latency_target", lambda c: c["task_types"].pop("code")),
    ("task_types.code.latency_target: must be a duration", lambda c: c["task_types"]["code"].update(latency_target=5)),
    ("models.a/cheap.price: must be `free`, or", lambda c: c["models"]["a/cheap"].update(price={"input_usd_per_million": 1})),
    ("extras: unknown section", lambda c: c.update(extras={})),
]


@pytest.mark.parametrize(("expected", "spoil"), BREAKS, ids=[name for name, _ in BREAKS])
def test_a_bad_file_is_refused_with_its_problem(expected: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    content = examples.content()
    spoil(content)
    with pytest.raises(ConfigError) as caught:
        parse(content)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_all_problems_are_named_at_once() -> None:
    content = examples.content()
    for expected, spoil in BREAKS:
        if expected.startswith("models."):
            spoil(content)
    with pytest.raises(ConfigError) as caught:
        parse(content)
    assert len(caught.value.problems) >= 5


@pytest.mark.parametrize(
    "content", [None, [], "text", {}, {"models": []}, {"models": {"a/b": None}, "policies": {"default": 1}}]
)
def test_nonsense_is_refused_not_a_crash(content: object) -> None:
    with pytest.raises(ConfigError):
        parse(content)


def test_fallbacks_may_be_waived_in_words() -> None:
    content = examples.content()
    _drop(content)
    content["policies"]["default"]["waive_fallbacks"] = "a test"
    found: Catalogue = parse(content)
    assert found.policies["default"].chains[TaskType.SIMPLE] == ("a/cheap", "b/dear")
