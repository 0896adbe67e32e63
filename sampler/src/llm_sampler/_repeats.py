"""Where the end of a sequence has occurred before in it, followed token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


class Repeats:
    """For each earlier place of a sequence's last token, how many tokens up to there equal the sequence's end.

    Following one more token costs as many operations as that token has occurred before. A match does not reach over
    a token of `breakers`.

    Example:
        >>> repeats = Repeats([5, 1, 2, 9, 1, 2])
        >>> list(repeats)                           # (position of what came next, tokens that match)
        [(3, 2)]
        >>> repeats.push(9)
        >>> list(repeats)
        [(4, 3)]
    """

    def __init__(self, ids: Sequence[int], breakers: Collection[int] = ()):
        self._breakers = breakers
        self._places: dict[int, list[int]] = {}
        self._size = len(ids)
        for place, token in enumerate(ids):
            self._places.setdefault(token, []).append(place)
        self._matches = self._of(ids)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(place of the token that came next there, length of the match), in rising order of places."""
        return ((place + 1, length) for place, length in self._matches.items())

    def push(self, token: int) -> None:
        places = self._places.setdefault(token, [])
        before = self._matches
        self._matches = {} if token in self._breakers else {place: before.get(place - 1, 0) + 1 for place in places}
        places.append(self._size)
        self._size += 1

    def _of(self, ids: Sequence[int]) -> dict[int, int]:
        """The matches of a whole sequence, by the Z-algorithm on its reverse (Gusfield 1997), in linear time."""
        n = len(ids)
        limit = next((back for back in range(n) if ids[n - 1 - back] in self._breakers), n)
        lengths = [0] * n
        left = right = 0
        for i in range(1, n if limit else 0):
            length = min(right - i, lengths[i - left]) if i < right else 0
            while i + length < n and ids[n - 1 - length] == ids[n - 1 - i - length]:
                length += 1
            if i + length > right:
                left, right = i, i + length
            lengths[i] = length
        return {n - 1 - i: min(lengths[i], limit) for i in range(n - 1, 0, -1) if lengths[i]}
