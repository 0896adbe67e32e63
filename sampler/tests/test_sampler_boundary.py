"""Where a context ends in tokens is the caller's decision, never an accident."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_sampler import encode_choices

WORDS = ["<s>", "</s>", "Ans", "wer", "Answer", ":", " ", " yes", " no", "yes", "s"]
BEGIN, END = 0, 1


def encode(text: str) -> list[int]:
    """Longest word first, as a tokenizer does it."""
    ids = []
    while text:
        word = max((word for word in WORDS if text.startswith(word)), key=len)
        ids.append(WORDS.index(word))
        text = text[len(word) :]
    return ids


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def test_where_the_tokens_meet_at_the_boundary_nothing_is_decided() -> None:
    for boundary in ("error", "separate", "backoff"):
        head, rows = encode_choices(encode, "Answer:", [" yes", " no"], boundary=boundary)
        assert (head, rows) == (ids("Answer", ":"), [ids(" yes"), ids(" no")])


def test_a_joined_token_is_an_error_that_names_the_continuation() -> None:
    with pytest.raises(ValueError, match=r"row 1 \('wer'\) does not begin where a token does.*boundary="):
        encode_choices(encode, ": Ans", ["s", "wer"])


def test_a_space_that_belongs_to_the_continuation_is_an_error_too() -> None:
    with pytest.raises(ValueError, match="Move the space"):
        encode_choices(encode, "Answer: ", ["yes"])


def test_backoff_cuts_at_one_place_for_all_and_loses_nothing() -> None:
    head, rows = encode_choices(encode, ": Ans", ["s", "wer"], boundary="backoff")
    assert (head, rows) == (ids(":", " "), [ids("Ans", "s"), ids("Answer")])


def test_separate_encodes_each_alone() -> None:
    head, rows = encode_choices(encode, ": Ans", ["s", "wer"], boundary="separate")
    assert (head, rows) == (ids(":", " ", "Ans"), [ids("s"), ids("wer")])


@pytest.mark.parametrize("boundary", ["error", "separate", "backoff"])
def test_the_begin_token_is_there_once_whoever_puts_it(boundary) -> None:
    theirs = encode_choices(lambda text: [BEGIN, *encode(text)], "Answer:", [" yes"], boundary=boundary)
    ours = encode_choices(encode, "Answer:", [" yes"], boundary=boundary, begin_ids=[BEGIN])
    assert theirs == ours == ([BEGIN, *ids("Answer", ":")], [ids(" yes")])


def test_a_tokenizer_that_ends_each_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="ends each text with a token"):
        encode_choices(lambda text: [*encode(text), END], "Answer:", [" yes"])


def test_what_has_ids_is_taken_as_those() -> None:
    class Encoding:
        def __init__(self, text: str) -> None:
            self.ids = encode(text)

    assert encode_choices(Encoding, "Answer:", [" yes"]) == encode_choices(encode, "Answer:", [" yes"])


def test_an_empty_context_needs_a_begin_token() -> None:
    assert encode_choices(encode, "", ["Answer"], begin_ids=[BEGIN]) == ([BEGIN], [ids("Answer")])
    with pytest.raises(ValueError, match="begin_ids"):
        encode_choices(encode, "", ["Answer"])
    with pytest.raises(ValueError, match="nothing is left of the context.*begin_ids"):
        encode_choices(encode, "Ans", ["wer"], boundary="backoff")
    assert encode_choices(encode, "Ans", ["wer"], boundary="backoff", begin_ids=[BEGIN]) == ([BEGIN], [ids("Answer")])


texts = st.lists(st.sampled_from(WORDS[2:]), min_size=1, max_size=5).map("".join)


@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_with_backoff_context_and_continuation_are_the_joint_encoding(context: str, continuations: list[str]) -> None:
    head, rows = encode_choices(encode, context, continuations, boundary="backoff", begin_ids=[BEGIN])
    for text, row in zip(continuations, rows, strict=True):
        assert row
        assert head + row == [BEGIN, *encode(context + text)]
        assert decode(head + row) == "<s>" + context + text
