"""Text from tokens as they come: whole characters only, spaces where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ._note import noted
from ._step import Step

_WINDOW = 32  # tokens that are decoded again with each new one, at most; bounds the cost of a token


def stream_text(steps: Iterable[Step], decode: Callable[[list[int]], str] | None = None, row: int = 0) -> Iterator[str]:
    """The text of one row of `sample`, in pieces as soon as they are certain; that of a stop id is left out.

    decode: token ids -> text, such as `tokenizer.decode`; not needed where `sample` was given it, which with stop
    strings it must be: then their text is left out too, and what might be the start of one is held back. Ends when
    that row has finished. Joined, the pieces are what decode makes of all tokens at once. Raises ValueError where the
    steps have no such row. To show several rows at once, give `decode` to `sample` and take `Step.texts`.

    Example:
        >>> steps = [Step((0,), (byte,), (0.0,), (0.0,), (None,)) for byte in "né!".encode()]
        >>> list(stream_text(steps, lambda ids: bytes(ids).decode(errors="replace")))
        ['n', 'é', '!']
    """
    if decode is not None:
        check_decode(decode)
    return _pieces(steps, decode, row)


def _pieces(steps: Iterable[Step], decode: Callable[[list[int]], str] | None, row: int) -> Iterator[str]:
    text = None if decode is None else Detokenizer(decode)
    seen = False
    for step in steps:
        if row not in step.rows:
            if seen:
                continue  # others may gain more tokens at once
            raise ValueError(f"row {row} is not among the rows {step.rows} of the first step")
        seen = True
        index = step.rows.index(row)
        if step.texts is not None:
            piece = step.texts[index]
        elif text is None:
            raise ValueError("the steps hold no text; give decode to stream_text, or to sample")
        else:
            with noted("decode", f"row {row}"):
                piece = "" if step.finished[index] == "stop" else text.push(step.tokens[index])
        if piece:
            yield piece
        if step.finished[index] is not None:
            break
    if text is not None:
        with noted("decode", f"row {row}"):
            rest = text.flush()
        if rest:
            yield rest


def check_decode(decode: object) -> None:
    if not callable(decode):
        raise TypeError(f"decode must turn token ids into text, such as tokenizer.decode; got {type(decode)}")


class StopText:
    """One row's text as it becomes certain, up to the first of `stop_strings` in what was generated.

    Text that might be the start of a stop string is held back until the next tokens tell.

    Example:
        >>> text = StopText(lambda ids: "".join("ab."[i] for i in ids), ("..",))
        >>> [text.push(token) for token in (0, 2, 1, 2, 2)]
        [('a', False), ('', False), ('.b', False), ('', False), ('', True)]
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()):
        self._text = Detokenizer(decode)
        self._stop_strings = stop_strings
        self._held = ""
        self._overlooked = 0  # of what is held: a stop string that ends in there does not count

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it.

        With may_stop=False none does; one that has begun by then counts where a later token completes it.
        """
        self._held += self._text.push(token)
        if not may_stop:
            self._overlooked = len(self._held)
        found = [place for stop in self._stop_strings if (place := self._find(stop)) >= 0]
        if found:
            piece, self._held = self._held[: min(found)], ""
            self._text.flush()
            return piece, True
        keep = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        cut = len(self._held) - keep
        self._overlooked = max(0, self._overlooked - cut)
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece, False

    def flush(self) -> str:
        """What is still held back, at the end."""
        piece, self._held = self._held + self._text.flush(), ""
        return piece

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._overlooked - len(stop) + 1))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Detokenizer:
    """Turns one row's tokens into text, piece by piece.

    A token may hold part of a character, and its text may depend on the one before (a leading space that decoding
    strips), so the last tokens are decoded together each time and only what is new and complete is given out.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # the window: tokens since a point at which the text was complete
        self._shown = ""  # what of the window's text has been given out
        self._complete = 0  # tokens of the window after which its text was last complete, before the newest one

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        before = len(self._ids)
        self._ids.append(token)
        text = self._text_of(self._ids)
        settled = text.rstrip("\ufffd")  # the replacement character: bytes of a character still to come
        piece = self._show(settled)
        if text == settled:
            if before and len(self._ids) >= _WINDOW and self._complete:
                self._ids = self._ids[self._complete :]
                self._shown = self._text_of(self._ids)
                self._complete = 0
            self._complete = len(self._ids)
        elif len(self._ids) >= 2 * _WINDOW:  # no character is this long: the bytes are broken, and no longer waited for
            piece += self.flush()
        return piece

    def flush(self) -> str:
        """What is still held back, at the end."""
        piece = self._show(self._text_of(self._ids)) if self._ids else ""
        self._ids, self._shown, self._complete = [], "", 0
        return piece

    def _text_of(self, ids: list[int]) -> str:
        text = self._decode(ids)
        if not isinstance(text, str):
            raise TypeError(f"decode gave {type(text).__name__} for the ids {ids}; it must give text")
        return text

    def _show(self, text: str) -> str:
        if len(text) <= len(self._shown) and self._shown.startswith(text):
            return ""
        same = next((i for i, (a, b) in enumerate(zip(self._shown, text, strict=False)) if a != b), len(self._shown))
        piece = text[min(same, len(text)) :]
        self._shown = text
        return piece
