from __future__ import annotations

import base64

import pytest

from services.runtime.errors import Failure
from services.tokenization.conversation import Role
from services.tokenization.proto import conversation_from_proto, picture_size
from sluice.inference.v1 import conversation_pb2 as pb2

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def test_all_parts_of_a_turn_arrive() -> None:
    message = pb2.Conversation(
        messages=[
            pb2.Message(
                role=pb2.ROLE_ASSISTANT,
                parts=[
                    pb2.Part(text="a"),
                    pb2.Part(tool_call=pb2.ToolCall(id="1", name="f", arguments_json="{}")),
                    pb2.Part(reasoning=pb2.Reasoning(text="b")),
                ],
            ),
            pb2.Message(role=pb2.ROLE_TOOL, parts=[pb2.Part(tool_result=pb2.ToolResult(tool_call_id="1", text="r"))]),
            pb2.Message(role=pb2.ROLE_USER, parts=[pb2.Part(image=pb2.Image(data=PNG, detail="low"))]),
        ]
    )
    turns = conversation_from_proto(message).turns
    assert (turns[0].text, turns[0].tool_calls[0].name) == ("ab", "f")
    assert (turns[1].role, turns[1].text, turns[1].tool_call_id) == (Role.TOOL, "r", "1")
    assert (turns[2].pictures[0].width, turns[2].pictures[0].detail) == (1, "low")


def test_a_turn_without_a_role_is_refused() -> None:
    with pytest.raises(Failure, match="role"):
        conversation_from_proto(pb2.Conversation(messages=[pb2.Message()]))


@pytest.mark.parametrize("data", [b"", PNG[:20], b"\xff\xd8\xff", b"GIF89a", b"garbage" * 10])
def test_sizes_of_damaged_pictures_are_unknown(data: bytes) -> None:
    assert picture_size(data) == (None, None)
