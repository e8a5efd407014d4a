from __future__ import annotations

import pytest

from services.tokenization.adapters import encodings
from services.tokenization.conversation import Conversation, Picture, Role, Tool, Turn
from services.tokenization.counting import Method
from services.tokenization.errors import TokenizerMissing
from services.tokenization.openai import EncodingCounter, picture_tokens, tools_text


@pytest.fixture(scope="module")
def counter() -> EncodingCounter:
    return EncodingCounter(encodings.version_of("o200k_base"), encodings.read("o200k_base"))


def test_overheads_are_the_published_ones(counter: EncodingCounter) -> None:
    one = counter.count(Conversation((Turn(Role.USER, "hello"),)))
    two = counter.count(Conversation((Turn(Role.USER, "hello"), Turn(Role.ASSISTANT, ""))))
    # 3 per message, 1 for the role, 1 for the text, 3 to prime the answer.
    assert one.tokens == 3 + 1 + 1 + 3
    assert two.tokens - one.tokens == 4
    assert one.method is Method.ENCODING
    assert one.tokenizer.startswith("o200k_base@bpe-openai-")


@pytest.mark.parametrize(
    ("picture", "tokens"),
    [
        (Picture(4096, 8192, "low"), 85),
        (Picture(1024, 1024, "high"), 765),
        (Picture(2048, 4096, "high"), 1105),
        (Picture(None, None, "auto"), 765),
    ],
)
def test_pictures_by_the_tile_formula_with_the_guide_s_own_examples(picture: Picture, tokens: int) -> None:
    assert picture_tokens(picture) == tokens


def test_tools_are_written_as_a_namespace_and_widen_the_bound(counter: EncodingCounter) -> None:
    tool = Tool(
        "get_weather", "Weather of a city", '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
    )
    assert "type get_weather = (_: {\ncity: string," in tools_text((tool,))
    plain = counter.count(Conversation((Turn(Role.USER, "hi"),)))
    tooled = counter.count(Conversation((Turn(Role.USER, "hi"),), (tool,)))
    assert tooled.tokens > plain.tokens + 9
    assert tooled.error_bound > plain.error_bound


@pytest.mark.parametrize("schema", ["", "not json", "[]", '{"properties": 3}', '{"properties": {"a": {"type": ["x"]}}}'])
def test_any_schema_can_be_counted(counter: EncodingCounter, schema: str) -> None:
    assert counter.count(Conversation((Turn(Role.USER, "hi"),), (Tool("t", "", schema),))).tokens > 0


def test_an_unknown_encoding_is_missing() -> None:
    with pytest.raises(TokenizerMissing, match="o200k_base"):
        encodings.read("nope")
