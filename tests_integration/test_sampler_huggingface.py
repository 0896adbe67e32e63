"""Hugging Face models behind forward_func: whatever happens to the rows, the logits are the model's own on each alone."""

from __future__ import annotations

import copy
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from torch import Tensor

import llm_sampler
from llm_sampler._huggingface import HuggingFaceForward

V: dict[str, Any] = dict(vocab_size=96)
D: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **V)
L: dict[str, Any] = dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=128, **D)
CONFIGS = {
    "llama": transformers.LlamaConfig(**L),
    "mistral, windowed": transformers.MistralConfig(**L, sliding_window=5),
    "qwen2, windowed from layer 1": transformers.Qwen2Config(
        **L, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**L, head_dim=16),
    "gemma3, windowed and full": transformers.Gemma3TextConfig(
        **{**L, "num_hidden_layers": 6}, head_dim=8, sliding_window=5
    ),
    "mixtral": transformers.MixtralConfig(**L, num_local_experts=4, num_experts_per_tok=2),
    "gpt2, learned positions": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **V),
    "opt, positions from the mask": transformers.OPTConfig(
        ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32, **D
    ),
    "gpt neox": transformers.GPTNeoXConfig(intermediate_size=48, max_position_embeddings=128, **D),
    "gptj": transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, **V),
    "phi": transformers.PhiConfig(intermediate_size=48, max_position_embeddings=128, **D),
    "stablelm": transformers.StableLmConfig(**L),
    "falcon": transformers.FalconConfig(**D, max_position_embeddings=128),
    "bloom, alibi from the mask": transformers.BloomConfig(n_layer=2, n_head=4, hidden_size=32, **V),
    "mpt, alibi": transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=128, **V),
    "deepseek v3, latent attention": transformers.DeepseekV3Config(
        **{**L, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "llama4, chunked and full": transformers.Llama4TextConfig(
        **{**L, "num_hidden_layers": 4}, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    ),
    "gpt neo, windowed from layer 1": transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_position_embeddings=128, window_size=5,
        attention_types=[[["global", "local"], 1]], **V,
    ),
    "bart, positions from the cache": transformers.BartConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=128,
        forced_eos_token_id=None, **V,
    ),
}  # fmt: skip
WITHOUT_CACHE = {
    "gpt, no past_key_values": transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=128, **V),
    "rwkv, recurrent": transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=128, **V),
    "recurrent gemma, recurrent and windowed": transformers.RecurrentGemmaConfig(
        **{**L, "num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=32, attention_window_size=64
    ),
    "roberta, positions from the ids": transformers.RobertaConfig(
        is_decoder=True, intermediate_size=48, max_position_embeddings=130, **D
    ),
}  # fmt: skip
EAGER = ("bloom", "cpmant", "gpt_neo", "gptj", "mpt", "openai-gpt", "rwkv", "xlnet")


def built(config: Any) -> Any:
    return randomised(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=_attention(config)))


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _attention(config: Any) -> str:
    return "eager" if config.model_type in EAGER else "sdpa"


@pytest.fixture(scope="module", params=[*CONFIGS, *WITHOUT_CACHE])
def model(request: pytest.FixtureRequest) -> Any:
    return built({**CONFIGS, **WITHOUT_CACHE}[request.param])


@pytest.fixture
def forward(model: Any) -> HuggingFaceForward:
    return llm_sampler.from_huggingface(model, cache=model.config not in WITHOUT_CACHE.values())


@pytest.fixture(scope="module")
def llama() -> Any:
    return built(CONFIGS["llama"])


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(list(map(len, rows)))


