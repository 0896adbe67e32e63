"""Speculation: drafts change what it costs, never the tokens ("exact"), and never their distribution ("rejection")."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Draft, DraftModel, DraftTree, PromptLookup, generate, sample, stream_text

VOCABULARY = 11
TABLE = torch.randn(101, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2


def causal(ids: Tensor) -> Tensor:
    """Logits that depend on all ids up to a position, exactly (integers), and on nothing after it."""
    return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 101]


def similar(ids: Tensor) -> Tensor:
    """A draft model: mostly of the same opinion."""
    return causal(ids) + torch.cos(causal(ids) * 3) / 2


class Strict:
    """A forward side with all methods, which holds the caller to their contract."""

    def __init__(self, longest: int = 1 << 30) -> None:
        self.longest = longest
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        raise AssertionError("last_logits is there to be used")

    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        ends = lengths.tolist()
        self.calls.append((len(ids), n))
        assert ids.dtype == torch.long
        assert 1 <= n <= min(ends)
        assert ids.shape[1] == max(ends) <= self.longest
        return torch.stack([row[end - n : end] for row, end in zip(causal(ids), ends, strict=True)])

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        self.calls.append((len(ids), parents.shape[1]))
        rows = []
        for row, own in zip(ids, parents.tolist(), strict=True):
            first = own[0] + 1
            assert first + len(own) <= len(row)
            logits = []
            for node in range(len(own)):
                path, at = [], first + node
                while at >= first:
                    path.append(at)
                    assert own[at - first] < at
                    at = own[at - first]
                assert at == first - 1  # all of it leads back to the row, whose first node is its last token
                logits.append(causal(row[[*range(first), *reversed(path)]].unsqueeze(0))[0, -1])
            rows.append(torch.stack(logits))
        return torch.stack(rows)


class Counting:
    """A processor with state: it must be called once for each token, with the row's own ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert not self.ids or ids[0, :-1].tolist() == self.ids
        self.ids = ids[0].tolist()
        return scores + 0.5 * (torch.arange(VOCABULARY) % 2 == len(self.ids) % 2)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 5, "repetition_penalty": 1.3},
    {"top_p": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"no_repeat_ngram_size": 3, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"min_new_tokens": 2, "min_p": 0.05, "logit_bias": {(1, 5): -4.0, 9: 1.0}},
]
DRAFTERS: list[Callable[[], Any]] = [
    lambda: PromptLookup(4, min_match=1),
    lambda: PromptLookup(5, min_match=1, branches=3),
    lambda: DraftModel(similar, tokens=3),
    lambda: DraftTree(similar, widths=(3, 2, 1)),
    lambda: lambda ids, limits: [[row[-1]] * 9 for row in ids],
    lambda: lambda ids, limits: [[] for _ in ids],
    lambda: lambda ids, limits: [[(7 * len(row) + i) % VOCABULARY for i in range(len(row) % 6)] for row in ids],
    lambda: lambda ids, limits: [Draft(range_of(VOCABULARY), [-1] * VOCABULARY) for _ in ids],
    lambda: lambda ids, limits: [Draft([1, 2, 3, 4, 5], [-1, 0, 0, 2, -1]) if len(row) % 2 else [3] for row in ids],
]


def range_of(count: int) -> list[int]:
    return list(range(count))


rows_of_ids = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=4)


class Case:
    """Rows with settings of their own, of which any can be sampled together."""

    def __init__(self, rows: list[list[int]], data: st.DataObject) -> None:
        self.rows = rows
        chosen = [data.draw(st.sampled_from(SETTINGS)) for _ in rows]
        self.each: dict[str, list] = {name: [c.get(name) for c in chosen] for name in {n for c in chosen for n in c}}
        self.each["max_new_tokens"] = [data.draw(st.integers(2, 12)) for _ in rows]
        self.each["stop_ids"] = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2)) for _ in rows]
        self.each["seed"] = [data.draw(st.integers(0, 3)) for _ in rows]
        self.processors = [data.draw(st.sampled_from([None, Counting])) for _ in rows]

    def of(self, indices: Sequence[int], forward: Any = causal, **options: Any) -> list:
        options |= {name: [values[i] for i in indices] for name, values in self.each.items()}
        made = [self.processors[i] for i in indices]
        prompts = [self.rows[i] for i in indices]
        return generate(forward, prompts, processors=lambda row: made[row] and made[row](), top_logprobs=2, **options)


