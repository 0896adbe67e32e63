"""The stages that turn raw logits into the distribution that is drawn from: their settings, neutral values and order.

A stage is built for the rows in the forward from one value per row of each of its settings, and maps `Scores` to
`Scores`. Adding one takes a function, a line in `STAGES` and a place in the orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import _penalties as penalties
from . import _truncate as truncate
from ._processors import processors
from ._row import History
from ._scores import Scores
from ._settings import Setting, biases, ids, number, words

Apply = Callable[[Scores, History], Scores]


@dataclass(frozen=True, slots=True)
class Stage:
    """build(*values per row of each setting, device=) -> Apply. It works where its first setting is not neutral."""

    build: Callable[..., Apply]
    settings: dict[str, Setting]


def chain(order: Sequence[str], settings: dict[str, list], rows: Sequence[int], device: torch.device) -> list[Apply]:
    """The stages that do anything to any of `rows`, in order."""
    applies = []
    for name in order:
        if works(name, settings, rows):
            values = ([settings[setting][row] for row in rows] for setting in STAGES[name].settings)
            applies.append(STAGES[name].build(*values, device=device))
    return applies


def works(name: str, settings: dict[str, list], rows: Sequence[int]) -> bool:
    """Whether a stage does anything to any of `rows`."""
    switch, setting = next(iter(STAGES[name].settings.items()))
    return switch in settings and any(settings[switch][row] != setting.neutral for row in rows)


def settings_of(count: int, given: dict[str, object]) -> dict[str, list]:
    """One checked value per row for each setting of a stage."""
    return {
        name: setting.per_row(name, given.get(name), count)
        for stage in STAGES.values()
        for name, setting in stage.settings.items()
    }


def order_of(order: str | Sequence[str] | None, settings: dict[str, list]) -> tuple[str, ...]:
    """The names of the stages in order; every setting that does something must be among them."""
    if order is None or isinstance(order, str):
        if (order or "huggingface") not in _ORDERS:
            raise ValueError(f"order is {order!r}; known by name are {', '.join(map(repr, _ORDERS))}")
        return _ORDERS[order or "huggingface"]
    names = tuple(order)
    for name in names:
        if name not in STAGES:
            raise ValueError(f"order names {name!r}; the stages are {', '.join(STAGES)}")
        if names.count(name) > 1:
            raise ValueError(f"order names {name!r} more than once")
    for name in STAGES:
        if name not in names and works(name, settings, range(len(next(iter(settings.values()))))):
            raise ValueError(f"{name} is set, but order does not name it; add it to order or leave it away")
    return names


_POSITIVE = number(1.0, lambda v: 0 < v < math.inf, "> 0")
_FINITE = number(0.0, math.isfinite, "a finite number")
_SHARE = number(1.0, lambda v: 0 < v <= 1, "in (0, 1]")
_CUTOFF = number(0.0, lambda v: 0 <= v < 1, "in [0, 1)")
_NOT_NEGATIVE = number(0.0, lambda v: 0 <= v < math.inf, ">= 0")


def _whole(neutral: int, least: int, says: str = "") -> Setting:
    return number(neutral, lambda v: v >= least, f"an integer >= {least}{says}", int)


STAGES: dict[str, Stage] = {
    "logit_bias": Stage(penalties.logit_bias, {"logit_bias": biases()}),
    "repetition_penalty": Stage(penalties.repetition_penalty, {"repetition_penalty": _POSITIVE}),
    "presence_penalty": Stage(penalties.presence_penalty, {"presence_penalty": _FINITE}),
    "frequency_penalty": Stage(penalties.frequency_penalty, {"frequency_penalty": _FINITE}),
    "dry": Stage(
        penalties.dry,
        {
            "dry_multiplier": _NOT_NEGATIVE,
            "dry_base": number(1.75, lambda v: 1 <= v < math.inf, ">= 1"),
            "dry_allowed_length": _whole(2, 1),
            "dry_sequence_breakers": ids(),
            "dry_penalty_last_n": _whole(truncate.NO_LIMIT, 1, ", or None for no limit"),
        },
    ),
    "no_repeat_ngram_size": Stage(penalties.no_repeat_ngram_size, {"no_repeat_ngram_size": _whole(0, 0)}),
    "bad_words_ids": Stage(penalties.bad_words_ids, {"bad_words_ids": words()}),
    "min_new_tokens": Stage(penalties.min_new_tokens, {"min_new_tokens": _whole(0, 0)}),
    "allowed_token_ids": Stage(penalties.allowed_token_ids, {"allowed_token_ids": ids(None, empty=False)}),
    "processors": Stage(processors, {"processors": Setting((), lambda value: False, lambda name, value: value)}),
    "temperature": Stage(
        truncate.temperature,
        {"temperature": number(1.0, lambda v: 0 <= v < math.inf, ">= 0 (0 takes the most likely token)")},
    ),
    "top_n_sigma": Stage(truncate.top_n_sigma, {"top_n_sigma": number(math.inf, lambda v: v >= 0, ">= 0")}),
    "top_k": Stage(truncate.top_k, {"top_k": _whole(truncate.NO_LIMIT, 1, ", or None for no limit")}),
    "top_p": Stage(truncate.top_p, {"top_p": _SHARE}),
    "min_p": Stage(truncate.min_p, {"min_p": number(0.0, lambda v: 0 <= v <= 1, "in [0, 1]")}),
    "typical_p": Stage(truncate.typical_p, {"typical_p": _SHARE}),
    "epsilon_cutoff": Stage(truncate.epsilon_cutoff, {"epsilon_cutoff": _CUTOFF}),
    "eta_cutoff": Stage(truncate.eta_cutoff, {"eta_cutoff": _CUTOFF}),
    "xtc": Stage(
        truncate.xtc,
        {
            "xtc_probability": number(0.0, lambda v: 0 <= v <= 1, "in [0, 1]"),
            "xtc_threshold": number(0.1, lambda v: 0 < v <= 1, "in (0, 1]"),
        },
    ),
    "mirostat": Stage(
        truncate.mirostat,
        {
            "mirostat_tau": number(None, lambda v: 0 < v < math.inf, "> 0 (bits of surprise), or None"),
            "mirostat_eta": number(0.1, lambda v: 0 < v <= 1, "in (0, 1]"),
        },
    ),
}

HUGGING_FACE_ORDER = tuple(STAGES)
LLAMA_CPP_ORDER = (
    *("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "min_new_tokens", "allowed_token_ids", "processors", "dry", "top_n_sigma", "top_k", "typical_p"),
    *("top_p", "min_p", "epsilon_cutoff", "eta_cutoff", "xtc", "temperature", "mirostat"),
)
_ORDERS = {"huggingface": HUGGING_FACE_ORDER, "llama.cpp": LLAMA_CPP_ORDER}
