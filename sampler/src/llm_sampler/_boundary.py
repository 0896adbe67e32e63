"""Where a context ends and its continuations begin, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

Boundary: TypeAlias = Literal["error", "separate", "backoff"]


def encode_choices(
    encode: Callable[[str], Any],
    context: str,
    continuations: Sequence[str],
    *,
    boundary: Boundary = "error",
    begin_ids: Sequence[int] = (),
) -> tuple[list[int], list[list[int]]]:
    """The ids of `context`, and of each of `continuations` behind it.

    Each continuation is encoded together with the context, as a model has seen such text, and cut off behind the ids of
    the context. A tokenizer may join the end of the one with the start of the other ("Ans" + "wer"), and there is no
    cut. Then boundary decides, for all continuations alike, so that they can be compared:

    - "error": ValueError, which names the continuation;
    - "separate": context and continuations are encoded apart;
    - "backoff": the cut is moved back to the last one that all of them have; what the context loses is scored with each.

    Args:
        encode: text -> ids, or something that has `.ids`. What it puts at the start of every text (begin-of-text) is
            kept once; it should put nothing at the end.
        begin_ids: put before the context, where encode does not do so. A context may be empty with them.

    Example:
        >>> words = ["Ans", "wer", "Answer", "Question: "]
        >>> def encode(text, ids=()):  # the longest word first
        ...     word = max((word for word in words if text.startswith(word)), key=len, default="")
        ...     return encode(text[len(word):], [*ids, words.index(word)]) if text else list(ids)
        >>> encode_choices(encode, "Question: ", ["Ans", "Answer"])
        ([3], [[0], [2]])
        >>> encode_choices(encode, "Question: Ans", ["wer"], boundary="separate")
        ([3, 0], [[1]])
        >>> encode_choices(encode, "Question: Ans", ["wer"], boundary="backoff")
        ([3], [[2]])
    """
    if boundary not in ("error", "separate", "backoff"):
        raise ValueError(f"boundary is {boundary!r}; it must be 'error', 'separate' or 'backoff'")
    for row, text in enumerate(continuations):
        if not isinstance(text, str):
            raise TypeError(f"continuations: row {row} is {type(text).__name__}; with encode it must be text")
        if not text:
            raise ValueError(f"continuations: row {row} is empty; there is nothing to score")
    before = list(begin_ids)
    head = before + _ids(encode, context)
    if not head:
        raise ValueError("context has no token; give begin_ids, such as the model's begin-of-text token")
    if boundary == "separate":
        always = _ids(encode, "")  # begin-of-text
        apart = [_ids(encode, text) for text in continuations]
        return head, [ids[len(always) :] if ids[: len(always)] == always else ids for ids in apart]

    joint = [before + _ids(encode, context + text) for text in continuations]
    cut = min((_shared(head, ids) for ids in joint), default=len(head))
    if cut < len(head) and boundary == "error":
        row = next(row for row, ids in enumerate(joint) if _shared(head, ids) < len(head))
        raise ValueError(
            f"continuations: row {row} ({continuations[row]!r}) does not begin where a token does: the tokenizer joins "
            f"its start with the end of the context ({context[-20:]!r}), or ends each text with a token. Move the space "
            "to the start of the continuation, or pass boundary='backoff' or 'separate'"
        )
    if cut == 0:
        raise ValueError(
            "nothing is left of the context in front of the cut; give begin_ids, such as the begin-of-text token"
        )
    return head[:cut], [ids[cut:] for ids in joint]


def _ids(encode: Callable[[str], Any], text: str) -> list[int]:
    encoded = encode(text)
    return list(getattr(encoded, "ids", encoded))


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
