from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tokenization.conversation import Conversation, Role, ToolCall, Turn
from services.tokenization.counting import Count, Method
from services.tokenization.errors import DoesNotFit
from services.tokenization.fitting import fit

S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL


def count(conversation: Conversation) -> Count:
    return Count(sum(len(turn.text) for turn in conversation.turns), Method.EXACT, "letters", 0.0)


def make(*turns: tuple[Role, str]) -> Conversation:
    return Conversation(tuple(Turn(role, text) for role, text in turns))


def test_oldest_whole_exchanges_go_first_and_the_system_turn_stays() -> None:
    conversation = make((S, "ss"), (U, "u1"), (A, "a1"), (U, "u2"), (A, "a2"), (U, "u3"))
    assert fit(conversation, 12, count).dropped == 0
    fitted = fit(conversation, 11, count)
    assert fitted.kept == (0, 3, 4, 5)
    assert fitted.dropped == 2
    assert fit(conversation, 4, count).kept == (0, 5)


def test_what_must_stay_and_doesn_t_fit_is_an_error() -> None:
    with pytest.raises(DoesNotFit) as caught:
        fit(make((S, "ssss"), (U, "u1"), (A, "a1"), (U, "u2")), 5, count)
    assert caught.value.metadata["limit"] == "5"


def test_the_upper_end_of_the_bound_must_fit() -> None:
    def unsure(conversation: Conversation) -> Count:
        return Count(count(conversation).tokens, Method.ESTIMATED, "guess", 0.5)

    conversation = make((U, "u1"), (A, "a1"), (U, "u2"))
    assert fit(conversation, 6, count).dropped == 0
    assert fit(conversation, 6, unsure).dropped == 2


@given(
    st.lists(st.tuples(st.sampled_from([S, U, A, "call"]), st.integers(1, 5)), min_size=1, max_size=30),
    st.integers(1, 60),
)
def test_a_call_never_stands_without_its_result(shape: list[tuple[Role | str, int]], window: int) -> None:
    turns: list[Turn] = []
    for index, (role, size) in enumerate(shape):
        if isinstance(role, Role):
            turns.append(Turn(role, "x" * size))
        else:
            turns.append(Turn(A, "", tool_calls=(ToolCall(f"c{index}", "f", "{}"),)))
            turns.append(Turn(T, "r" * size, tool_call_id=f"c{index}"))
    conversation = Conversation(tuple(turns))
    try:
        fitted = fit(conversation, window, count)
    except DoesNotFit:
        return
    kept = [turns[index] for index in fitted.kept]
    assert count(Conversation(tuple(kept))).tokens <= window
    calls = {call.id for turn in kept for call in turn.tool_calls}
    assert calls == {turn.tool_call_id for turn in kept if turn.tool_call_id}
    assert all(turn in kept for turn in turns if turn.role is S)
