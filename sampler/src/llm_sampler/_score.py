"""How likely a model finds given continuations, and choosing between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ._boundary import Boundary, encode_choices
from ._forward import Forward, ForwardFunc, rows_of
from ._likelihood import Request, log_likelihoods
from ._settings import plain

By: TypeAlias = Literal["sum", "mean", "per_character", "per_byte", "pmi"]
Context: TypeAlias = Iterable[int] | Tensor | str
Continuations: TypeAlias = Iterable[Iterable[int]] | Iterable[Tensor] | Tensor | Iterable[str]


@dataclass(frozen=True, slots=True)
class Score:
    """Natural log-probabilities of a continuation's tokens, the end token included where one was asked for.

    is_greedy: greedy sampling would write it. text: what was encoded, where it was given as text. baseline: its
    log-probability after the baseline, where one was given.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool
    text: str | None = None
    baseline: float | None = None

    @property
    def sum(self) -> float:
        return float(sum(self.logprobs))

    @property
    def mean(self) -> float:
        return self.sum / len(self.logprobs)

    @property
    def per_character(self) -> float:
        """The sum divided by the characters of the text; one leading space is scored, but not counted."""
        return self.sum / self._size(self._counted())

    @property
    def per_byte(self) -> float:
        """The sum divided by the UTF-8 bytes of the text; one leading space is scored, but not counted."""
        return self.sum / self._size(self._counted().encode())

    @property
    def pmi(self) -> float:
        """Pointwise mutual information: how much likelier it is after the context than after the baseline.

        -inf for what is impossible after the context, whatever the baseline; ValueError for what is impossible after
        the baseline alone, since no number says how much likelier it has become.
        """
        if self.baseline is None:
            raise ValueError("pmi compares with a baseline; give one, such as baseline=[begin-of-text id]")
        if self.sum == -torch.inf:
            return -torch.inf
        if self.baseline == -torch.inf:
            raise ValueError(
                "pmi is not defined: this is possible after the context, and has probability 0 after the baseline; "
                "take another baseline, or compare by something else"
            )
        return self.sum - self.baseline

    def _counted(self) -> str:
        if self.text is None:
            raise ValueError("characters and bytes are those of text; give continuations as text, and encode=")
        return self.text.removeprefix(" ")

    def _size(self, text: str | bytes) -> int:
        if not text:
            raise ValueError(f"the continuation {self.text!r} has nothing to count but its leading space")
        return len(text)


@dataclass(frozen=True, slots=True)
class Choice:
    """index: the best choice; scores: all of them; probabilities: softmax over what they were compared by."""

    index: int
    scores: tuple[Score, ...]
    probabilities: tuple[float, ...]


