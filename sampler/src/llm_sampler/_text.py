"""Text from tokens as they come: whole characters only, spaces where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ._sample import Step

_WINDOW = 32  # tokens that are decoded again with each new one, at most; bounds the cost of a token


def stream_text(steps: Iterable[Step], decode: Callable[[list[int]], str], row: int = 0) -> Iterator[str]:
    """The text of one row of `sample`, in pieces as soon as they are whole; a stop id's text is left out.

    decode: token ids -> text, such as `tokenizer.decode`. Ends when that row has finished. Joined, the pieces are what
    decode makes of all tokens at once. Raises ValueError where the steps have no such row. To show several rows at
    once, give each a `Detokenizer`.

    Example:
        >>> steps = [Step((0,), (byte,), (0.0,), (0.0,), (None,)) for byte in "né!".encode()]
        >>> list(stream_text(steps, lambda ids: bytes(ids).decode(errors="replace")))
        ['n', 'é', '!']
    """
    if not callable(decode):
        raise TypeError(f"decode must turn token ids into text, such as tokenizer.decode; got {type(decode)}")
    return _pieces(steps, Detokenizer(decode), row)


def _pieces(steps: Iterable[Step], text: Detokenizer, row: int) -> Iterator[str]:
    seen = False
    for step in steps:
        if row not in step.rows:
            if seen:
                break
            raise ValueError(f"row {row} is not among the rows {step.rows} of the first step")
        seen = True
        index = step.rows.index(row)
        if step.finished[index] != "stop" and (piece := text.push(step.tokens[index])):
            yield piece
        if step.finished[index] is not None:
            break
    if rest := text.flush():
        yield rest


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
        text = self._decode(self._ids)
        settled = text.rstrip("\ufffd")  # the replacement character: bytes of a character still to come
        piece = self._show(settled)
        if text == settled:
            if before and len(self._ids) >= _WINDOW and self._complete:
                self._ids = self._ids[self._complete :]
                self._shown = self._decode(self._ids)
                self._complete = 0
            self._complete = len(self._ids)
        elif len(self._ids) >= 2 * _WINDOW:  # no character is this long: the bytes are broken, and no longer waited for
            piece += self.flush()
        return piece

    def flush(self) -> str:
        """What is still held back, at the end."""
        piece = self._show(self._decode(self._ids)) if self._ids else ""
        self._ids, self._shown, self._complete = [], "", 0
        return piece

    def _show(self, text: str) -> str:
        if len(text) <= len(self._shown) and self._shown.startswith(text):
            return ""
        same = next((i for i, (a, b) in enumerate(zip(self._shown, text, strict=False)) if a != b), len(self._shown))
        piece = text[min(same, len(text)) :]
        self._shown = text
        return piece
