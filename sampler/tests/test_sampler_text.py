"""Streamed text joins to what decode makes of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Detokenizer, Step, generate, sample, stream_text


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


def test_what_is_no_text_is_named_with_its_ids() -> None:
    with pytest.raises(TypeError, match=r"decode gave NoneType for the ids \[97\]; it must give text"):
        Detokenizer(lambda ids: None).push(97)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("call", [2, 3], ids=["at a token", "at the end"])
def test_what_decode_raises_comes_through_with_a_note_of_the_row(call: int) -> None:
    calls = []

    def decode(ids: list[int]) -> str:
        calls.append(ids)
        if len(calls) == call:
            raise OSError("disk gone")
        return from_bytes(ids)

    with pytest.raises(OSError, match="disk gone") as raised:
        list(stream_text(steps_of([97, 98]), decode))
    assert vars(raised.value)["__notes__"] == ["raised by decode in row 0"]


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


def typing(text: str) -> Callable[[Tensor], Tensor]:
    """A model over bytes that continues any prompt of one token with `text`."""
    raw = text.encode()

    def forward(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 256)
        logits[:, -1, raw[min(ids.shape[1] - 1, len(raw) - 1)]] = 50.0
        return logits

    return forward


def run(text: str, stops: list[str], **options: int) -> tuple[list[str], str, str | None]:
    """The pieces of text that the steps hold, why the row finished, and the text of its completion."""
    arguments: dict = {"temperature": 0, "stop_strings": stops, "decode": from_bytes, "max_new_tokens": 99, **options}
    steps = list(sample(typing(text), [[0]], **arguments))
    [row] = generate(typing(text), [[0]], **arguments)
    assert all(step.texts is not None for step in steps)
    return [step.texts[0] for step in steps if step.texts], str(steps[-1].finished[0]), row.text


def test_a_stop_string_ends_the_row_and_is_no_part_of_its_text() -> None:
    pieces, finished, text = run("one\n\ntwo", ["\n\n"])
    assert pieces == ["o", "n", "e", "", ""]
    assert (finished, text) == ("stop_string", "one")


def test_what_might_be_the_start_of_a_stop_string_is_held_back_until_it_is_not() -> None:
    pieces, finished, text = run("aUse. User: b", ["User:"])
    assert pieces == ["a", "", "", "", "Use.", " ", "", "", "", "", ""]
    assert (finished, text) == ("stop_string", "aUse. ")


def test_what_is_held_back_comes_at_the_end_where_no_stop_string_does() -> None:
    pieces, finished, text = run("abUse", ["User:"], max_new_tokens=5)
    assert pieces == ["a", "b", "", "", "Use"]
    assert (finished, text) == ("length", "abUse")
    pieces, finished, text = run("abUs;", ["User:"], stop_ids=ord(";"))
    assert pieces == ["a", "b", "", "", "Us"]
    assert (finished, text) == ("stop", "abUs")


def test_stop_strings_of_the_prompt_do_not_count() -> None:
    [row] = generate(
        typing("x" * 9), list(b"\n"), max_new_tokens=3, temperature=0, stop_strings=["\nx"], decode=from_bytes
    )
    assert (row.finished, row.text) == ("length", "xxx")


def test_stop_strings_before_the_minimum_of_new_tokens_do_not_count() -> None:
    pieces, finished, text = run("a.b.c", ["."], min_new_tokens=3)
    assert (finished, text) == ("stop_string", "a.b")
    assert pieces == ["a", ".", "b", ""]


@pytest.mark.parametrize(
    ("text", "stops", "least", "end"),
    [
        ("aUser: b", ["User:"], 3, "a"),  # begun before the minimum, completed after it
        ("ab.c.", ["b.", ".c."], 4, "ab"),  # completed before it: overlooked, though it is held for another one
        ("xabab", ["ab"], 4, "xab"),
        ("xababa", ["aba"], 5, "xab"),  # overlaps with one that was overlooked
        ("a.b.c", ["."], 2, "a"),  # completed by the very token that reaches it
    ],
)
def test_a_stop_string_counts_where_it_is_completed_once_the_minimum_is_reached(
    text: str, stops: list[str], least: int, end: str
) -> None:
    _, finished, got = run(text, stops, min_new_tokens=least)
    assert (finished, got) == ("stop_string", end)


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    table = [b"ab", b"cdXef", b"gh"]
    logits = torch.eye(3).roll(1, dims=1) * 50
    for stops in (["X", "de"], ["efg", "dX"], ["fgh", "dXe", "Xef"]):
        [row] = generate(
            lambda ids: logits[ids],
            [[2]],
            max_new_tokens=3,
            temperature=0,
            stop_strings=stops,
            decode=lambda ids: b"".join(table[i] for i in ids).decode(),
        )
        first = min(place for stop in stops if (place := "abcdXefgh".find(stop)) >= 0)
        assert (row.finished, row.text) == ("stop_string", "abcdXefgh"[:first])


@settings(max_examples=80, deadline=None)
@given(st.text("abé☃", max_size=40), st.lists(st.text("abé☃", min_size=1, max_size=5), min_size=1, max_size=3))
def test_streamed_text_is_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    whole = text + "|" * 9
    _, finished, got = run(whole, stops, max_new_tokens=len(text.encode()) + 2)
    # with characters of one token each, the text ends before the stop string that was complete first
    ends = [(place + len(stop), place) for stop in stops if (place := whole.find(stop)) >= 0]
    complete = min(end for end, _ in ends) if ends else None
    if complete is None:
        assert (finished, got) == ("length", text + "||")
    else:
        assert (finished, got) == ("stop_string", whole[: min(place for end, place in ends if end == complete)])


def test_stream_text_takes_the_text_of_the_steps_where_it_is_there() -> None:
    def steps():
        return sample(typing("one. two"), [[0]], max_new_tokens=9, temperature=0, stop_strings=".", decode=from_bytes)

    assert "".join(stream_text(steps())) == "".join(stream_text(steps(), from_bytes)) == "one"
    with pytest.raises(ValueError, match="the steps hold no text; give decode"):
        list(stream_text(sample(typing("one"), [[0]], max_new_tokens=2)))


def test_each_row_has_its_own_stop_strings_and_text() -> None:
    rows = generate(
        typing("one, two. three"),
        [[0], [1], [2]],
        max_new_tokens=12,
        temperature=0,
        stop_strings=[[","], None, ["e", "tw"]],
        decode=from_bytes,
    )
    assert [(row.text, row.finished) for row in rows] == [
        ("one", "stop_string"),
        ("one, two. th", "length"),
        ("on", "stop_string"),
    ]


def test_rows_that_gain_tokens_in_steps_of_others_are_followed_to_their_end() -> None:
    steps = [
        Step((0, 1), (97, 97), (0.0,) * 2, (0.0,) * 2, (None, None)),
        Step((1,), (98,), (0.0,), (0.0,), (None,)),
        Step((0, 1), (98, 99), (0.0,) * 2, (0.0,) * 2, ("length", "length")),
    ]
    assert list(stream_text(steps, from_bytes)) == ["a", "b"]
    assert list(stream_text(steps, from_bytes, row=1)) == ["a", "b", "c"]