@settings(max_examples=60, deadline=None)
@given(rows_of_ids, st.data())
def test_exact_speculation_gives_the_tokens_of_plain_sampling_whatever_is_drafted(
    rows: list[list[int]], data: st.DataObject
) -> None:
    case = Case(rows, data)
    every = range(len(rows))
    longest = max(len(row) + most for row, most in zip(rows, case.each["max_new_tokens"], strict=True))
    plain = case.of(every)
    for drafter in [data.draw(st.sampled_from(DRAFTERS)) for _ in range(2)]:
        drafted = case.of(every, Strict(longest + 40), drafter=drafter())
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]
        assert [row.finished for row in drafted] == [row.finished for row in plain]
        for got, want in zip(drafted, plain, strict=True):
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
            assert got.processed_logprobs == pytest.approx(want.processed_logprobs, abs=1e-5)
            assert [[i for i, _ in top] for top in got.top_logprobs] == [
                [i for i, _ in top] for top in want.top_logprobs
            ]


@settings(max_examples=30, deadline=None)
@given(rows_of_ids, st.data())
def test_by_rejection_too_a_batch_equals_its_rows_alone_in_any_order(
    rows: list[list[int]], data: st.DataObject
) -> None:
    case = Case(rows, data)
    drafter = data.draw(st.sampled_from(DRAFTERS))
    options: dict[str, Any] = {"speculation": "rejection"}
    alone = [case.of([i], Strict(), drafter=drafter(), **options)[0] for i in range(len(rows))]
    order = data.draw(st.permutations(range(len(rows))))
    together = case.of(order, Strict(), drafter=drafter(), **options)
    assert [row.tokens for row in together] == [alone[i].tokens for i in order]
    assert [row.finished for row in together] == [alone[i].finished for i in order]


@pytest.mark.parametrize("drafter", range(len(DRAFTERS)))
def test_greedy_text_is_the_same_in_every_mode(drafter: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0, "repetition_penalty": 1.2}
    plain = generate(causal, [[1], [2, 3]], **options)
    for speculation in ("exact", "rejection"):
        drafted = generate(Strict(), [[1], [2, 3]], drafter=DRAFTERS[drafter](), speculation=speculation, **options)
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]


def test_the_simple_form_serves_chains() -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 1}
    plain = generate(causal, [[1], [2, 3, 4]], **options)
    for drafter in (PromptLookup(4, min_match=1), DraftModel(similar), lambda ids, limits: [[1], [2] * 5][: len(ids)]):
        assert generate(causal, [[1], [2, 3, 4]], drafter=drafter, **options) == plain


def chi_square_p(counts: list[int], probabilities: list[float]) -> float:
    """The probability of a deviation at least this large if `probabilities` are true."""
    total = sum(counts)
    statistic = sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True))
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


class Chain:
    """A model of four tokens, each followed by its own distribution; a form of it with all methods."""

    def __init__(self, table: list[list[float]]) -> None:
        self.probabilities = torch.tensor(table, dtype=torch.float64)
        self.logits = self.probabilities.log().float()

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits[ids]

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        places = parents[:, :1] + 1 + torch.arange(parents.shape[1])
        return self.logits[ids.gather(-1, places)]


P = Chain([[0.4, 0.3, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.0, 0.2, 0.7], [0.5, 0.2, 0.2, 0.1]])
Q = Chain([[0.2, 0.3, 0.0, 0.5], [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.0, 0.6, 0.2, 0.2]])
ROWS = 10_000


