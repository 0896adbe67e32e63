"""Each stage keeps exactly what its definition says, by whichever path it gets there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import HUGGING_FACE_ORDER, LLAMA_CPP_ORDER
from llm_sampler._repeats import Repeats
from llm_sampler._row import History, Row, Table
from llm_sampler._scores import Scores
from llm_sampler._stages import STAGES
from llm_sampler._truncate import _first_sorted, _smallest_set

CPU = torch.device("cpu")
INF = math.inf


def history_of(*rows: tuple[list[int], list[int]], stops: Sequence[int] = ()) -> History:
    """Rows that were given some ids and have generated others."""
    made = [
        Row(index, prompt, len(prompt), end=99, shortest=0, key=index, stops=frozenset(stops))
        for index, (prompt, _) in enumerate(rows)
    ]
    table = Table(made, pad_id=0, device=CPU)
    for row, (_, generated) in zip(made, rows, strict=True):
        for token in generated:
            row.take(token, 0.0)
            table.append([row])
    return History(table, made, CPU)


def apply(name: str, logits: Tensor, *values: list, history: History | None = None) -> Tensor:
    """The logits over the whole vocabulary after one stage, given one value per row of each of its settings."""
    before = logits.clone()
    settings = list(STAGES[name].settings.values())
    full = [*values, *([setting.neutral] * len(logits) for setting in settings[len(values) :])]
    stage = STAGES[name].build(*full, device=CPU)
    out = stage(Scores(logits, None, logits.shape[-1]), history or history_of(*[([0], [])] * len(logits)))
    assert out.ids is None or bool((out.ids.diff(dim=-1) >= 0).all()), "candidates stay in the order of their ids"
    assert torch.equal(logits, before), "what was handed in is left alone"
    return out.widened().values


def kept(name: str, logits: list[float], value: float) -> list[int]:
    return apply(name, torch.tensor([logits]), [value])[0].isfinite().nonzero().flatten().tolist()


def naive(name: str, row: Tensor, value: float) -> set[int]:
    """The definition, in python, over one row."""
    weights = {i: math.exp(float(x) - float(row.max())) for i, x in enumerate(row) if x > -INF}
    ranked = sorted(weights, key=lambda i: (-float(row[i]), i))
    if name == "top_k":
        limit = float(row[ranked[min(int(value), len(ranked)) - 1]])
        return {i for i in ranked if float(row[i]) >= limit}
    if name == "min_p":
        return {i for i in ranked if value == 0 or float(row[i]) >= float(row.max() + torch.tensor(math.log(value)))}
    out, mass, total = set(), 0.0, sum(weights.values())
    for i in ranked:
        if mass >= value * total and value < 1:
            break
        out.add(i)
        mass += weights[i]
    return out


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert kept("top_k", [1.0, 3.0, 2.0, 2.0, 2.0], 2) == [1, 2, 3, 4]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert kept("top_k", [1.0, 3.0, 2.0], 99) == [0, 1, 2]


def test_top_p_keeps_the_smallest_set_and_the_lower_id_of_equals() -> None:
    assert kept("top_p", [0.0, 0.0, 0.0, 0.0], 0.5) == [0, 1]
    assert kept("top_p", [0.0, 0.0, 0.0, 0.0], 0.51) == [0, 1, 2]
    assert kept("top_p", [0.0, 5.0, 0.0], 1e-9) == [1]


def test_min_p_of_one_keeps_only_the_most_likely() -> None:
    assert kept("min_p", [0.0, 2.0, 2.0, 1.0], 1.0) == [1, 2]


def test_temperature_zero_keeps_the_lower_id_of_equals() -> None:
    assert kept("temperature", [0.0, 2.0, 2.0, 1.0], 0) == [1]
    large = torch.zeros(1, 50_001)
    large[0, [777, 778, 40_000, 50_000]] = 1
    assert apply("temperature", large, [0])[0].isfinite().nonzero().flatten().tolist() == [777]


def test_temperature_zero_beside_another_row_leaves_that_row_alone() -> None:
    out = apply("temperature", torch.tensor([[1.0, 2.0], [1.0, 2.0]]), [0, 2.0])
    assert out[0].isfinite().tolist() == [False, True]
    assert out[1].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("tiny", [1e-7, 1e-30, 1e-39, 5e-324])
def test_a_tiny_temperature_keeps_the_most_likely_tokens_whatever_the_logits(tiny: float) -> None:
    for logits in ([1.0, 2.0, 2.0, -INF], [3e38, -3e38, 3e38, 1e38], [-1e9, -3.0, -3.0, -4.0]):
        out = apply("temperature", torch.tensor([logits, [1.0, 2.0, 3.0, 4.0]]), [tiny, 2.0])
        assert not bool(out.isnan().any())
        assert (out[0].softmax(-1) > 1e-6).tolist() == [value == max(logits) for value in logits]
        assert out[1].tolist() == [0.5, 1.0, 1.5, 2.0]


def test_repetition_penalty_counts_each_token_once_and_padding_never() -> None:
    history = history_of(([1], [1, 2]), ([1], []))
    logits = torch.tensor([[4.0, 4.0, -4.0, 4.0]] * 2)
    out = apply("repetition_penalty", logits, [2.0, 2.0], history=history)
    assert out.tolist() == [[4, 2, -8, 4], [4, 2, -4, 4]]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    history = history_of(([3], [1, 1, 2]), ([1], [1]), ([2], []))
    logits = torch.zeros(3, 4)
    out = apply("presence_penalty", logits, [0.5] * 3, history=history)
    assert out.tolist() == [[0, -0.5, -0.5, 0], [0, -0.5, 0, 0], [0] * 4]
    out = apply("frequency_penalty", logits, [0.5] * 3, history=history)
    assert out.tolist() == [[0, -1, -0.5, 0], [0, -0.5, 0, 0], [0] * 4]


def test_penalties_after_a_narrowing_stage_bring_nothing_back() -> None:
    history = history_of(([0], [1]))
    narrow = STAGES["top_k"].build([1], device=CPU)(Scores(torch.tensor([[1.0, 2.0, 0.0]]), None, 3), history)
    out = STAGES["frequency_penalty"].build([0.5], device=CPU)(narrow, history)
    assert out.values.tolist() == [[-INF, 1.5, -INF]]


def test_bias_is_added_to_an_id_or_to_the_last_of_several() -> None:
    history = history_of(([1, 2], []), ([2], []))
    bias = {(0,): 1.5, (2, 3): -1.0, (1, 2, 0): 2.0, (1, 1): 9.0, (3,): -INF}
    out = apply("logit_bias", torch.zeros(2, 4), [bias, bias], history=history)
    assert out.tolist() == [[3.5, 0, 0, -INF], [1.5, 0, 0, -INF]]


def test_bad_words_may_not_be_completed() -> None:
    history = history_of(([1, 2], []), ([2], []))
    out = apply("bad_words_ids", torch.zeros(2, 4), [((0,), (1, 2, 3)), ((1, 2, 3), (2, 2))], history=history)
    assert out.tolist() == [[-INF, 0, 0, -INF], [0, 0, -INF, 0]]


def test_allowed_ids_exclude_all_others_in_rows_that_name_them() -> None:
    out = apply("allowed_token_ids", torch.arange(5.0).expand(3, 5), [frozenset([1, 3]), None, frozenset([0])])
    assert out.tolist() == [[-INF, 1, -INF, 3, -INF], [0, 1, 2, 3, 4], [0, -INF, -INF, -INF, -INF]]


def test_stop_ids_are_excluded_until_the_minimum_is_reached() -> None:
    history = history_of(([1], []), ([1], [2]), stops=[0, 3])
    out = apply("min_new_tokens", torch.zeros(2, 4), [1, 1], history=history)
    assert out.tolist() == [[-INF, 0, 0, -INF], [0, 0, 0, 0]]


def test_no_ngram_occurs_twice_prompt_included() -> None:
    history = history_of(([1, 2, 3, 1], [2]), ([1, 2, 3, 3], []), ([1, 2], []))
    logits = torch.zeros(3, 4)
    assert apply("no_repeat_ngram_size", logits, [3, 2, 1], history=history).tolist() == [
        [0, 0, 0, -INF],
        [0, 0, 0, -INF],
        [0, -INF, -INF, 0],
    ]


def test_top_n_sigma_counts_no_masked_token() -> None:
    assert kept("top_n_sigma", [0.0, 1.0, 2.0, 3.0, -INF], 1.0) == [2, 3]  # the deviation is 1.118
    assert kept("top_n_sigma", [0.0, 1.0, 2.0, 3.0, -INF], 0.0) == [3]


def test_top_n_sigma_leaves_a_row_without_it_alone_where_only_one_token_is_left() -> None:
    out = apply("top_n_sigma", torch.tensor([[-INF, 1.0], [0.0, 1.0]]), [INF, 0.5])
    assert out.tolist() == [[-INF, 1.0], [-INF, 1.0]]


def test_typical_prefers_what_is_as_surprising_as_expected() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().tolist()  # entropy 1.75 bits: 2 bits are the nearest
    assert kept("typical_p", logits, 0.2) == [1]
    assert kept("typical_p", logits, 0.6) == [0, 1]
    assert kept("typical_p", logits, 0.76) == [0, 1, 2]  # the lower id of equals


def test_epsilon_and_eta_keep_the_most_likely_whatever_the_threshold() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert kept("epsilon_cutoff", logits, 0.2) == [0, 1]
    assert kept("epsilon_cutoff", logits, 0.9) == [0]
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.15, 0.05))  # 1.14
    assert min(0.1, math.sqrt(0.1) * math.exp(-entropy)) == 0.1
    assert kept("eta_cutoff", logits, 0.1) == [0, 1, 2]
    assert 0.15 < min(0.8, math.sqrt(0.8) * math.exp(-entropy)) < 0.3
    assert kept("eta_cutoff", logits, 0.8) == [0, 1]


def test_xtc_happens_with_its_probability_and_leaves_the_least_likely_choice() -> None:
    size = 4000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(size, -1)
    out = apply("xtc", logits, [0.3] * size, [0.15] * size, history=history_of(*[([0], [])] * size))
    kinds = {(False, False, True, True), (True, True, True, True)}
    assert {tuple(row) for row in out.isfinite().tolist()} == kinds
    assert float((out[:, 0] == -INF).float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / size))


def test_xtc_needs_two_choices_and_takes_the_higher_id_of_equals() -> None:
    logits = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]]).log()
    out = apply("xtc", logits, [1.0, 1.0], [0.2, 0.2]).isfinite()
    assert out.tolist() == [[True] * 4, [False, False, True, True]]


def test_mirostat_keeps_what_surprises_by_at_most_mu_and_moves_it_by_what_was_drawn() -> None:
    row = Row(0, [1], 1, end=9, shortest=0, key=0, stops=frozenset(), mirostat_tau=0.75, mirostat_eta=0.5)
    history = History(Table([row], 0, CPU), [row], CPU)
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()  # 1, 2, 3 and 3 bits
    assert row.mu == 1.5
    assert apply("mirostat", logits, [0.75], [0.5], history=history).isfinite().tolist() == [
        [True, False, False, False]
    ]
    row.take(0, -3 * math.log(2))
    assert row.mu == pytest.approx(1.5 - 0.5 * (3 - 0.75))
    assert apply("mirostat", logits, [0.75], [0.5], history=history).isfinite().tolist() == [
        [True, False, False, False]
    ]
    row.mu = 2.5
    assert apply("mirostat", logits, [0.75], [0.5], history=history).isfinite().tolist() == [[True, True, False, False]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40), st.sets(st.integers(0, 3), max_size=2))
def test_repeats_are_those_of_the_definition_given_at_once_or_token_by_token(
    ids: list[int], start: int, breakers: set[int]
) -> None:
    start = min(start, len(ids))
    followed = Repeats(ids[:start], breakers)
    for token in ids[start:]:
        followed.push(token)
    expected = []
    for place in range(1, len(ids)):
        length = 0
        while length < place and ids[place - 1 - length] == ids[-1 - length] and ids[-1 - length] not in breakers:
            length += 1
        if length:
            expected.append((place, length))
    assert sorted(followed) == sorted(Repeats(ids, breakers)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 45))
def test_dry_penalises_by_the_longest_repeat_that_a_token_extends(ids: list[int], allowed: int, last_n: int) -> None:
    window = ids[-last_n:]
    out = apply(
        "dry", torch.zeros(1, 6), [2.0], [1.5], [allowed], [frozenset([5])], [last_n], history=history_of((ids, []))
    )
    for token in range(6):
        longest = 0
        for place in range(1, len(window)):
            length = 0
            while length < place and window[place - 1 - length] == window[-1 - length] != 5:
                length += 1
            if window[place] == token != 5:
                longest = max(longest, length)
        expected = -2.0 * 1.5 ** (longest - allowed) if longest >= allowed else 0.0
        assert float(out[0, token]) == pytest.approx(expected)


def test_dry_does_not_overflow() -> None:
    out = apply(
        "dry", torch.zeros(1, 2), [1.0], [4.0], [1], [frozenset()], [9999], history=history_of(([0] * 2000, []))
    )
    assert -INF < float(out[0, 0]) < -1e30
    assert float(out[0, 1]) == 0


def test_orders_name_every_stage_once() -> None:
    assert sorted(HUGGING_FACE_ORDER) == sorted(LLAMA_CPP_ORDER) == sorted(STAGES)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """1 to 3 rows of up to 300 logits; few distinct values, so that ties are common, and some masked."""
    size = draw(st.integers(1, 300))
    count = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 1 << 30))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=g) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    if draw(st.booleans()):
        x = (x * 2).round() / 2
    x = x.masked_fill(torch.rand(count, size, generator=g) < draw(st.sampled_from([0.0, 0.5])), -INF)
    x[:, int(torch.randint(size, (1,), generator=g))] = 1.0
    return x


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from(["top_k", "top_p", "min_p"]), st.data())
def test_survivors_are_those_of_the_definition(logits: Tensor, name: str, data: st.DataObject) -> None:
    domain = {
        "top_k": st.integers(1, 320),
        "top_p": st.floats(1e-6, 1 - 1e-9) | st.just(1.0),
        "min_p": st.floats(0.0, 1.0),
    }[name]
    values = [data.draw(domain) for _ in logits]
    out = apply(name, logits, values).isfinite()
    for row, value, result in zip(logits, values, out, strict=True):
        found = set(result.nonzero().flatten().tolist())
        assert found == naive(name, row, value)
        assert found, "at least one survives"
        assert int(row.argmax()) in found, "and the most likely one is among them"


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0.5, 3.0, 12.0]), st.booleans(), st.integers(9000, 9200))
@example(0, 12.0, True, 9000)
def test_block_paths_equal_plain_paths_on_a_large_vocabulary(seed: int, scale: float, ties: bool, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size, generator=g) * scale
    logits = logits.round() if ties else logits
    for name, values in (("top_k", [3, 20]), ("top_p", [0.3, 0.9]), ("min_p", [0.05, 0.9])):
        out = apply(name, logits, values)
        for row, value, result in zip(logits, values, out, strict=True):
            assert set(result.isfinite().nonzero().flatten().tolist()) == naive(name, row, value)
            survivors = result.isfinite()
            assert torch.equal(result[survivors], row[survivors])


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("masked", [0.0, 0.9])
def test_the_smallest_set_is_the_same_counted_into_bins_as_sorted(scale: float, ties: bool, masked: float) -> None:
    g = torch.Generator().manual_seed(3)
    order = torch.randn(2, 6000, generator=g) * scale
    order = (order * 8).round() / 8 if ties else order
    order = order.masked_fill(torch.rand(2, 6000, generator=g) < masked, -INF)
    weights = order.double().softmax(-1)
    for share in (1e-9, 0.2, 0.9, 0.9999999, INF):
        needed = torch.tensor([[share], [0.5]], dtype=torch.float64)
        assert torch.equal(_smallest_set(order, weights, needed), _first_sorted(order, weights, needed))


@pytest.mark.parametrize("size", [20_000, 20_001])
def test_narrowing_what_was_narrowed_keeps_the_right_ids(size: int) -> None:
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(1))
    logits[:, -1] = 9.0
    history = history_of(([0], []), ([0], []))
    scores = Scores(logits, None, size)
    for k in (5001, 70, 3):
        scores = STAGES["top_k"].build([k, k], device=CPU)(scores, history)
    assert scores.ids is not None
    assert scores.ids.tolist() == logits.topk(3).indices.sort(-1).values.tolist()


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "temperature"])
def test_one_neutral_row_beside_a_limited_one_keeps_everything(name: str) -> None:
    logits = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0))
    limited = {"top_k": 5, "top_p": 0.5, "min_p": 0.5, "temperature": 0.0}[name]
    out = apply(name, logits, [limited, STAGES[name].settings[name].neutral])
    assert torch.equal(out[1], logits[1])
    assert torch.equal(out[:1], apply(name, logits[:1], [limited]))
