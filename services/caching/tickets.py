"""Tickets: what a lookup found out, in the caller's hands until the answer is there.

A ticket is authenticated with a key that all replicas derive from the mesh's service token, so a store may come to another replica
than its lookup. It doesn't carry the question, which may be long: that waits in the replica of the lookup, in bounded memory, and
a store elsewhere fills the exact tier alone.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections import OrderedDict
from hashlib import blake2b
from typing import Final, NamedTuple

from services.caching.errors import TicketInvalid
from services.caching.keys import KEY_BYTES, PARTITION_BYTES, SCOPE_BYTES

MAX_BYTES: Final = 256
_VERSION: Final = 1
_MAC_BYTES: Final = 16
_HEAD: Final = struct.Struct(f">BBQd{PARTITION_BYTES}s{KEY_BYTES}s{SCOPE_BYTES}s")
NO_SCOPE: Final = bytes(SCOPE_BYTES)


class Ticket(NamedTuple):
    """What Store needs to know of the lookup."""

    id: bytes
    """Unforgeable and unique for (request, time)."""
    partition: bytes
    """Digest of the tenant."""
    namespace: str
    key: bytes
    scope: bytes
    """NO_SCOPE: the answer is not for the semantic tier."""
    create_time: float
    """Unix time in seconds."""
    ttl: float
    """How long the answer may be stored, in seconds."""


class Tickets:
    """Makes and reads tickets."""

    def __init__(self, service_token: str) -> None:
        """Without a service token tickets are good in this process alone."""
        material = service_token.encode() or secrets.token_bytes(32)
        self._key = blake2b(material, digest_size=32, person=b"sluice-ticket").digest()

    def issue(self, partition: bytes, namespace: str, key: bytes, scope: bytes, now: float, ttl: float) -> bytes:
        """A ticket of at most 256 bytes; `now` is Unix time, `ttl` in seconds."""
        body = _HEAD.pack(_VERSION, 0, int(now * 1e6), ttl, partition, key, scope) + namespace.encode()
        return body + blake2b(body, digest_size=_MAC_BYTES, key=self._key).digest()

    def read(self, ticket: bytes, partition: bytes) -> Ticket:
        """What the ticket says. Raises TicketInvalid when it isn't ours, or another tenant's."""
        body, mac = ticket[:-_MAC_BYTES], ticket[-_MAC_BYTES:]
        if not _HEAD.size <= len(body) <= MAX_BYTES:
            raise TicketInvalid
        if not hmac.compare_digest(mac, blake2b(body, digest_size=_MAC_BYTES, key=self._key).digest()):
            raise TicketInvalid
        version, _, created, ttl, whose, key, scope = _HEAD.unpack_from(body)
        if version != _VERSION or whose != partition:
            raise TicketInvalid
        return Ticket(mac, whose, body[_HEAD.size :].decode(), key, scope, created / 1e6, ttl)


class Pending:
    """Questions between their lookup and their store; the oldest are forgotten first."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def put(self, ticket: bytes, text: str) -> None:
        """Keeps the question that the ticket belongs to."""
        self.take(ticket)
        self._texts[ticket[-_MAC_BYTES:]] = text
        self._bytes += len(text)
        while len(self._texts) > self._max_entries or self._bytes > self._max_bytes:
            _, gone = self._texts.popitem(last=False)
            self._bytes -= len(gone)

    def take(self, ticket: bytes) -> str | None:
        """The question, once; None: forgotten, or asked at another replica."""
        text = self._texts.pop(ticket[-_MAC_BYTES:], None)
        if text is not None:
            self._bytes -= len(text)
        return text
