"""The sampler takes numpy's arrays and scalars, which it does not depend on, as it takes lists and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from llm_sampler import Draft, PromptLookup, best_of, choices, generate, perplexity, sample, score

np: Any = numpy  # whose arrays the sampler's annotations do not name
AFTER = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))


def causal(ids: Tensor) -> Tensor:
    return AFTER[ids]


def test_numpys_arrays_and_scalars_are_taken_as_lists_and_numbers_are() -> None:
    options: dict = {
        "temperature": [0.5, 1.5],
        "top_k": 5,
        "stop_ids": [[1, 2], [3]],
        "logit_bias": {3: 2.0, (1, 5): -4.0},
        "bad_words_ids": [[4], [1, 2]],
        "seed": [3, 4],
        "max_new_tokens": [4, 6],
        "vocab_size": 10,
    }
    arrays: dict = {
        "temperature": np.array([0.5, 1.5], dtype=np.float32),
        "top_k": np.int64(5),
        "stop_ids": [np.array([1, 2]), np.array([3])],
        "logit_bias": {np.int64(3): np.float32(2), (np.int64(1), 5): -4.0},
        "bad_words_ids": [np.array([4]), np.array([1, 2])],
        "seed": np.array([3, 4]),
        "max_new_tokens": np.array([4, 6]),
        "vocab_size": np.int32(10),
    }
    want = generate(causal, [[1, 2], [3, 4]], **options)
    for ids in (np.array([[1, 2], [3, 4]]), [np.array([1, 2]), np.array([3, 4])], [[np.int64(1), 2], [3, np.int8(4)]]):
        assert generate(causal, ids, **arrays) == want
    ragged = np.empty(2, dtype=object)
    ragged[:] = [[1, 2], [3]]
    assert generate(causal, ragged, max_new_tokens=2, seed=1) == generate(
        causal, [[1, 2], [3]], max_new_tokens=2, seed=1
    )
    even = generate(causal, [[1, 2], [3, 4]], max_new_tokens=2, seed=1)
    assert generate(causal, np.array([[1, 2], [3, 4]], dtype=object), max_new_tokens=2, seed=1) == even
    flat = generate(causal, [1, 2], max_new_tokens=2, seed=1)
    whole = np.array([1, 2], dtype=object)
    for ids in (np.array([1, 2]), [np.int64(1), np.int64(2)], np.array([1, 2], dtype=np.int16), whole, [whole]):
        assert generate(causal, ids, max_new_tokens=2, seed=1) == flat
    with pytest.raises(ValueError, match="row 0 holds torch.float64 values"):
        generate(causal, np.array([[1.0]]), max_new_tokens=1)


def test_drafts_were_drawn_from_numpys_arrays() -> None:
    def drafter(make: Any) -> Any:
        return lambda ids, limits: [Draft([1], probabilities=[make([0.1] * 10)]) for _ in ids]

    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 0, "speculation": "rejection"}
    want = generate(causal, [[1], [2]], drafter=drafter(torch.tensor), **options)
    assert generate(causal, [[1], [2]], drafter=drafter(np.array), **options) == want


def test_numpys_arrays_are_scored_as_lists_are() -> None:
    want = score(causal, [1, 2], [[3, 4], [2, 0]], end_id=0)
    end: Any = np.int64(0)
    assert score(causal, np.array([1, 2]), np.array([[3, 4], [2, 0]]), end_id=end) == want
    assert score(causal, [np.int64(1), np.int64(2)], [[np.int64(3), 4], [2, 0]], end_id=0) == want
    [both] = score(causal, np.array([[1, 2]]), [np.array([[3, 4], [2, 0]])], end_id=0)
    assert both == want


def ragged(*rows: list[int]) -> Any:
    array = np.empty(len(rows), dtype=object)
    array[:] = [np.array(row) for row in rows]
    return array


def test_arrays_that_hold_arrays_are_taken_wherever_sequences_of_sequences_are() -> None:
    lists, arrays = [[1], [2, 3]], ragged([1], [2, 3])
    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 2}
    for name in ("stop_ids", "bad_words_ids", "allowed_token_ids"):
        want = generate(causal, lists, **options, **{name: lists})
        assert generate(causal, arrays, **options, **{name: arrays}) == want
    want = generate(causal, lists, **options, processors=choices(lists))
    assert generate(causal, lists, **options, processors=choices(arrays)) == want
    several = score(causal, lists, [lists, lists])
    assert score(causal, arrays, [arrays, arrays]) == several
    assert score(causal, np.array([2, 3], dtype=object), arrays) == several[1]


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_cannot_take_as_they_are_are_taken_too(tmp_path: Path) -> None:
    rows = np.array([[1, 2, 3], [3, 4, 5]])
    np.save(tmp_path / "ids.npy", rows)
    readonly = rows.copy()
    readonly.flags.writeable = False
    want = generate(causal, [[1, 2, 3], [3, 4, 5]], max_new_tokens=2, seed=1)
    for ids in (
        np.load(tmp_path / "ids.npy", mmap_mode="r"),
        readonly,
        np.array([[3, 2, 1], [5, 4, 3]])[:, ::-1],
        rows.astype(">i4"),
        rows.astype(np.uint16),
    ):
        assert generate(causal, ids, max_new_tokens=2, seed=1) == want
        assert generate(causal, list(ids), max_new_tokens=2, seed=1) == want
        assert score(causal, ids[0], ids[1:]) == score(causal, [1, 2, 3], [[3, 4, 5]])


def test_an_array_of_text_is_refused_as_text_is() -> None:
    for ids, name in (
        (np.array(["a", "b"]), "input_ids is not a sequence of integers"),
        ([np.array(["a", "b"])], "input_ids: row 0 is not a sequence of integers"),
    ):
        with pytest.raises(ValueError, match=name):
            generate(causal, ids, max_new_tokens=1)


def test_whole_numbers_of_numpys_are_taken_where_there_is_one_for_all() -> None:
    size: Any = np.int64(2)
    assert score(causal, [1], [[2], [3]], batch_size=size) == score(causal, [1], [[2], [3]])
    text = [1, 2, 3, 4, 5]
    want = perplexity(causal, text, max_length=2, stride=2)
    assert perplexity(causal, text, max_length=size, stride=size, batch_size=size) == want
    assert perplexity(causal, text, max_length=size) == perplexity(causal, text, max_length=2)
    assert type(PromptLookup(size, min_match=size, branches=size).tokens) is int


def test_numpys_numbers_rank_samples_as_pythons_do() -> None:
    options: dict = {"n": 6, "max_new_tokens": 4, "seed": 0}
    ranked = best_of(causal, [[1]], by=lambda row: np.float32(sum(row.tokens)), **options)
    assert ranked == best_of(causal, [[1]], by=lambda row: sum(row.tokens), **options)


def test_numpys_false_leaves_log_probabilities_out_as_pythons_does() -> None:
    no: Any = np.bool_(False)
    options: dict = {"max_new_tokens": 3, "seed": 0}
    yes: Any = np.bool_(True)
    assert generate(causal, [[1]], logprobs=no, **options) == generate(causal, [[1]], logprobs=False, **options)
    assert generate(causal, [[1]], logprobs=yes, **options) == generate(causal, [[1]], logprobs=True, **options)
    with pytest.raises(ValueError, match="top_logprobs are asked for, and logprobs=False"):
        generate(causal, [[1]], logprobs=no, top_logprobs=2, **options)
    with pytest.raises(ValueError, match="by is 'mean', and logprobs=False"):
        best_of(causal, [[1]], n=2, logprobs=no, **options)


def test_logits_that_are_numpys_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"returned ndarray, .* wrap it as `lambda ids: torch.as_tensor\(model\("):
        next(sample(lambda ids: causal(ids).numpy(), [[1]], max_new_tokens=1))  # type: ignore[arg-type,return-value]
