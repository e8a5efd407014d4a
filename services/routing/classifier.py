"""Task types, and the classifier that infers them where the caller says nothing.

The classifier is a table over coarse features, so the same prompt always gets the same verdict, and it costs a microsecond.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class TaskType(enum.StrEnum):
    """Kinds of work; each has a chain of candidates per policy and a latency target."""

    SIMPLE = "simple"
    REASONING = "reasoning"
    CODE = "code"
    VISION = "vision"


@dataclass(frozen=True, slots=True)
class Features:
    """What a prompt looks like."""

    has_image: bool = False
    code_signals: int = 0
    """0 to 3."""
    reasoning_signals: int = 0
    """0 to 3."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A task type and why."""

    task_type: TaskType
    reason: str
    said_by_caller: bool


def said(task_type: TaskType) -> Verdict:
    """The verdict where the caller names the task type."""
    return Verdict(task_type, "the caller said so", True)


def classify(features: Features) -> Verdict:
    """The task type of a prompt: a picture wins, then code (two signs, or one and none of thought), then thought."""
    if features.has_image:
        return Verdict(TaskType.VISION, "there is a picture", False)
    code, thought = features.code_signals, features.reasoning_signals
    if code >= 2 or (code == 1 and thought == 0):
        return Verdict(TaskType.CODE, f"{code} of 3 signs of code, {thought} of 3 of multi-step thought", False)
    if thought:
        return Verdict(TaskType.REASONING, f"{thought} of 3 signs of multi-step thought, {code} of 3 of code", False)
    return Verdict(TaskType.SIMPLE, "no sign of code or multi-step thought", False)
