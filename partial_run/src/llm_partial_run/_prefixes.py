"""Which cache rows have the keys and values of a prompt's beginning."""

from __future__ import annotations

from itertools import accumulate


class Prefixes:
    """The ids of each row, and every prefix of them by its hash: finding the longest one compares no rows."""

    def __init__(self, rows: int):
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._hashes: list[list[int]] = [[] for _ in range(rows)]
        self._rows: dict[int, set[int]] = {}  # hash of a prefix -> the rows that begin with it

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> list[int]:
        return self._ids[row]

    def __setitem__(self, row: int, ids: list[int]) -> None:
        old, new = self._hashes[row], _hashes(ids)
        same = len(old) if new[: len(old)] == old else 0
        for prefix in old[same:]:
            self._rows[prefix].discard(row)
            if not self._rows[prefix]:
                del self._rows[prefix]
        for prefix in new[same:]:
            self._rows.setdefault(prefix, set()).add(row)
        self._ids[row], self._hashes[row] = list(ids), new

    def longest(self, ids: list[int]) -> tuple[int, set[int]]:
        """How many of the ids some row begins with, and the rows that do.

        >>> prefixes = Prefixes(2)
        >>> prefixes[1] = [5, 6, 7]
        >>> prefixes.longest([5, 6, 8])
        (2, {1})
        """
        hashes = _hashes(ids)
        low, high = 0, len(ids)  # prefixes of a known prefix are known: bisect
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if hashes[middle - 1] in self._rows else (low, middle - 1)
        rows = self._rows[hashes[low - 1]] if low else set()
        same = {row for row in rows if self._ids[row][:low] == ids[:low]}  # a hash proves nothing
        return (low, same) if same else (0, set())


def _hashes(ids: list[int]) -> list[int]:
    return list(accumulate(ids, lambda prefix, token: hash((prefix, token)), initial=0))[1:]
