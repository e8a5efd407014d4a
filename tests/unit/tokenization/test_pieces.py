from __future__ import annotations

from services.tokenization.pieces import Pieces


def test_a_text_is_counted_once_and_the_oldest_is_forgotten() -> None:
    asked: list[str] = []

    def count(text: str) -> int:
        asked.append(text)
        return len(text)

    pieces = Pieces(count, 2)
    assert [pieces(t) for t in ("a", "bb", "a", "", "ccc", "bb")] == [1, 2, 1, 0, 3, 2]
    assert asked == ["a", "bb", "ccc", "bb"]


def test_long_texts_are_not_kept() -> None:
    pieces = Pieces(len, 10)
    assert pieces("x" * 100_000) == 100_000
    assert not pieces._known
