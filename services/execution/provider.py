"""The port behind which providers stand, and what goes through it.

The conversation is the contract's own message, carried as an opaque object: it would be copied field by field into an equal shape
only to be read once, on the hottest path there is. Adapters know its type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def ungated() -> None:
    """The gate of a call that nobody records."""


@dataclass(slots=True)
class Prompt:
    """One call of one provider."""

    upstream_model: str
    """Name of the model at the provider."""
    model: str
    """Catalogue id."""
    conversation: Any
    """`sluice.inference.v1.Conversation`; shared, never changed."""
    max_output_tokens: int
    """Most tokens of the answer; 0: the provider's default."""
    deadline: float
    """Moment of the loop's clock."""
    end_user_hash: str
    metadata: Mapping[str, str]
    accepted_wire: int
    """`WireFormat` that may be passed through unread; 0: none."""
    gate: Callable[[], None]
    """To be called right before the first byte goes to the provider: the attempt must be on record by then. Raises SpoolFull: then nothing
    may be sent."""


@dataclass(slots=True)
class Completed:
    """A whole answer."""

    answer: Any
    """`sluice.inference.v1.Answer` with usage; its usage's source is UNSPECIFIED when the provider reported none."""
    reply: Any = None
    """CompleteResponse whose `answer` it is, with nothing else in it: an adapter that makes the answer there saves the copy. None: the answer
    stands alone."""


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """One embedding call."""

    upstream_model: str
    model: str
    inputs: Sequence[str]
    dimensions: int | None
    deadline: float
    end_user_hash: str
    metadata: Mapping[str, str]
    gate: Callable[[], None]
    """See Prompt."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors, and what they used."""

    vectors: Sequence[Sequence[float]]
    usage: Any
    """`sluice.inference.v1.Usage`; its source is UNSPECIFIED when the provider reported none."""


class Provider(Protocol):
    """One upstream. Calls raise AttemptFailed; cancelling one closes its connection."""

    @property
    def kind(self) -> str:
        """`openai`, `anthropic`, `gemini`, `local`, `echo`."""

    @property
    def address(self) -> str:
        """Where it is, without credentials; empty when it is in this process."""

    @property
    def wire(self) -> int:
        """`WireFormat` of its streams; 0: none of those that pass through."""

    @property
    def credential(self) -> str:
        """Tells credentials apart without showing them: a breaker belongs to one."""

    async def complete(self, prompt: Prompt) -> Completed:
        """A whole answer."""

    def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """Pieces as they come: bytes (whole events of the accepted wire) or a DeltaBatch each; last a Completed."""

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """Vectors."""

    async def probe(self, deadline: float) -> None:
        """A free call; returns when the provider answered, raises AttemptFailed."""

    async def close(self) -> None:
        """Closes connections and children."""