def score(
    forward_func: ForwardFunc,
    context: Context | Iterable[Context],
    continuations: Continuations | Iterable[Continuations],
    *,
    encode: Callable[[str], Any] | None = None,
    boundary: Boundary = "error",
    begin_ids: Sequence[int] = (),
    end_id: int | None = None,
    baseline: Sequence[int] | str | None = None,
    batch_size: int = 32,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Any:  # list[Score], or list[list[Score]] for several contexts
    """How likely a model finds each of `continuations` after `context`: one `Score` for each.

    With several contexts, and a sequence of continuations for each of them, a list of such lists. All are computed in
    one go: a row for each sequence that no other one starts with, so that choices of one token share a single row.

    Args:
        forward_func: ids [B, T] -> logits [B, T, V]; of its methods `gather_logprobs(ids, lengths, targets)` is used
            where it has one, else `last_logits(ids, lengths, n)`.
        context, continuations: token ids; or text, with `encode`.
        encode: text -> ids (or something that has `.ids`), as for `encode_choices`, which explains
            boundary ("error", "separate" or "backoff") and begin_ids too: they say where a continuation begins.
        end_id: a token that is scored behind each continuation. Without one, a choice that another one starts with
            always has the larger sum.
        baseline: the context for `Score.pmi`: ids such as [begin-of-text id], or text such as "Answer:".
        batch_size: rows per forward at most. pad_id: fills shorter rows. device: where ids are handed to forward_func.

    Raises:
        ValueError, TypeError: where an argument is wrong, or forward_func returns something other than logits, with
            question, continuation and what to do. What forward_func raises itself comes through as it is.

    Example:
        >>> import torch
        >>> evenly = lambda ids: torch.zeros(*ids.shape, 4)
        >>> [round(result.sum, 4) for result in score(evenly, [0], [[1], [2, 3]])]
        [-1.3863, -2.7726]
        >>> yes_or_no = [[1], [2]]
        >>> [len(scores) for scores in score(evenly, [[0], [3, 0]], [yes_or_no, yes_or_no])]
        [2, 2]
    """
    forward, end_id = Forward(forward_func), plain(end_id)
    context, continuations = _held(context, "context"), _held(continuations, "continuations")
    one = _is_one(context)
    contexts: list[Any] = [context] if one else list(context)
    choices: list[Any] = [continuations] if one else list(continuations)
    if len(contexts) != len(choices):
        raise ValueError(
            f"there are {len(contexts)} contexts and {len(choices)} sequences of continuations; give one for each context"
        )
    if end_id is not None and (type(end_id) is not int or end_id < 0):
        raise ValueError(f"end_id is {end_id!r}; it must be a token id >= 0")
    if len(begin_ids) and encode is None:
        raise ValueError("begin_ids go before text; with ids, put them at the start of each context")
    if baseline is not None:
        baseline = _baseline(baseline, encode, begin_ids)
    requests: list[Request] = []
    texts: list[list[str | None]] = []  # of each continuation, for each question
    for question, (own_context, own_choices) in enumerate(zip(contexts, choices, strict=True)):
        where = "" if one else f"question {question}: "
        own_choices = _held(own_choices, f"{where}continuations")
        ids, targets = own_context, own_choices
        texts.append([None] * len(own_choices))
        if isinstance(own_context, str):
            if isinstance(own_choices, str):
                raise ValueError(f"{where}continuations is one text; give a sequence of them, as in [{own_choices!r}]")
            texts[-1] = list(own_choices)
            try:
                ids, targets = encode_choices(
                    _needed(encode), own_context, own_choices, boundary=boundary, begin_ids=begin_ids
                )
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
        head = _one_row(ids, f"{where}context")
        end = () if end_id is None else (end_id,)
        for row, target in enumerate(_targets(targets, where)):
            name, tail = f"{where}continuations: row {row}", (*target, *end)
            requests.append(Request(head + tail, len(tail), name))
            if baseline is not None:
                requests.append(Request(baseline + tail, len(tail), f"{name}, after the baseline"))

    own_device = contexts[0].device if contexts and isinstance(contexts[0], Tensor) else "cpu"
    found = iter(
        log_likelihoods(
            forward, requests, batch_size=batch_size, pad_id=pad_id, device=torch.device(device or own_device)
        )
    )
    scores: list[list[Score]] = []
    for own_texts in texts:
        scores.append([])
        for text in own_texts:
            logprobs, is_greedy = next(found)
            unconditional = float(sum(next(found)[0])) if baseline is not None else None
            scores[-1].append(Score(logprobs, is_greedy, text, unconditional))
    return scores[0] if one else scores


def multiple_choice(
    forward_func: ForwardFunc,
    context: Context | Iterable[Context],
    choices: Continuations | Iterable[Continuations],
    *,
    by: By = "sum",
    **options: Any,
) -> Any:  # Choice, or list[Choice] for several contexts
    """Which of `choices` a model finds most likely after `context`; the first of equals. With several contexts, a list.

    by: what of `Score` is compared: "sum" (the probability of the whole choice), "mean" (per token), "per_character" or
    "per_byte" (choices as text), or "pmi" (with a baseline). A choice of probability 0 is never the best. ValueError
    where all are, and where one has no PMI (see `Score.pmi`). Other arguments and errors as in `score`.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 2., 1.], [0., 0., 0.], [0., 0., 0.]])
        >>> multiple_choice(lambda ids: after[ids], [0], [[2], [1]]).index
        1
    """
    if by not in get_args(By):
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(get_args(By))}")
    if by == "pmi" and options.get("baseline") is None:
        raise ValueError("by='pmi' compares with a baseline; give one, such as baseline=[begin-of-text id]")
    if by in ("per_character", "per_byte") and options.get("encode") is None:
        raise ValueError(f"by={by!r} counts what text has; give context and choices as text, and encode=")
    context = _held(context, "context")
    one = _is_one(context)
    questions = score(forward_func, context, choices, **options)
    answers = [
        _choice(scores, by, "" if one else f"question {question}: ")
        for question, scores in enumerate([questions] if one else questions)
    ]
    return answers[0] if one else answers


def _choice(scores: list[Score], by: By, where: str) -> Choice:
    compared = []
    for row, result in enumerate(scores):
        try:
            compared.append(getattr(result, by))
        except ValueError as error:
            raise ValueError(f"{where}choices: row {row}: {error}") from None
    values = torch.tensor(compared, dtype=torch.float64)
    if bool((values == -torch.inf).all()):
        raise ValueError(f"{where}every choice has probability 0; check that the choices' ids belong to this model")
    return Choice(int(values.argmax()), tuple(scores), tuple(values.softmax(0).tolist()))


def _held(values: Any, name: str) -> Any:
    """What comes one by one, as a list."""
    if hasattr(values, "__getitem__"):
        return values
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} has to be token ids or text, or a sequence of these; it is {values!r}") from None


def _is_one(context: Any) -> bool:
    if hasattr(context, "ndim") and context.dtype != object:  # a tensor, or numpy's array of numbers
        return context.ndim < 2
    return isinstance(context, str) or len(context) == 0 or isinstance(context[0], Integral)


def _targets(targets: Any, where: str) -> list[tuple[int, ...]]:
    name = f"{where}continuations"
    if isinstance(targets, str) or any(isinstance(target, str) for target in targets):
        raise TypeError(f"{name} are text, and the context is ids; give both as text and encode=, or both as ids")
    if len(targets) and isinstance(targets[0], Integral):
        raise ValueError(f"{name} is one flat sequence of ids; give a sequence of them, as in [[1, 2]]")
    return [tuple(row.tolist()) for row in rows_of(targets, name)[0]]


def _baseline(baseline: Any, encode: Callable[[str], Any] | None, begin_ids: Sequence[int]) -> tuple[int, ...]:
    if isinstance(baseline, str):
        baseline, _ = encode_choices(_needed(encode), baseline, [], begin_ids=begin_ids)
    return _one_row(baseline, "baseline")


def _one_row(ids: Any, name: str) -> tuple[int, ...]:
    if isinstance(ids, Sequence) and not ids:
        raise ValueError(f"{name} is empty; it needs at least one token, such as the model's begin-of-text token")
    rows, _ = rows_of(ids, name)
    if len(rows) != 1:
        raise ValueError(f"{name} holds {len(rows)} rows; one is needed")
    return tuple(rows[0].tolist())


def _needed(encode: Callable[[str], Any] | None) -> Callable[[str], Any]:
    if encode is None:
        raise ValueError("context is text; give encode=, such as tokenizer.encode, or token ids")
    return encode