@torch.no_grad()
def check(forward: HuggingFaceForward, rows: list[list[int]], n: int = 1) -> None:
    logits = forward.last_logits(*padded(rows), n)
    for row, own in zip(rows, logits, strict=True):
        alone = forward.model(torch.tensor([row]), use_cache=False).logits[0, len(row) - n :]
        torch.testing.assert_close(own, alone, atol=5e-5, rtol=1e-4)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_rows_that_grow_shrink_change_places_and_fan_out_have_the_models_own_logits(
    forward: HuggingFaceForward,
) -> None:
    a, b, c = ids(11, 1), ids(4, 2), ids(40, 3)
    check(forward, [a])
    check(forward, [[*a, 5], [*a, 6, 7], [*a, 8]], n=2)  # fan out
    check(forward, [[*a, 5, 1], [*a, 6, 7, 2], [*a, 8, 3]])  # grow together
    check(forward, [[*a, 5, 9, 9], [*a, 6, 7, 9, 9], [*a, 8, 9, 9]], n=3)  # a draft, rejected in part
    check(forward, [[*a, 8, 9, 1], a[:6], [*a, 5, 9, 9, 2]])  # change places, shrink
    check(forward, [b, [*a, 5, 9, 9, 2, 3], c])  # new rows beside known ones
    check(forward, [[*c, 1]] * 3, n=1)  # the same row several times
    check(forward, [[*c[:35], 1], [*c[:35], 2], b])  # a shared beginning
    check(forward, [[*c[:35], 1, 4], [*b, 4]])  # a row is dropped
    check(forward, [b[:1]])