def drawn_from_q(
    ids: list[list[int]], limits: list[int], *, said: Callable[[Tensor], Tensor] = lambda q: q
) -> list[Draft]:
    """Two siblings from Q, and one token after the first; `said` is what is claimed of where they are from."""
    first = Q.probabilities[[row[-1] for row in ids]]
    siblings = first.multinomial(2, replacement=True, generator=GENERATOR)
    second = Q.probabilities[siblings[:, 0]]
    after = second.multinomial(1, generator=GENERATOR)
    return [
        Draft([a, b, c], [-1, -1, 0], [said(q), said(q), said(r)])
        for (a, b), (c,), q, r in zip(siblings.tolist(), after.tolist(), first, second, strict=True)
    ]


GENERATOR = torch.Generator()


def deviation(drafter: Any, speculation: str = "rejection", temperature: float = 1.0) -> float:
    """How likely a fair deviation of the joint counts of three tokens is at least as large as what comes of `drafter`."""
    GENERATOR.manual_seed(0)
    power = P.probabilities ** (1 / temperature)
    exact = power / power.sum(-1, keepdim=True)
    joint = {
        abc: float(exact[0, abc[0]] * exact[abc[0], abc[1]] * exact[abc[1], abc[2]])
        for abc in itertools.product(range(4), repeat=3)
    }
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": temperature, "seed": 11, "speculation": speculation}
    seen = Counter(row.tokens[:3] for row in generate(P, [[0]] * ROWS, drafter=drafter, **options))
    possible = [abc for abc, p in joint.items() if p > 0]
    if not set(seen) <= set(possible):
        return 0.0
    return chi_square_p([seen[abc] for abc in possible], [joint[abc] for abc in possible])


@pytest.mark.parametrize(
    ("drafter", "temperature"),
    [
        (DraftModel(Q, tokens=3), 1.0),
        (DraftModel(Q, tokens=2), 1.6),
        (DraftTree(Q, widths=(3, 2)), 1.0),
        (drawn_from_q, 1.0),
        (lambda ids, limits: [[0, 3, 1]] * len(ids), 1.0),
        (lambda ids, limits: [Draft([2, 0, 3, 1], [-1, -1, 0, 1])] * len(ids), 1.0),
    ],
    ids=["model", "warm model", "tree", "custom", "certain chain", "certain tree"],
)
def test_sequences_by_rejection_have_their_exact_joint_probability(drafter: Any, temperature: float) -> None:
    """P and Q differ in what they exclude; three tokens span two forwards, some drafted and some not."""
    assert deviation(drafter, temperature=temperature) > 1e-3 / 6


def test_the_chi_square_test_notices_drafts_that_are_said_to_be_from_elsewhere() -> None:
    """2 % of the mass moved in what is claimed: the test above can fail."""

    def moved(q: Tensor) -> Tensor:
        q = q.clone()
        q[1] += 0.05
        return q / q.sum()

    assert deviation(lambda ids, limits: drawn_from_q(ids, limits, said=moved)) < 1e-3


def test_a_draft_model_is_accepted_as_often_as_the_distributions_overlap() -> None:
    """sum of min(p, q), the rate of Leviathan et al.: any loss of acceptance would pass all other tests."""
    steps = sample(P, [[0]] * ROWS, max_new_tokens=3, seed=3, drafter=DraftModel(Q, tokens=1), speculation="rejection")
    list(steps)
    overlap = torch.minimum(P.probabilities, Q.probabilities).sum(-1)
    expected = float(P.probabilities[0] @ overlap)
    rate = steps.stats.accepted / steps.stats.drafted
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(0.25 / steps.stats.drafted))


