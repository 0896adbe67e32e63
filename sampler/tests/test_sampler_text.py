"""Streamed text joins to what decode makes of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_sampler import Detokenizer, Step, stream_text


def steps_of(tokens: list[int], finished: str | None = "length") -> list[Step]:
    last = len(tokens) - 1
    return [Step((0,), (t,), (0.0,), (0.0,), (finished if i == last else None,)) for i, t in enumerate(tokens)]  # type: ignore[arg-type]


def from_bytes(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def pairs(table: list[bytes]) -> Callable[[list[int]], str]:
    """A byte-level decoder with tokens of several bytes, which may cut through characters."""
    return lambda ids: b"".join(table[i] for i in ids).decode(errors="replace")


def words(ids: list[int]) -> str:
    """As sentencepiece decodes: every word has a leading space, and the first of a text is stripped."""
    return "".join(" " + "abcdefgh"[i % 8] * (i % 3 + 1) if i % 4 else "xyz"[i % 3] for i in ids).removeprefix(" ")


def byte_runs(ids: list[int]) -> str:
    """Byte fallback as the tokenizers library has it: a run of bytes that is not valid as a whole is all replaced."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=120))
def test_bytes_join_to_the_text_and_no_piece_is_broken(text: str) -> None:
    pieces = list(stream_text(steps_of(list(text.encode())), from_bytes))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=80, deadline=None)
@given(
    st.text(st.characters(min_codepoint=0x80, max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=120),
    st.data(),
)
def test_tokens_that_cut_through_characters_join_to_the_text(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    table, place = [], 0
    while place < len(raw):
        size = data.draw(st.integers(1, 4))
        table.append(raw[place : place + size])
        place += size
    assert "".join(stream_text(steps_of(list(range(len(table)))), pairs(table))) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=200))
def test_leading_spaces_are_right_across_the_window(tokens: list[int]) -> None:
    assert "".join(stream_text(steps_of(tokens), words)) == words(tokens)


def test_byte_fallback_runs_come_out_whole() -> None:
    text = "你好世界" * 20
    pieces = list(stream_text(steps_of(list(text.encode())), byte_runs))
    assert pieces == list(text)


def test_the_stop_tokens_text_is_left_out() -> None:
    assert "".join(stream_text(steps_of(list(b"ab;"), "stop"), from_bytes)) == "ab"


def test_what_is_held_back_comes_at_the_end() -> None:
    assert list(stream_text(steps_of([97, 0xE4, 0xBD]), from_bytes)) == ["a", "\ufffd"]


def test_bytes_that_never_complete_are_not_waited_for() -> None:
    text = Detokenizer(from_bytes)
    assert any(text.push(0xFF) for _ in range(100))


def test_a_token_is_decoded_in_a_bounded_window() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return from_bytes(ids)

    assert "".join(stream_text(steps_of(list(b"word " * 400)), decode)) == "word " * 400
    assert longest <= 64


def test_one_row_of_several_is_followed_to_its_end_only() -> None:
    def steps():
        yield Step((0, 1), (97, 98), (0.0, 0.0), (0.0, 0.0), (None, None))
        yield Step((0, 1), (99, 100), (0.0, 0.0), (0.0, 0.0), (None, "length"))
        raise AssertionError("asked for more than the row has")

    assert list(stream_text(steps(), from_bytes, row=1)) == ["b", "d"]


def test_a_row_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 3 is not among"):
        list(stream_text(steps_of([97]), from_bytes, row=3))


def test_text_is_there_as_soon_as_its_step_is() -> None:
    taken = []

    def steps():
        for step in steps_of(list(b"abc")):
            taken.append(step)
            yield step

    assert next(stream_text(steps(), from_bytes)) == "a"
    assert len(taken) == 1
