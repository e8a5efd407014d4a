"""Answers of finished requests with a request id, kept where every gateway finds them: a repetition gets them again whichever gateway ran
the request, and whether that one still lives.

An answer is kept before its last piece goes to the caller. So who has got all of it gets the same when it asks again, as long as answers
are kept; who lost the connection before may, too.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from services.gateway.operations import reused
from services.gateway.receipts import Completion, RemoteCompletion
from sluice.inference.v1 import inference_service_pb2

Answered = Completion | inference_service_pb2.EmbedResponse

_HEAD: Final = struct.Struct(">B32s")
"""Kind of the record and fingerprint of the request; the answer follows."""
_GENERATE: Final = 1
_EMBED: Final = 2


class Replays(Protocol):
    """The kept answers of all gateways, as bytes by key. Neither call raises, and both are bounded: without them requests go on."""

    async def find(self, key: str) -> bytes | None:
        """What was kept; None: nothing, or it can't be asked for."""

    async def keep(self, key: str, record: bytes) -> bool:
        """Keeps it until its time is over; False: it isn't kept."""


class NoReplays:
    """Keeps nothing: a gateway that is alone has its own memory."""

    async def find(self, key: str) -> bytes | None:
        """See Replays."""
        return None

    async def keep(self, key: str, record: bytes) -> bool:
        """See Replays."""
        return False


def key_of(scope: str, request_id: str) -> str:
    """Key of a request id, which says nothing of it. Two scopes never meet: the length of the first part is in it."""
    return sha256(f"{len(scope)}\0{scope}\0{request_id}".encode()).hexdigest()


def request_key_of(key: str, fingerprint: bytes) -> bytes:
    """What the ledger knows the request by, 16 bytes. Another body under the same id is another request to it: where answers are kept
    it is refused before, and where they are lost it must be paid for."""
    return sha256(key.encode() + fingerprint).digest()[:16]


def record_of(fingerprint: bytes, result: Answered) -> bytes:
    """What is kept of a finished request."""
    if isinstance(result, Completion):
        response = inference_service_pb2.GenerateResponse(
            operation_id=result.operation_id, answer=result.answer, cost_nano_usd=result.cost_nano_usd, receipt=result.receipt()
        )
        return _HEAD.pack(_GENERATE, fingerprint) + response.SerializeToString()
    return _HEAD.pack(_EMBED, fingerprint) + result.SerializeToString()


def result_of(record: bytes, request_id: str, fingerprint: bytes) -> Answered | None:
    """The kept answer; None: a newer or damaged record. Failure REQUEST_ID_REUSED when it is of another request."""
    if len(record) < _HEAD.size:
        return None
    kind, kept = _HEAD.unpack_from(record)
    if kind not in (_GENERATE, _EMBED):
        return None
    if kept != fingerprint:
        raise reused(request_id)
    try:
        if kind == _EMBED:
            return inference_service_pb2.EmbedResponse.FromString(record[_HEAD.size :])
        response = inference_service_pb2.GenerateResponse.FromString(record[_HEAD.size :])
    except DecodeError:
        return None
    return RemoteCompletion(response.operation_id, request_id, response.answer, response.cost_nano_usd, response.receipt)
