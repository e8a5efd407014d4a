"""Counting: the port that tokenizers implement, and what a count says of itself."""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from services.tokenization.conversation import Conversation


class Method(enum.Enum):
    """How a count was made."""

    # Members are alike only to themselves; the inherited hash of their name runs Python, once for every count.
    __hash__ = object.__hash__

    EXACT = "exact"
    """The model's own tokenizer and chat template."""
    ENCODING = "encoding"
    """The model's encoding and published overheads per message."""
    ESTIMATED = "estimated"
    """A calibrated estimator."""


class Count(NamedTuple):
    """A number of tokens and how far to trust it."""

    tokens: int
    method: Method
    tokenizer: str
    """Name and version."""
    error_bound: float
    """The true count lies within `tokens` ± this share of it; for an estimate with 99 % confidence. 0: exact."""


class Counter(Protocol):
    """Counts for one tokenizer. Called from several threads at once. Never fails on any input."""

    @property
    def name(self) -> str:
        """Name and version of the tokenizer."""

    @property
    def method(self) -> Method:
        """How it counts."""

    @property
    def error_bound(self) -> float:
        """Bound of a typical count; a single count may state another one."""

    def count(self, conversation: Conversation) -> Count:
        """Tokens of the prompt that the conversation becomes."""

    def count_text(self, text: str) -> Count:
        """Tokens of a plain text without any template."""
