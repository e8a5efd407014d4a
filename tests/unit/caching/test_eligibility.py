from __future__ import annotations

import pytest

from services.caching.eligibility import question_refusal


@pytest.mark.parametrize(
    "text", ["What is the capital of France?", "Explain photosynthesis", "how to sort a list", "Who is José?"]
)
def test_english_is_compared(text: str) -> None:
    assert question_refusal(text, 4096) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no text"),
        ("  \n", "no text"),
        ("12 + 7", "English"),
        ("Что такое кошка?", "English"),
        ("法国的首都是什么？", "English"),
        ("Was ist die Hauptstadt von Frankreich?", "English"),
        ("what is " + "x" * 4096, "4096 bytes"),
        ("what is é" + "é" * 2044, "4096 bytes"),
    ],
)
def test_the_rest_is_not(text: str, why: str) -> None:
    refusal = question_refusal(text, 4096)
    assert refusal is not None
    assert why in refusal
