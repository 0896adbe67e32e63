"""What sampling has cost, and what drafts were good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._row import Row


@dataclass(slots=True)
class Stats:
    """Counts so far. forwards: calls of forward_func; of a row, those that it went through. tokens: gained.

    drafted: tokens that a drafter gave to check. accepted: how many of them a row gained. rows: the same for each row.
    """

    forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rows: tuple[Stats, ...] = ()

    @property
    def tokens_per_forward(self) -> float:
        """How many tokens a row gains, on average, each time that it goes through the forward; 1 without drafts."""
        return self.tokens / max(sum(row.forwards for row in self.rows) if self.rows else self.forwards, 1)

    def forwarded(self, rows: Sequence[Row]) -> None:
        self.forwards += 1
        for row in rows:
            self.rows[row.index].forwards += 1

    def gained(self, rows: Sequence[Row]) -> None:
        self.tokens += len(rows)
        for row in rows:
            self.rows[row.index].tokens += 1

    def checked(self, row: Row, drafted: int, accepted: int) -> None:
        for counts in (self, self.rows[row.index]):
            counts.drafted += drafted
            counts.accepted += accepted
