"""Signs in a prompt."""

from __future__ import annotations

import time

import pytest

from services.gateway.features import signals


@pytest.mark.parametrize(
    ("text", "code", "thought"),
    [
        ("What is the capital of France?", 0, 0),
        ("Translate 'good morning' to German, please.", 0, 0),
        ("Write a python script that renames files", 1, 0),
        ("Why does this fail?\n```\nx = 1\n```\nin main.py", 2, 1),
        ("Traceback (most recent call last)\n  File 'a.py', line 3\nfix the bug", 3, 0),
        ("Prove that the sum of two even numbers is even", 0, 1),
        ("Think step by step: what is 3 * 4 + 5?", 0, 2),
        ("Solve:\n1. x + y = 3\n2. x - y = 1", 0, 3),
    ],
)
def test_signs(text: str, code: int, thought: int) -> None:
    assert signals(text) == (code, thought)


def test_the_ends_of_a_long_text_are_judged_in_bounded_time() -> None:
    text = "a" * 4_000_000 + " please refactor this code"
    began = time.process_time()
    assert signals(text)[0] == 1
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize("text", ["", "\n" * 5000, "1. " * 2000, "\n1. a" * 2000, "=" * 5000, "\x00\ud7ff" * 3000])
def test_odd_texts_are_judged_in_bounded_time(text: str) -> None:
    began = time.process_time()
    code, thought = signals(text)
    assert 0 <= code <= 3
    assert 0 <= thought <= 3
    assert time.process_time() - began < 0.2