@pytest.mark.parametrize("options", SETTINGS)
def test_a_model_that_drafts_for_itself_is_always_right(options: dict[str, Any]) -> None:
    """Stages see the drafted rows as they see the rows; mirostat's own state moves with what is accepted alone."""
    tokens = 1 if "mirostat_tau" in options else 4
    drafter = DraftModel(causal, tokens)
    steps = sample(causal, [[1], [2, 3]], max_new_tokens=16, seed=0, drafter=drafter, **options)
    assert sum(len(step.rows) for step in steps) == 32
    assert steps.stats.drafted == steps.stats.accepted > 0
    assert steps.stats.forwards == 1 + math.ceil(15 / (tokens + 1))


def test_by_rejection_the_processed_logprobs_are_those_of_the_model_after_its_stages() -> None:
    rows = generate(
        P, [[0]] * 200, max_new_tokens=3, seed=1, temperature=1.5, drafter=DraftTree(Q, (2, 1)), speculation="rejection"
    )
    warm = (P.logits / 1.5).log_softmax(-1)
    for row in rows:
        path = list(itertools.pairwise((0, *row.tokens)))
        assert row.processed_logprobs == pytest.approx([float(warm[a, b]) for a, b in path], abs=1e-5)
        assert row.logprobs == pytest.approx([float(P.logits[a, b]) for a, b in path], abs=1e-5)