def test_batched_greedy_text_equals_generate(model: Any, forward: HuggingFaceForward) -> None:
    if isinstance(model, transformers.RobertaForCausalLM):
        pytest.skip("its generate counts positions from 0, its forward from the place after padding's")
    prompts = [ids(9, 4), ids(3, 5), ids(20, 6)]
    rows = llm_sampler.generate(forward, prompts, max_new_tokens=[12, 20, 5], temperature=0)
    for prompt, row in zip(prompts, rows, strict=True):
        own = torch.tensor([prompt])
        out = model.generate(
            own,
            attention_mask=torch.ones_like(own),
            max_new_tokens=len(row.tokens),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(row.tokens) == out[0, len(prompt) :].tolist()


class Counted:
    """Counts the tokens that a model computes, and remembers how many logits it gave."""

    def __init__(self, model: Any):
        self.tokens = 0
        self.logits = 0
        self.hook = model.register_forward_hook(self.count, with_kwargs=True)

    def count(self, _module: Any, args: tuple, options: dict, output: Any) -> None:
        self.tokens += (args[0] if args else options["input_ids"]).numel()
        self.logits += output.logits.shape[:2].numel()

    def since(self) -> tuple[int, int]:
        out, self.tokens, self.logits = (self.tokens, self.logits), 0, 0
        return out


@pytest.fixture
def counted(llama: Any):
    counter = Counted(llama)
    yield counter
    counter.hook.remove()


def test_a_step_computes_one_token_and_one_position_of_logits_for_each_row(llama: Any, counted: Counted) -> None:
    steps = llm_sampler.sample(
        llm_sampler.from_huggingface(llama), [ids(50, 1), ids(30, 2)], max_new_tokens=[9, 3], seed=0
    )
    next(steps)
    assert counted.since() == (100, 2)  # a rectangle
    for step in steps:
        assert counted.since() == (len(step.rows), len(step.rows))


def test_what_many_rows_begin_with_is_computed_once(llama: Any, counted: Counted) -> None:
    forward = llm_sampler.from_huggingface(llama)
    llm_sampler.generate(forward, [[*ids(100), token] for token in range(8)], max_new_tokens=1, seed=0)
    assert counted.since()[0] == 100 + 8
    llm_sampler.score(forward, ids(90, 3), [[token, 1, 2] for token in range(96)], batch_size=32)
    assert counted.since()[0] == 90 + 96 * 3  # the last of the context again, for its logits


def test_a_rejected_draft_computes_nothing_again(llama: Any, counted: Counted) -> None:
    forward = llm_sampler.from_huggingface(llama)
    prompt = ids(40)
    forward.last_logits(*padded([[*prompt, 1, 2, 3]]), 4)
    counted.since()
    forward.last_logits(*padded([[*prompt, 1, 9, 9, 9]]), 3)
    assert counted.since()[0] == 3


def test_loops_that_take_turns_keep_what_they_have(llama: Any, counted: Counted) -> None:
    forward = llm_sampler.from_huggingface(llama, keep=3)
    loops = [llm_sampler.sample(forward, [ids(40, seed)], max_new_tokens=6, seed=0) for seed in range(3)]
    for loop in loops:
        next(loop)
    counted.since()
    for _ in range(4):
        for loop in loops:
            next(loop)
    assert counted.since()[0] == 3 * 4


def test_what_is_kept_is_bounded(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama, keep=2)
    for seed in range(10):
        forward(torch.tensor([ids(20, seed)]))
    kept = forward._kept
    assert kept is not None
    assert len(kept._blocks) == len(kept._index) == 2
    forward.clear()
    assert not kept._blocks
    assert not kept._index


def test_random_batches_have_the_models_own_logits(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama)
    generator = torch.Generator().manual_seed(0)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    rows = [ids(5)]
    for _ in range(60):
        kept = [rows[below(len(rows))] for _ in range(1 + below(5))]
        rows = [row[: 1 + below(len(row))] if below(3) == 0 else row for row in kept]
        rows = [(row + ids(below(6), below(3)))[:60] for row in rows]
        check(forward, rows, n=1 + below(min(map(len, rows))))


# What can be wrong


TREE = [-1, 0, 0, 1, 3, 3, 2]  # node -> node: two branches, one of which branches again


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "mixtral", "gpt2, learned positions", "gpt neox", "gptj", "phi", "stablelm", "falcon"]
)
@torch.no_grad()
def test_each_node_of_a_tree_has_the_logits_of_its_own_path(name: str) -> None:
    model = built(CONFIGS[name])
    forward = llm_sampler.from_huggingface(model)
    prefixes = [ids(9, 1), ids(20, 2), ids(20, 2)[:15]]
    for grown in ([], [7], [7, 8, 9]):  # nothing known, one more token, several: as after a draft was accepted in part
        prefixes = [[*prefix, *grown] for prefix in prefixes]
        nodes = [ids(len(TREE), seed) for seed in range(3)]
        parents = torch.tensor([[len(prefix) + node for node in TREE] for prefix in prefixes])
        logits = forward.tree_logits(padded([a + b for a, b in zip(prefixes, nodes, strict=True)])[0], parents)
        for prefix, own, table in zip(prefixes, nodes, logits, strict=True):
            for node in range(len(TREE)):
                path, at = [], node
                while at >= 0:
                    path, at = [own[at], *path], TREE[at]
                alone = model(torch.tensor([prefix + path]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(table[node], alone, atol=5e-5, rtol=1e-4)
        check(forward, [[*prefix, own[0]] for prefix, own in zip(prefixes, nodes, strict=True)])


def test_a_tree_computes_its_nodes_and_what_is_new_of_its_row(llama: Any, counted: Counted) -> None:
    forward = llm_sampler.from_huggingface(llama)
    forward(torch.tensor([ids(40)]))
    counted.since()
    parents = torch.tensor([[40 + node for node in TREE]])
    forward.tree_logits(torch.tensor([[*ids(40), 5, *ids(7, 1)]]), parents + 1)
    assert counted.since() == (1 + 7, 7)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_text_with_branching_drafts_is_that_without(llama: Any, temperature: float) -> None:
    prompts = [[*ids(6, 1), *ids(6, 1), *ids(6, 1)[:3]], ids(5, 2)]
    options: dict[str, Any] = dict(max_new_tokens=[100, 60], temperature=temperature, seed=0)
    plain = llm_sampler.generate(llm_sampler.from_huggingface(llama), prompts, **options)
    drafters = [
        llm_sampler.PromptLookup(4, min_match=1, branches=3),
        llm_sampler.DraftTree(llm_sampler.from_huggingface(llama), widths=(2, 2)),
    ]
    for drafter in drafters:
        rows = llm_sampler.generate(llm_sampler.from_huggingface(llama), prompts, drafter=drafter, **options)
        assert [row.tokens for row in rows] == [row.tokens for row in plain]


@pytest.mark.parametrize("name", ["llama", "gpt2, learned positions"])
def test_text_that_ends_within_the_models_window_ends_there_with_drafts_too(name: str) -> None:
    forward = llm_sampler.from_huggingface(built(CONFIGS[name]))
    smaller = llm_sampler.from_huggingface(built(CONFIGS["llama"]), max_length=60)
    prompts = [ids(117, 3), ids(58, 5)]
    unbounded = [row.tokens for row in llm_sampler.generate(forward, prompts, max_new_tokens=12, seed=0)]
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 0, "stop_ids": [[tokens[-1]] for tokens in unbounded]}
    plain = [row.tokens for row in llm_sampler.generate(forward, prompts, **options)]
    for drafter in (
        llm_sampler.PromptLookup(8, min_match=1, branches=4),
        llm_sampler.DraftTree(forward, (4, 3, 2)),
        llm_sampler.DraftModel(smaller, 6),
    ):
        rows = llm_sampler.generate(forward, prompts, drafter=drafter, **options)
        assert [row.tokens for row in rows] == plain


def test_models_that_cannot_see_a_tree_say_so() -> None:
    for name, message in (
        ("bloom, alibi from the mask", "takes no position_ids"),
        ("bart, positions from the cache", "takes no position_ids"),
        ("mistral, windowed", "window of 5"),
        ("llama4, chunked and full", "window of 8"),
        ("gpt neo, windowed from layer 1", "window of 5"),
    ):
        forward = llm_sampler.from_huggingface(built(CONFIGS[name]))
        with pytest.raises(ValueError, match=message):
            forward.tree_logits(torch.tensor([ids(13)]), torch.tensor([[5 + node for node in TREE]]))


def test_a_model_whose_layers_are_no_attention_cannot_see_a_tree_without_a_cache_either() -> None:
    model = built(copy.deepcopy(CONFIGS["llama"]))
    model.config.layer_types = ["full_attention", "linear_attention"]  # as hybrids say it
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of linear_attention, which cannot see drafts"):
        llm_sampler.from_huggingface(model, cache=False).tree_logits(
            torch.tensor([ids(13)]), torch.tensor([[5 + node for node in TREE]])
        )


def test_a_model_that_cannot_see_a_tree_refuses_a_drafter_that_branches_at_the_call() -> None:
    forward = llm_sampler.from_huggingface(built(CONFIGS["bloom, alibi from the mask"]))
    options: dict[str, Any] = {"max_new_tokens": 2, "seed": 0}
    with pytest.raises(ValueError, match="takes no position_ids .* draft without branches"):
        llm_sampler.sample(forward, [ids(5)], drafter=llm_sampler.PromptLookup(branches=2), **options)
    [plain] = llm_sampler.generate(forward, [ids(5)], **options)
    [drafted] = llm_sampler.generate(forward, [ids(5)], drafter=llm_sampler.PromptLookup(), **options)
    assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("name", ["mistral, windowed", "llama4, chunked and full", "gpt neo, windowed from layer 1"])
@torch.no_grad()
def test_a_tree_within_the_window_is_exact(name: str) -> None:
    model = built(CONFIGS[name])
    row = ids(2)
    got = llm_sampler.from_huggingface(model).tree_logits(
        torch.tensor([[*row, 7, 9]]), torch.tensor([[len(row) - 2, len(row) - 1, len(row) - 1]])
    )
    for node, path in enumerate([[], [7], [9]]):
        alone = model(torch.tensor([row + path]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(got[0, node], alone, atol=5e-5, rtol=1e-4)


def test_without_a_cache_the_logits_are_the_same(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama, cache=False)
    check(forward, [ids(9, 1), ids(4, 2)], n=3)
    assert forward._kept is None


def test_a_recurrent_model_is_refused_until_it_is_asked_for_without_cache() -> None:
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=96, state_size=4)
    ).eval()
    with pytest.raises(ValueError, match="MambaForCausalLM keeps a state.*cache=False"):
        llm_sampler.from_huggingface(model)
    row = ids(7)
    logits = llm_sampler.from_huggingface(model, cache=False)(torch.tensor([row]))
    torch.testing.assert_close(logits, model(torch.tensor([row])).logits)


def test_a_model_that_takes_no_keys_and_values_is_refused_until_it_is_asked_for_without_cache() -> None:
    model = built(WITHOUT_CACHE["gpt, no past_key_values"])  # its **kwargs would swallow them
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel takes no past_key_values: give cache=False"):
        llm_sampler.from_huggingface(model)


def test_a_model_that_sees_later_tokens_is_refused_until_it_is_asked_for_without_cache() -> None:
    options: dict[str, Any] = dict(intermediate_size=48, max_position_embeddings=128, **D)
    model = built(transformers.BertConfig(**options))
    with pytest.raises(ValueError, match="BertLMHeadModel sees later tokens too: load it with is_decoder=True, or .*"):
        llm_sampler.from_huggingface(model)
    check(llm_sampler.from_huggingface(model, cache=False), [ids(7), ids(4, 1)])
    decoder = llm_sampler.from_huggingface(built(transformers.BertConfig(is_decoder=True, **options)))
    check(decoder, [ids(7), ids(4, 1)])
    check(decoder, [[*ids(7), 5], [*ids(4, 1), 6]])


def test_a_model_that_counts_positions_from_its_ids_is_refused_until_it_is_asked_for_without_cache() -> None:
    model = built(WITHOUT_CACHE["roberta, positions from the ids"])
    with pytest.raises(ValueError, match="RobertaForCausalLM counts positions from the ids: give cache=False"):
        llm_sampler.from_huggingface(model)
    plain = llm_sampler.from_huggingface(model, cache=False)
    check(plain, [[5, 6, model.config.pad_token_id, 7, 8], [5, 6, 7]])  # an id that takes no position
    with pytest.raises(ValueError, match="takes no position_ids that count from 0"):
        plain.tree_logits(torch.tensor([ids(13)]), torch.tensor([[5 + node for node in TREE]]))


def test_rows_of_each_length_have_a_pass_of_their_own_where_the_model_cannot_be_told_of_padding() -> None:
    model = built(CONFIGS["bart, positions from the cache"])
    counter = Counted(model)
    forward = llm_sampler.from_huggingface(model)
    rows = [ids(30, 1), ids(9, 2), ids(20, 3), ids(9, 4)]
    forward.last_logits(*padded(rows))
    assert counter.since() == (30 + 9 + 20 + 9, 4)
    for token in range(5):  # more lengths than batches are kept, and nothing is computed again
        rows = [[*row, token] for row in rows]
        forward.last_logits(*padded(rows))
        assert counter.since() == (4, 4)
    counter.hook.remove()


@pytest.mark.parametrize("family", ["XLM", "Flaubert"])
def test_a_model_that_sees_padding_in_spite_of_the_mask_is_given_none(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(emb_dim=32, n_layers=2, n_heads=4, causal=True, **V)
    model = randomised(getattr(transformers, f"{family}WithLMHeadModel")(config))
    forward = llm_sampler.from_huggingface(model, cache=False)
    check(forward, [ids(30, 1), ids(9, 2), ids(9, 3)], n=2)
    prompts = [ids(7), ids(2, 1)]
    for prompt, row in zip(
        prompts, llm_sampler.generate(forward, prompts, max_new_tokens=6, temperature=0), strict=True
    ):
        [alone] = llm_sampler.generate(forward, [prompt], max_new_tokens=6, temperature=0)
        assert row.tokens == alone.tokens
    with pytest.raises(ValueError, match="has only a mask of its own, so it cannot see drafts that branch"):
        forward.tree_logits(torch.tensor([ids(13)]), torch.tensor([[5 + node for node in TREE]]))


def test_a_model_that_keeps_other_keys_than_those_of_its_tokens_is_found_out() -> None:
    model = built(transformers.CpmAntConfig(dim_head=8, dim_ff=48, **D))  # has 32 of its own before the first token
    with pytest.raises(ValueError, match="CpmAntForCausalLM kept keys and values of 39 tokens, not of 7: give cache=F"):
        llm_sampler.from_huggingface(model)(torch.tensor([ids(7)]))


def test_without_a_cache_logits_are_computed_only_where_a_row_ends() -> None:
    model = built(WITHOUT_CACHE["recurrent gemma, recurrent and windowed"])
    counter = Counted(model)
    check(llm_sampler.from_huggingface(model, cache=False), [ids(30, 1), ids(9, 2), ids(9, 3)], n=2)
    assert counter.since() == (90 + 30 + 9 + 9, 3 * 4 + 30 + 9 + 9)  # two ends, and what check computes
    counter.hook.remove()


def test_an_encoder_decoder_and_a_name_are_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=96)
    with pytest.raises(ValueError, match="encoder-decoder"):
        llm_sampler.from_huggingface(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match="not its name"):
        llm_sampler.from_huggingface("gpt2")


def test_a_model_without_a_head_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        llm_sampler.from_huggingface(llama.model)(torch.tensor([[1, 2]]))


def test_training_mode_is_refused(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama)
    llama.train()
    try:
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            forward(torch.tensor([[1]]))
    finally:
        llama.eval()


def test_ids_and_lengths_that_the_model_cannot_take_name_their_row(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama)
    with pytest.raises(ValueError, match="row 1 holds the id 96 at position 2"):
        forward.last_logits(*padded([[1, 2], [1, 2, 96]]))
    with pytest.raises(ValueError, match="row 0 has 129 tokens, and the model takes 128"):
        forward(torch.tensor([ids(129)]))
    with pytest.raises(ValueError, match="row 1 has 1 tokens, and logits of its last 2"):
        forward.last_logits(*padded([[1, 2], [1]]), 2)


def test_a_rope_under_which_the_past_changes_is_held_to_its_length() -> None:
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    config = transformers.LlamaConfig(**{**L, "max_position_embeddings": 16}, rope_parameters=rope)
    model = built(config)
    check(llm_sampler.from_huggingface(model), [ids(16), ids(3, 1)])
    with pytest.raises(ValueError, match="row 0 has 17 tokens, and the model takes 16"):
        llm_sampler.from_huggingface(model)(torch.tensor([ids(17)]))
    with pytest.raises(ValueError, match="give at most 16"):
        llm_sampler.from_huggingface(model, max_length=64)


@pytest.mark.parametrize(
    ("config", "cache"),
    [
        (WITHOUT_CACHE["roberta, positions from the ids"], False),  # 130, of which 0 and 1 are no token's
        (
            transformers.WhisperConfig(
                d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=0,
                max_target_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **V,
            ),
            True,
        ),
    ],
    ids=["roberta", "whisper"],
)  # fmt: skip
def test_the_longest_row_is_that_for_which_the_model_has_positions(config: Any, cache: bool) -> None:
    forward = llm_sampler.from_huggingface(built(config), cache=cache)
    longest = [3 + token % 90 for token in ids(128)]  # no padding among them
    check(forward, [longest, longest[:7]])
    with pytest.raises(ValueError, match="row 0 has 129 tokens, and the model takes 128"):
        forward(torch.tensor([[*longest, 5]]))


def test_a_model_that_needs_no_positions_takes_rows_of_any_length() -> None:
    model = built(transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, **V))  # says -1
    check(llm_sampler.from_huggingface(model, cache=False), [ids(20), ids(7, 1)])


