"""What cannot be sampled is refused: arguments at the call, logits with their row and step, each with what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import Draft, DraftModel, beam_search, sample

NAN = math.nan


def flat_logits(ids):
    return torch.zeros(*ids.shape, 8)


@pytest.mark.parametrize(
    ("input_ids", "options", "message"),
    [
        ([], {}, "at least one row"),
        ([[1], []], {}, "row 1 is empty"),
        ([[1], [2, -5]], {}, "row 1 holds the id -5 at position 1"),
        ([[1.5]], {}, "row 0 holds torch.float32"),
        ([[True]], {}, "row 0 holds torch.bool"),
        ([[[1]]], {}, "row 0 is not a flat"),
        ([["a"]], {}, "row 0 is not a sequence of integers"),
        (["text"], {}, "row 0 is text; encode it"),
        ("text", {}, "encode the text"),
        (torch.zeros(1, 1, 1), {}, "shape [1, 1, 1]"),
        (torch.zeros(0, 4).long(), {}, "at least one row"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"temperature": NAN}, "temperature is nan"),
        ([[1], [1]], {"temperature": [1, "hot"]}, "temperature: row 1 is 'hot'"),
        ([[1], [1]], {"top_p": [0.5]}, "top_p has 1 values for 2 rows"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
        ([[1]], {"top_k": 0}, "top_k is 0; it must be an integer >= 1, or None"),
        ([[1]], {"top_k": 2.5}, "top_k is 2.5"),
        ([[1]], {"min_p": 1.5}, "min_p is 1.5"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0"),
        ([[1]], {"stop_ids": [-1]}, "stop_ids holds -1"),
        ([[1]], {"stop_ids": "</s>"}, "stop_ids is '</s>'"),
        ([[1]], {"stop_ids": [[1], [2]]}, "stop_ids has 2 values for 1 rows"),
        ([[1]], {"seed": -1}, "seed: row 0 has -1"),
        ([[1], [1]], {"seed": [1, None]}, "seed: row 1 has None"),
        ([[1]], {"order": "vllm"}, "order is 'vllm'"),
        ([[1]], {"order": ["warmth"]}, "order names 'warmth'"),
        ([[1]], {"order": ["top_k", "top_k"]}, "more than once"),
        ([[1]], {"order": ["top_k"], "top_p": 0.5}, "top_p is set, but order does not name it"),
        ([[1]], {"vocab_size": 0}, "vocab_size is 0"),
        ([[2], [1, 3, 7]], {"vocab_size": 5}, "row 1 holds the id 7 at position 2, and the vocabulary has 5"),
        ([[1]], {"pad_id": -1}, "pad_id is -1"),
        ([[1]], {"typical_p": 0}, "typical_p is 0; it must be in (0, 1]"),
        ([[1]], {"epsilon_cutoff": 1}, "epsilon_cutoff is 1; it must be in [0, 1)"),
        ([[1]], {"eta_cutoff": -0.1}, "eta_cutoff is -0.1"),
        ([[1]], {"top_n_sigma": -1}, "top_n_sigma is -1"),
        ([[1]], {"xtc_probability": 2}, "xtc_probability is 2"),
        ([[1]], {"xtc_threshold": 0}, "xtc_threshold is 0"),
        ([[1]], {"mirostat_tau": 0}, "mirostat_tau is 0; it must be > 0 (bits"),
        ([[1]], {"mirostat_eta": 0}, "mirostat_eta is 0"),
        ([[1]], {"dry_multiplier": -1}, "dry_multiplier is -1"),
        ([[1]], {"dry_base": 0.5}, "dry_base is 0.5"),
        ([[1]], {"dry_allowed_length": 0}, "dry_allowed_length is 0"),
        ([[1]], {"dry_penalty_last_n": 0}, "dry_penalty_last_n is 0; it must be an integer >= 1, or None"),
        ([[1]], {"dry_sequence_breakers": ["x"]}, "dry_sequence_breakers holds 'x'"),
        ([[1]], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ([[1]], {"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size is 2.0"),
        ([[1]], {"logit_bias": [(1, 2)]}, "logit_bias: row 0 is (1, 2); it must be a mapping"),
        ([[1]], {"logit_bias": {"1": 2}}, "logit_bias holds '1'; an id is"),
        ([[1]], {"logit_bias": {(): 2}}, "logit_bias names an empty tuple"),
        ([[1]], {"logit_bias": {1: math.inf}}, "logit_bias adds inf to 1"),
        ([[1]], {"logit_bias": {1: NAN}}, "logit_bias adds nan to 1"),
        ([[1]], {"bad_words_ids": [1, 2]}, "bad_words_ids is [1, 2]; it must be sequences of ids"),
        ([[1]], {"bad_words_ids": [[]]}, "none of them empty"),
        ([[1], [1]], {"bad_words_ids": [[[1]], [[-1]]]}, "bad_words_ids: row 1 holds -1"),
        ([[1]], {"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ([[1], [1]], {"allowed_token_ids": [[1], []]}, "allowed_token_ids: row 1 is empty"),
        ([[1], [1]], {"min_new_tokens": [1, 4]}, "row 1: min_new_tokens is 4, and max_new_tokens 3"),
        ([[1]], {"stop_strings": ["a"]}, "stop_strings are looked for in text; give decode"),
        ([[1]], {"stop_strings": [""], "decode": str}, "stop_strings holds ''"),
        ([[1]], {"stop_strings": 7, "decode": str}, "stop_strings is 7"),
        ([[1]], {"decode": "utf-8"}, "decode must turn token ids into text"),
        ([[1]], {"top_logprobs": -1}, "top_logprobs is -1"),
        ([[1]], {"logprobs": 3}, "logprobs is 3; it must be True or False, and top_logprobs a number"),
        ([[1]], {"logprobs": False, "top_logprobs": 3}, "top_logprobs are asked for, and logprobs=False"),
        ([[1]], {"order": ["temperature"], "logit_bias": {1: 1.0}}, "logit_bias is set, but order does not name it"),
        ([[1]], {"order": ["temperature"], "xtc_probability": 1}, "xtc is set, but order"),
        ([[1]], {"stop_ids": 9, "vocab_size": 5}, "stop_ids: row 0 holds the id 9, and the vocabulary has 5"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(input_ids: Any, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 3, **options}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        sample(flat_logits, input_ids, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_ids": [[], [8]]},
        {"allowed_token_ids": [None, [1, 8]]},
        {"logit_bias": [None, {(1, 8): 1.0}]},
        {"bad_words_ids": [[], [[8, 1]]]},
        {"dry_multiplier": 1.0, "dry_sequence_breakers": [[], [8]]},
    ],
    ids=str,
)
def test_ids_that_are_not_in_the_vocabulary_are_refused_before_a_token_is_drawn(options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"{name}: row 1 holds the id 8, and the vocabulary has 8"):
        next(sample(flat_logits, [[1], [1]], max_new_tokens=2, **options))


def test_a_forward_that_cannot_be_called_is_refused_at_the_call() -> None:
    with pytest.raises(TypeError, match="must be callable"):
        sample("model", [[1]], max_new_tokens=3)  # type: ignore[arg-type]


def bad(row: int, value: float, every: bool = False, dtype: torch.dtype = torch.float32) -> object:
    def forward(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 8, dtype=dtype)
        if ids.shape[1] == 3:
            logits[row, :, slice(None) if every else 4] = value
        return logits

    return forward


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (bad(1, NAN), "row 1, step 1: the logits contain nan"),
        (bad(0, math.inf), "row 0, step 1: the logits contain inf"),
        (bad(1, -math.inf, every=True), "row 1, step 1: all logits are -inf"),
        (bad(0, 1e300, dtype=torch.float64), "row 0, step 1: the logits contain inf; .* finite in float32"),
        (bad(1, -1e300, every=True, dtype=torch.float64), "row 1, step 1: all logits are -inf"),
        (lambda ids: torch.zeros(ids.shape[0], 8), r"step 0: forward_func returned torch.float32 \[2, 8\]"),
        (lambda ids: torch.zeros(ids.shape[0], 1, 8), r"logits \[2, 2, vocabulary\] are needed"),
        (lambda ids: torch.zeros(*ids.shape, 8).long(), "floating-point"),
        (lambda ids: {"logits": 1}, "lambda ids: model"),
        (lambda ids: torch.zeros(*ids.shape, 8, device="meta"), "step 0: forward_func returned logits on meta;"),
        (
            lambda ids: torch.zeros(*ids.shape, 8, device="meta" if ids.shape[1] == 3 else "cpu"),
            "step 1: forward_func returned logits on meta, and on cpu before; they must hold values",
        ),
        (lambda ids: torch.zeros(*ids.shape, 6 + ids.shape[1]), "step 1: .* 9 logits per position, and 8 before"),
        (lambda ids: torch.zeros(*ids.shape, 2), "row 1 holds the id 2 at position 0, and the vocabulary has 2"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 0, "logprobs": True},
        {"top_k": 3, "top_p": 0.5, "logprobs": True},
        {"typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_n_sigma": 1.0, "min_p": 0.1},
        {"xtc_probability": 1.0, "mirostat_tau": 3.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {1: 1.0}, "allowed_token_ids": range(2), "order": "llama.cpp", "top_logprobs": 3},
    ],
    ids=str,
)
def test_logits_that_cannot_be_sampled_name_row_and_step(forward, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        list(sample(forward, [[1, 1], [2, 2]], max_new_tokens=3, **options))


def test_no_token_left_within_vocab_size_names_row_and_step() -> None:
    def forward(ids):
        return torch.tensor([-math.inf, -math.inf, 0.0]).expand(*ids.shape, 3)

    for temperature in (1, 0):
        with pytest.raises(ValueError, match="row 0, step 0: no token is left"):
            list(sample(forward, [[0]], max_new_tokens=1, vocab_size=2, temperature=temperature))


class Claiming:
    """A forward function over 8 ids that says how many there are."""

    def __init__(self, vocab_size: Any):
        self.vocab_size = vocab_size
        self.calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return flat_logits(ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_ids_beyond_what_a_forward_says_it_knows_are_refused_before_it_runs(options: dict[str, Any]) -> None:
    forward = Claiming(8)
    call = beam_search if options else sample
    with pytest.raises(ValueError, match="input_ids: row 1 holds the id 8 at position 1, and the vocabulary has 8"):
        call(forward, [[1], [2, 8]], max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="stop_ids: row 0 holds the id 9, and the vocabulary has 8"):
        call(forward, [[1]], max_new_tokens=2, stop_ids=9, **options)
    assert forward.calls == 0


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (9, "step 0: forward_func returned 8 logits per position, and its vocab_size is 9"),
        ("8", "forward_func.vocab_size is '8'; it must be an integer >= 1"),
        (0, "forward_func.vocab_size is 0"),
    ],
)
def test_a_vocab_size_that_cannot_be_true_is_refused(claim: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        next(sample(Claiming(claim), [[1]], max_new_tokens=1))
    assert next(sample(Claiming(7), [[1]], max_new_tokens=1)).rows == (0,)  # a padded head


def test_an_index_error_of_the_forward_names_row_position_and_id() -> None:
    table = torch.zeros(5, 5)
    told = (
        "step 0: forward_func raised IndexError: .* The largest id that it was given is 7, of row 2 at position 1; if "
    )
    with pytest.raises(IndexError, match=told) as raised:
        next(sample(lambda ids: table[ids], [[1], [1], [2, 7, 1]], max_new_tokens=1))
    assert isinstance(raised.value.__cause__, IndexError)
    steps = sample(lambda ids: torch.zeros(*ids.shape, 9).index_fill(-1, table.argmax(-1)[ids[0]] + 8, 9.0), [[1]],
                   max_new_tokens=2, temperature=0)  # fmt: skip
    next(steps)
    with pytest.raises(IndexError, match="step 1: .* given is 8, of row 0 at position 1"):
        next(steps)


class FailingOnTrees:
    def __call__(self, ids: Tensor) -> Tensor:
        return flat_logits(ids)

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        raise OSError("disk gone")


def failing(*_: object) -> Any:
    raise OSError("disk gone")


class FailingToTell:
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores

    def is_complete(self, ids: Sequence[int]) -> bool:
        raise OSError("disk gone")


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"processors": {1: failing}.get}, ["raised by processor function in row 1, step 0"]),
        ({"processors": lambda row: FailingToTell()}, ["raised by is_complete in row 0, step 0"]),
        ({"decode": failing}, ["raised by decode in row 0, step 0"]),
        ({"decode": lambda ids: "x" if len(ids) < 3 else failing()}, ["raised by decode in row 0, step 2"]),
        ({"drafter": failing}, ["raised by drafter in forward 1"]),
        ({"drafter": DraftModel(failing)}, ["raised by forward_func in drafter", "raised by drafter in forward 1"]),
        (
            {"drafter": lambda ids, limits: [Draft([1, 2], parents=[-1, -1])] * len(ids)},
            ["raised by forward_func.tree_logits in forward 1"],
        ),
    ],
)
def test_what_any_function_of_the_callers_raises_comes_through_with_a_note_of_where_that_was(
    options: dict[str, Any], notes: list[str]
) -> None:
    with pytest.raises(OSError, match="disk gone") as raised:
        list(sample(FailingOnTrees(), [[1], [2, 3]], max_new_tokens=4, seed=0, **options))
    assert vars(raised.value)["__notes__"] == notes
