"""What sampling gives: one `Step` for each token that the rows gain, and a `Completion` per row of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Finished: TypeAlias = Literal["stop", "stop_string", "complete", "length"]
Top: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One token for each of `rows`; all fields run parallel to it.

    rows: indices into input_ids. logprobs: natural log-probabilities of the tokens under the model itself, which no
    parameter changes, None unless they were asked for; processed_logprobs: under the distribution that was drawn from.
    finished: None, or why the row has: "stop" (the token is a stop id), "stop_string", "complete" (a constraint has
    nothing to add), "length" (it is the last that max_new_tokens allows). texts: what of the row's text is now certain,
    where sample was given decode.
    top_logprobs, top_processed_logprobs: the most likely tokens as (id, log-probability), where they were asked for.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    processed_logprobs: tuple[float, ...]
    finished: tuple[Finished | None, ...]
    texts: tuple[str, ...] | None = None
    top_logprobs: tuple[Top, ...] | None = None
    top_processed_logprobs: tuple[Top, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All that was generated for one row; `tokens` ends with the stop id where `finished` is "stop".

    logprobs: as in `Step`. text: without what a stop id or a stop string stands for; None unless
    sample was given decode.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    processed_logprobs: tuple[float, ...]
    finished: Finished
    text: str | None = None
    top_logprobs: tuple[Top, ...] | None = None
    top_processed_logprobs: tuple[Top, ...] | None = None

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.finished == "stop" else self.tokens


def collected(steps: Iterable[Step]) -> list[Completion]:
    """The steps of all rows to their end, as one `Completion` per row, in the order of the rows."""
    gained: dict[int, list[tuple]] = {}
    for step in steps:
        none = (None,) * len(step.rows)
        columns = (
            step.tokens,
            step.logprobs or none,
            step.processed_logprobs,
            step.finished,
            step.texts or none,
            step.top_logprobs or none,
            step.top_processed_logprobs or none,
        )
        for row, *values in zip(step.rows, *columns, strict=True):
            gained.setdefault(row, []).append(tuple(values))
    completions = []
    for row in sorted(gained):
        tokens, logprobs, processed, finished, texts, top, top_processed = zip(*gained[row], strict=True)
        completions.append(
            Completion(
                tokens,
                None if logprobs[0] is None else logprobs,
                processed,
                finished[-1],
                None if texts[0] is None else "".join(texts),
                None if top[0] is None else top,
                None if top_processed[0] is None else top_processed,
            )
        )
    return completions