LONG: dict[str, Any] = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
CHANGING_AFTER_16 = {
    "longrope, its length beside it": transformers.Phi3Config(
        **L, original_max_position_embeddings=16, rope_parameters=dict(LONG), pad_token_id=0
    ),
    "longrope of some layers": transformers.Gemma3TextConfig(
        **{**L, "num_hidden_layers": 6}, head_dim=8, sliding_window=5,
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            "full_attention": {**LONG, "factor": 8.0, "original_max_position_embeddings": 16},
        },
    ),
    "dynamic of some layers": transformers.Gemma3TextConfig(
        **{**L, "num_hidden_layers": 6, "max_position_embeddings": 16}, head_dim=8, sliding_window=5,
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            "full_attention": dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGING_AFTER_16)
def test_wherever_a_rope_is_said_to_change_the_past_it_is_held_to_its_length(name: str) -> None:
    model = built(copy.deepcopy(CHANGING_AFTER_16[name]))
    forward = llm_sampler.from_huggingface(model)
    for length in (14, 15, 16):
        check(forward, [ids(length), ids(length - 9, 1)])
    with pytest.raises(ValueError, match="row 0 has 17 tokens, and the model takes 16"):
        forward(torch.tensor([ids(17)]))
    with pytest.raises(ValueError, match="give at most 16"):
        llm_sampler.from_huggingface(model, max_length=17)


