"""Best of n: several samples of each prompt, ranked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from ._forward import ForwardFunc, Rows
from ._sample import generate
from ._settings import plain
from ._step import Completion


def best_of(
    forward_func: ForwardFunc,
    input_ids: Rows,
    *,
    n: int,
    by: Literal["mean", "sum"] | Callable[[Completion], float] = "mean",
    **options: Any,
) -> list[list[Completion]]:
    """n samples of each prompt, with the other arguments of `sample`: one list per prompt, the best first.

    by: what is best: the log-probability under the model itself per token ("mean") or as a whole ("sum"), or the
    largest number that a function of the completion gives, such as a reward (a tensor of one number will do). The
    earlier sample goes first on ties. A prompt goes through the forward once before it fans out to n rows.

    Example:
        >>> import torch
        >>> fair = lambda ids: torch.tensor([0.7, 0.2, 0.1]).log().expand(*ids.shape, 3)
        >>> [samples] = best_of(fair, [[0]], n=20, max_new_tokens=2, seed=0)
        >>> samples[0].tokens, round(sum(samples[0].logprobs), 3)
        ((0, 0), -0.713)
    """
    if not callable(by) and by not in ("mean", "sum"):
        raise ValueError(f"by is {by!r}; it must be 'mean', 'sum', or a function of a Completion")
    options = {"logprobs": True, **options}
    if not callable(by) and not plain(options["logprobs"]):
        raise ValueError(
            f"by is {by!r}, and logprobs={options['logprobs']}; leave that away, or rank by a function of your own"
        )
    completions = generate(forward_func, input_ids, n=n, **options)
    values = [plain(_value(completion, by)) for completion in completions]
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"by gave {value!r} for sample {row % n} of row {row // n}; a number is needed")
    ranked = sorted(range(len(completions)), key=lambda row: (row // n, -values[row]))
    return [[completions[row] for row in ranked[start : start + n]] for start in range(0, len(ranked), n)]


def _value(completion: Completion, by: str | Callable[[Completion], float]) -> float:
    if callable(by):
        return by(completion)
    assert completion.logprobs is not None
    total = math.fsum(completion.logprobs)
    return total / len(completion.logprobs) if by == "mean" else total
