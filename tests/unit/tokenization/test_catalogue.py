from __future__ import annotations

import pytest

from services.runtime.config import ConfigError
from services.tokenization.catalogue import parse


def test_the_first_matching_pattern_decides() -> None:
    rules = parse(
        {"openai/gpt-3*": {"encoding": "cl100k_base"}, "openai/*": {"encoding": "o200k_base"}, "x/*": {"estimate": True}}
    )
    assert rules.rule_for("openai/gpt-3.5-turbo").place == "cl100k_base"  # type: ignore[union-attr]  # it matched
    assert rules.rule_for("openai/gpt-4o").place == "o200k_base"  # type: ignore[union-attr]  # it matched
    assert rules.rule_for("nobody/knows") is None


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"a": {"encoding": ""}, "b": {"nope": "x"}, "c": {}, "d": 3})
    assert len(caught.value.problems) == 4


def test_no_section_means_no_rules() -> None:
    assert parse(None).rules == ()