def test_the_length_of_a_rope_is_found_where_transformers_4_keeps_it() -> None:
    model = built(copy.deepcopy(CHANGING_AFTER_16["longrope, its length beside it"]))
    model.config.rope_parameters = dict(LONG)
    assert llm_sampler.from_huggingface(model).max_length == 16


def test_what_the_model_raises_comes_through_and_spoils_nothing(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama)
    row = ids(20)
    check(forward, [row])

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = llama.model.layers[1].register_forward_hook(fail)  # when the first layer has its new keys already
    with pytest.raises(RuntimeError, match="out of memory"):
        forward.last_logits(*padded([[*row, 1]]))
    hook.remove()
    check(forward, [[*row, 1]])
    check(forward, [[*row, 2], row[:5]])


def test_a_row_of_nan_is_forgotten(llama: Any) -> None:
    forward = llm_sampler.from_huggingface(llama)
    row = ids(20)
    check(forward, [row])
    weight = llama.model.embed_tokens.weight.data
    before = weight[7].clone()
    weight[7] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        next(llm_sampler.sample(forward, [[*row, 7]], max_new_tokens=1))
    weight[7] = before
    check(forward, [[*row, 7], [*row, 7, 8]])


def test_half_precision_is_as_close_as_the_models_own(llama: Any) -> None:
    model = built(CONFIGS["llama"]).bfloat16()
    forward = llm_sampler.from_huggingface(model)
    rows = [ids(30, 1), ids(12, 2)]
    forward.last_logits(*padded([row[:-3] for row in rows]))
    logits = forward.last_logits(*padded(rows))
    for row, own in zip(rows, logits, strict=True):
        with torch.no_grad():
            full = built(CONFIGS["llama"])(torch.tensor([row])).logits[0, -1:]
            half = model(torch.tensor([row])).logits[0, -1:]
        assert (own - full).abs().mean() <= 1.5 * (half - full).abs().mean() + 1e-3


def test_the_readmes_program_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "sampler/README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"## Hugging Face models.*?```py\n(.*?)```", text, re.DOTALL)
    plain = Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(["The capital of France is Paris."], trainers.BpeTrainer(initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    built(transformers.LlamaConfig(**{**L, "vocab_size": plain.get_vocab_size()})).save_pretrained(tmp_path)
    exec(compile(program.replace("Qwen/Qwen3-0.6B", str(tmp_path)), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 5


def test_requests_in_many_threads_get_the_text_that_each_gets_alone() -> None:
    model = built(CONFIGS["llama"])
    prompts = [[*range(40), i % 3] for i in range(8)]  # rows that take each other's blocks
    settings: dict[str, Any] = dict(max_new_tokens=20, temperature=0.7, seed=1)
    plain = llm_sampler.from_huggingface(model, cache=False)
    expected = [llm_sampler.generate(plain, [prompt], **settings)[0].tokens for prompt in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(4):
            shared = llm_sampler.from_huggingface(model)
            with ThreadPoolExecutor(8) as pool:
                texts = pool.map(lambda p, f=shared: llm_sampler.generate(f, [p], **settings)[0].tokens, prompts)
                assert list(texts) == expected
    finally:
        sys.setswitchinterval(before)
