"""Keys: what must be equal for two requests to be the same, and what must be equal for two to be compared by meaning.

Every field stands behind its length, so that no two lists of fields give the same bytes. The digests are of 256 and 128 bits.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

KEY_BYTES: Final = 32
SCOPE_BYTES: Final = 16
PARTITION_BYTES: Final = 16


def prefix(tenant: str, namespace: str, model: str, policy_version: str, task_type: int, routing_scope: str) -> bytes:
    """Everything beside the conversation that a key covers, as bytes that only these values give."""
    return (
        f"{len(tenant)}:{tenant}{len(namespace)}:{namespace}{len(model)}:{model}{len(policy_version)}:{policy_version}"
        f"{task_type}:{len(routing_scope)}:{routing_scope}|"
    ).encode()


def exact_key(prefix: bytes, conversation: bytes) -> bytes:
    """The key of a request. `conversation` is its deterministic serialisation."""
    return blake2b(prefix + conversation, digest_size=KEY_BYTES, person=b"sluice-exact").digest()


def scope_fingerprint(prefix: bytes, conversation: bytes) -> bytes:
    """The scope of a request. `conversation` is the serialisation without the text of the last user turn."""
    return blake2b(prefix + conversation, digest_size=SCOPE_BYTES, person=b"sluice-scope").digest()


def partition(tenant: str) -> str:
    """A tenant as a name that suits subjects, files and collections whatever its id is made of: 32 hexadecimal digits."""
    return blake2b(tenant.encode(), digest_size=PARTITION_BYTES, person=b"sluice-tenant").hexdigest()
