"""What the caching service reads out of messages of `sluice.inference.v1` and `sluice.caching.v1`."""

from __future__ import annotations

from typing import Final

from sluice.caching.v1 import caching_service_pb2 as pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2

_STORABLE: Final = frozenset(
    (answer_pb2.FINISH_REASON_STOP, answer_pb2.FINISH_REASON_TOOL_CALLS, answer_pb2.FINISH_REASON_LENGTH)
)


def question_of(conversation: conversation_pb2.Conversation) -> str | None:
    """The text of the last user turn; None when the last turn is another's or has more than text in it."""
    messages = conversation.messages
    if not messages or messages[-1].role != conversation_pb2.ROLE_USER:
        return None
    parts = messages[-1].parts
    if not parts or any(part.WhichOneof("kind") != "text" for part in parts):
        return None
    return "\n".join(part.text for part in parts)


def without_question(conversation: conversation_pb2.Conversation) -> bytes:
    """The conversation as bytes, the texts of its last turn left out, their number not."""
    blank = conversation_pb2.Conversation()
    blank.CopyFrom(conversation)
    for part in blank.messages[-1].parts:
        part.text = ""
    return blank.SerializeToString(deterministic=True)


def has_remote_picture(conversation: conversation_pb2.Conversation) -> bool:
    """Whether a picture is given by its address: what is there may change while the address doesn't."""
    return any(
        part.WhichOneof("kind") == "image" and part.image.WhichOneof("source") == "url"
        for message in conversation.messages
        for part in message.parts
    )


def refusal_to_store(answer: answer_pb2.Answer) -> str | None:
    """Why an answer must not be stored, in words; None: it may. One cut at the caller's own length is what was asked for."""
    if answer.finish_reason not in _STORABLE:
        return f"finish reason {answer_pb2.FinishReason.Name(answer.finish_reason)} means incomplete, filtered or failed"
    if not answer.message.parts:
        return "it is empty"
    return None


def serves_other_words(answer: answer_pb2.Answer) -> bool:
    """Whether an answer may serve a question in other words: plain text, complete."""
    return answer.finish_reason == answer_pb2.FINISH_REASON_STOP and all(
        part.WhichOneof("kind") in ("text", "reasoning") for part in answer.message.parts
    )


def payload_to_verdict(payload: bytes, response: pb2.LookupResponse) -> None:
    """Puts a serialised CachedAnswer and where it comes from into the response. DecodeError when it isn't one."""
    entry = response.answer
    entry.MergeFromString(payload)
    verdict = response.verdict
    verdict.entry_operation_id = entry.operation_id
    verdict.entry_time.CopyFrom(entry.create_time)
