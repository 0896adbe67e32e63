"""From the arguments of `sample` to rows and their sampler; everything that can be checked before a forward is."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ._draw import row_key
from ._forward import rows_of
from ._processors import processors_of
from ._row import Row, Table
from ._sampler import Sampler
from ._settings import REQUIRED, ids, number, plain, seeds_of, strings
from ._stages import order_of, settings_of
from ._text import StopText, check_decode

_BUDGET = number(REQUIRED, lambda v: v >= 1, "an integer >= 1", int)
_SAMPLES = number(REQUIRED, lambda v: v >= 1, "an integer >= 1", int)
_TOP = number(0, lambda v: v >= 0, "an integer >= 0", int)


def prepared(given: Mapping[str, Any]) -> tuple[list[Row], Sampler]:
    """The rows and their sampler, from the arguments of `sample` by name. n rows in a row have one prompt."""
    prompts, device = rows_of(given["input_ids"])
    if given["device"] is not None:
        device = torch.device(given["device"])
    count = len(prompts)
    vocab_size, pad_id, decode = plain(given["vocab_size"]), plain(given["pad_id"]), given["decode"]
    if not (type(vocab_size) is int and vocab_size >= 1) and vocab_size is not None:
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be an integer >= 1")
    if type(pad_id) is not int or pad_id < 0:
        raise ValueError(f"pad_id is {pad_id!r}; it must be an id that the model knows, >= 0")
    n = _SAMPLES.parse("n", plain(given["n"]))
    settings = settings_of(count, {**given, "processors": None})
    budgets = _BUDGET.per_row("max_new_tokens", given["max_new_tokens"], count)
    for row, (least, most) in enumerate(zip(settings["min_new_tokens"], budgets, strict=True)):
        if least > most:
            raise ValueError(f"row {row}: min_new_tokens is {least}, and max_new_tokens {most}; it must not be more")
    stop_strings = strings().per_row("stop_strings", given["stop_strings"], count)
    if decode is None and any(stop_strings):
        raise ValueError("stop_strings are looked for in text; give decode too, such as tokenizer.decode")
    if decode is not None:
        check_decode(decode)
    logprobs = plain(given["logprobs"])
    if type(logprobs) is not bool and logprobs is not None:
        raise TypeError(f"logprobs is {logprobs!r}; it must be True or False, and top_logprobs a number")
    if given["top_logprobs"] is not None and logprobs is False:
        raise ValueError("top_logprobs are asked for, and logprobs=False; leave one of them away")
    stops = ids().per_row("stop_ids", given["stop_ids"], count)
    sources = seeds_of(given["seed"], count, n, secrets.randbits)
    tops = None if given["top_logprobs"] is None else _TOP.per_row("top_logprobs", given["top_logprobs"], count)
    settings = {name: _repeated(values, n) for name, values in settings.items()}
    settings["processors"] = processors_of(given["processors"], count * n)
    order = order_of(given["order"], settings)
    rows = [
        Row(
            index,
            prompts[of].tolist(),
            len(prompts[of]),
            end=len(prompts[of]) + budgets[of],
            shortest=settings["min_new_tokens"][index],
            key=row_key(*sources[index]),
            stops=stops[of],
            processors=settings["processors"][index],
            text=None if decode is None else StopText(decode, stop_strings[of]),
            mirostat_tau=settings["mirostat_tau"][index],
            mirostat_eta=settings["mirostat_eta"][index],
        )
        for index, of in enumerate(_repeated(range(count), n))
    ]
    sampler = Sampler(
        Table(rows, pad_id, device),
        settings,
        order,
        vocab_size=vocab_size,
        logprobs=tops is not None if logprobs is None else logprobs,
        top_logprobs=None if tops is None else _repeated(tops, n),
    )
    if vocab_size is not None:
        check_ids(rows, sampler, vocab_size)
    return rows, sampler


def check_ids(rows: Sequence[Row], sampler: Sampler, vocabulary: int) -> None:
    """Raise ValueError where the caller named an id that is not in the vocabulary."""
    vocabulary = min(vocabulary, sampler.vocab_size or vocabulary)
    settings = sampler.settings
    for row in rows:
        groups = {
            "input_ids": row.ids,
            "stop_ids": row.stops,
            "allowed_token_ids": settings["allowed_token_ids"][row.index] or (),
            "dry_sequence_breakers": settings["dry_sequence_breakers"][row.index],
            "logit_bias": (token for key in settings["logit_bias"][row.index] for token in key),
            "bad_words_ids": (token for word in settings["bad_words_ids"][row.index] for token in word),
        }
        for name, group in groups.items():
            largest = max(group, default=0)
            if largest >= vocabulary:
                place = f" at position {row.ids.index(largest)}" if name == "input_ids" else ""
                raise ValueError(
                    f"{name}: row {row.index} holds the id {largest}{place}, and the vocabulary has {vocabulary}; "
                    "does the tokenizer belong to this model?"
                )


def _repeated(values: Iterable[Any], n: int) -> list[Any]:
    return [value for value in values for _ in range(n)]
