"""Errors of the tokenization service.

Failure
└── TokenizationError
    ├── DoesNotFit          what must stay in the conversation is larger than the window
    └── TokenizerMissing    a catalogue entry names a tokenizer that isn't on this machine
"""

from __future__ import annotations

from services.runtime.errors import Failure, Reason


class TokenizationError(Failure):
    """Base of the service's own errors."""


class DoesNotFit(TokenizationError):
    """What must stay in the conversation is larger than the window."""

    def __init__(self, needed: int, window: int) -> None:
        super().__init__(
            Reason.CONTEXT_WINDOW_EXCEEDED,
            f"the system turns and the last user turn need {needed} tokens, and the window takes {window}; shorten them",
            metadata={"input_tokens": str(needed), "limit": str(window)},
        )


class TokenizerMissing(TokenizationError):
    """A catalogue entry names a tokenizer that isn't on this machine."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(
            Reason.DEPENDENCY_UNAVAILABLE, f"tokenizer {what!r} is not here: {advice}", metadata={"dependency": what}
        )
