"""What the domain needs of the outside: an embedding model, an index of vectors, a tier that replicas share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
"""384 numbers, of length 1."""


@dataclass(frozen=True, slots=True)
class Record:
    """An entry of the semantic tier."""

    partition: str
    """The tenant's, `keys.partition`."""
    scope: bytes
    """Only records of an equal scope are compared."""
    key: bytes
    """Unique in its partition: the exact key of the request."""
    namespace: str
    vector: Vector
    text: str
    """The question, for the guard."""
    payload: bytes
    """The stored answer; the index doesn't look inside."""
    create_time: float
    """Unix time in seconds."""
    expire_time: float


@dataclass(frozen=True, slots=True)
class Match:
    """A record that is near."""

    score: float
    """Cosine, -1 to 1."""
    key: bytes
    text: str
    payload: bytes
    create_time: float


class VectorIndex(Protocol):
    """Records by meaning. Every method raises TierUnavailable when the engine can't do it now; callers bound the time.

    Nothing crosses a partition or a scope. A record whose time is over is not found, whether it is removed yet or not.
    """

    async def upsert(self, record: Record) -> None:
        """Stores a record, in place of the one with its partition and key."""

    async def search(self, partition: str, scope: bytes, vector: Vector, limit: int) -> list[Match]:
        """The nearest records of one partition and one scope, nearest first, at most `limit`."""

    async def delete(self, partition: str, namespace: str = "") -> int:
        """Removes a partition's records, of one namespace when it is given; returns how many."""

    async def count(self, partition: str, namespace: str = "") -> int:
        """How many records a partition has, in one namespace when it is given."""

    async def ping(self) -> None:
        """Returns when the engine answers."""


class Embedder(Protocol):
    """Turns texts into vectors."""

    async def embed(self, text: str, *, urgent: bool) -> Vector | None:
        """The vector; None when the model can't read the whole text. Urgent ones go first.

        Raises TierUnavailable when too many wait. Callers bound the time.
        """


class SharedTier(Protocol):
    """The exact tier of all replicas. Best effort: nothing raises."""

    def knows(self, key: bytes) -> bool:
        """Whether another replica has announced the key; if not, asking is in vain."""

    async def get(self, partition: str, namespace: str, key: bytes) -> tuple[bytes, float] | None:
        """The value and the Unix time at which it ends; None when it isn't there or can't be had in time."""

    def put(self, partition: str, namespace: str, key: bytes, value: bytes, expire: float) -> bool:
        """Queues a write; False when it was dropped."""

    async def purge(self, tenant: str, partition: str, namespace: str) -> None:
        """Removes a tenant's entries from the bucket and from all replicas' memories."""