def test_an_oracle_is_accepted_whole_and_the_statistics_say_so() -> None:
    prompts, length = [[1], [2, 3]], 21
    plain = generate(causal, prompts, max_new_tokens=length, seed=4)
    whole = [prompt + list(row.tokens) for prompt, row in zip(prompts, plain, strict=True)]

    def oracle(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        known = [next(text for text in whole if text[: len(row)] == row) for row in ids]
        return [text[len(row) :][: 4 if text == whole[0] else 9] for text, row in zip(known, ids, strict=True)]

    steps = sample(Strict(), prompts, max_new_tokens=length, seed=4, drafter=oracle)
    gained = [step.rows for step in steps]
    stats = steps.stats
    assert [row.forwards for row in stats.rows] == [1 + math.ceil(20 / 5), 1 + math.ceil(20 / 10)]
    assert [row.tokens for row in stats.rows] == [21, 21]
    assert [row.drafted for row in stats.rows] == [4 * 4, 9 * 2]
    assert [row.accepted for row in stats.rows] == [4 * 4, 9 * 2]
    assert (stats.forwards, stats.tokens, stats.drafted, stats.accepted) == (5, 42, 34, 34)
    assert stats.tokens_per_forward == 42 / 8
    assert gained[:11] == [(0, 1)] * 6 + [(1,)] * 5


def test_plain_sampling_counts_its_forwards_too() -> None:
    steps = sample(causal, [[1], [2, 3]], max_new_tokens=[2, 5], seed=0)
    assert steps.stats.forwards == 0
    next(steps)
    assert (steps.stats.forwards, steps.stats.tokens) == (1, 2)
    list(steps)
    assert [row.forwards for row in steps.stats.rows] == [2, 5]
    assert steps.stats.tokens_per_forward == 1


def test_prompt_lookup_takes_the_longest_match_the_latest_of_equals_and_goes_on_round_a_loop() -> None:
    seen: list[list[int]] = []

    def forward(ids: Tensor) -> Tensor:
        seen.extend(ids.tolist())
        return torch.eye(VOCABULARY)[ids] * 0 + torch.arange(VOCABULARY, dtype=torch.float32)

    def drafted(prompt: list[int], **options: Any) -> list[int]:
        seen.clear()
        generate(forward, [prompt], max_new_tokens=9, temperature=0, drafter=PromptLookup(4, **options))
        return seen[1][len(prompt) + 1 :]  # the forward gives 10, whatever comes before

    assert drafted([1, 10, 5, 2, 10, 6, 3, 1]) == [5, 2, 10, 6]
    assert drafted([1, 10, 5, 2, 10, 6, 3, 1], min_match=3) == []
    assert drafted([1, 10, 5, 1, 10, 6, 3, 1]) == [6, 3, 1, 10]
    assert drafted([2, 10, 5, 4, 10, 6, 3], min_match=1) == [6, 3, 10, 6]
    assert drafted([10, 10]) == [10, 10, 10, 10]


def test_no_more_is_drafted_than_the_row_may_still_gain() -> None:
    seen: list[list[int]] = []

    def drafter(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        seen.append(limits)
        return [[0] * 50] * len(ids)

    forward = Strict(longest=7)
    generate(forward, [[1, 2, 3], [4]], max_new_tokens=[5, 3], seed=0, drafter=drafter)
    assert seen[0] == [3, 1]
    assert max(n for _, n in forward.calls) == 4
    model = DraftModel(similar, tokens=9)
    generate(Strict(longest=7), [[1, 2, 3], [4]], max_new_tokens=[5, 3], seed=0, drafter=model)
    lookup = PromptLookup(9, min_match=1)
    generate(Strict(longest=7), [[1, 1, 1], [4]], max_new_tokens=[5, 3], temperature=0, drafter=lookup)


def test_a_prompt_goes_through_the_forward_once_before_it_fans_out() -> None:
    forward = Strict()
    generate(forward, [[1, 2]], n=5, max_new_tokens=3, seed=0, drafter=DraftModel(similar, 1))
    assert forward.calls[:2] == [(1, 1), (5, 2)]


def test_cancelled_rows_and_closed_steps_end_within_a_draft() -> None:
    plain = generate(causal, [[1], [2]], max_new_tokens=9, seed=0)

    def oracle(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        return [list(plain[row[0] - 1].tokens[len(row) - 1 :]) for row in ids]

    forward = Strict()
    steps = sample(forward, [[1], [2]], max_new_tokens=9, seed=0, drafter=oracle)
    for _ in range(4):
        assert next(steps).rows == (0, 1)
    steps.cancel(0)
    assert next(steps).rows == (1,)
    steps.close()
    assert next(steps, None) is None
    assert len(forward.calls) == 2


def test_stop_strings_and_streamed_text_are_those_of_plain_sampling() -> None:
    def decode(ids: list[int]) -> str:
        return "".join("abcdefghijk"[i] for i in ids)

    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 6, "decode": decode, "stop_strings": ["ab", "cd", "gh"]}
    plain = generate(causal, [[1], [2, 3]], **options)
    assert {row.finished for row in plain} == {"stop_string"}
    for drafter in (DraftModel(causal, 7), DraftTree(similar, (2, 2))):
        assert [row.text for row in generate(Strict(), [[1], [2, 3]], drafter=drafter, **options)] == [
            row.text for row in plain
        ]
    steps = sample(Strict(), [[1], [2, 3]], max_new_tokens=20, seed=6, drafter=DraftModel(similar, 7))
    [_, row] = generate(causal, [[1], [2, 3]], max_new_tokens=20, seed=6)
    assert "".join(stream_text(steps, decode, row=1)) == decode(list(row.tokens))


def test_a_padded_head_of_either_model_is_cut_at_vocab_size() -> None:
    def wider(ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(similar(ids), (0, 5), value=30.0)

    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 0, "vocab_size": 10}
    plain = generate(causal, [[1]], **options)
    assert generate(Strict(), [[1]], drafter=DraftModel(wider), **options) == plain
    generate(Strict(), [[1]], drafter=DraftTree(wider, (2, 1)), speculation="rejection", **options)
    with pytest.raises(ValueError, match="its model has a vocabulary of 16, and forward_func one of 11"):
        generate(causal, [[1]], max_new_tokens=3, drafter=DraftModel(wider))


def of(draft: Any) -> Any:
    return lambda ids, limits: [draft] * len(ids)


HALF = torch.tensor([0.5, 0.5] + [0.0] * (VOCABULARY - 2))


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (of([0, 11]), "drafter: row 0, step 1: 11 is drafted, and ids are integers from 0 to 10"),
        (of([-1]), "-1 is drafted"),
        (of([1.0]), "1.0 is drafted"),
        (of(7), "7 is not a sequence of ids"),
        (of(Draft([1, 2], [-1])), r"parents \[-1\] do not name"),
        (of(Draft([1, 2], [1, -1])), r"parents \[1, -1\] do not name"),
        (lambda ids, limits: [[1]] * (len(ids) + 1), "drafter gave 3 for 2 rows"),
        (lambda ids, limits: None, "drafter gave NoneType for 2 rows"),
        (of(Draft([0, 1], None, [HALF])), "1 probabilities for 2 tokens"),
        (of(Draft([0], None, [HALF * 2])), "are not a distribution over 11 ids"),
        (of(Draft([0], None, [HALF[:3]])), r"probabilities \[3\] are not a distribution"),
        (of(Draft([4], None, [HALF])), "4 is drafted, and has no probability"),
    ],
)
def test_bad_drafts_are_named(drafter: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(causal, [[1], [2]], max_new_tokens=5, drafter=drafter, speculation="rejection")


def test_a_tree_needs_tree_logits_and_says_so_before_the_first_forward() -> None:
    for drafter in (DraftTree(similar, (2, 1)), PromptLookup(branches=2)):
        with pytest.raises(ValueError, match="drafter: the drafts branch, and forward_func has no tree_logits"):
            sample(causal, [[1]], max_new_tokens=5, drafter=drafter)
    with pytest.raises(ValueError, match="forward 1: the drafts branch, and forward_func has no tree_logits"):
        generate(causal, [[1]], max_new_tokens=5, drafter=lambda ids, limits: [Draft([1, 2], [-1, -1])])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"drafter": 7}, TypeError, "drafter is 7; it must be PromptLookup"),
        ({"drafter": PromptLookup(), "speculation": "lossy"}, ValueError, "speculation is 'lossy'"),
        ({"speculation": "rejection"}, ValueError, "there is no drafter"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(causal, [[1]], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(0), "tokens is 0"),
        (lambda: PromptLookup(min_match=0), "min_match is 0"),
        (lambda: PromptLookup(branches=1.5), "branches is 1.5"),  # type: ignore[arg-type]
        (lambda: DraftModel(similar, 0), "tokens is 0"),
        (lambda: DraftTree(similar, (2, 0)), "widths is 0"),
        (lambda: DraftTree(similar, ()), "widths is empty"),
    ],
)
def test_bad_drafters_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_where_the_settings_leave_nothing_of_a_draft_model_nothing_is_drafted() -> None:
    def only_zero(ids: Tensor) -> Tensor:
        return causal(ids).masked_fill(torch.arange(VOCABULARY) > 0, -math.inf)

    options: dict[str, Any] = {"max_new_tokens": 5, "seed": 0, "bad_words_ids": [[0]]}
    for speculation in ("exact", "rejection"):
        steps = sample(causal, [[1]], drafter=DraftModel(only_zero), speculation=speculation, **options)
        assert [step.tokens[0] for step in steps] == list(generate(causal, [[1]], **options)[0].tokens)
        assert steps.stats.drafted == 0


def test_what_forward_functions_return_is_checked() -> None:
    class Short(Strict):
        def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
            return torch.zeros(len(ids), 1, VOCABULARY)

    with pytest.raises(ValueError, match=r"forward 1: forward_func.tree_logits returned .*\[1, 1, 11\]"):
        generate(Short(), [[1]], max_new_tokens=5, drafter=DraftTree(similar, (2,)))
    with pytest.raises(ValueError, match="drafter: row 0, step 1: the largest logit of its model is nan"):
        generate(causal, [[1]], max_new_tokens=5, drafter=DraftModel(lambda ids: causal(ids) * math.nan))
    with pytest.raises(ValueError, match="drafter: forward_func returned"):
        generate(causal, [[1]], max_new_tokens=5, drafter=DraftModel(lambda ids: ids))
