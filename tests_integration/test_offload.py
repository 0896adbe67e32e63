"""Models of transformers under a memory budget: the same tokens as without one, through checkpoints as they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import llm_partial_run
from offloading import (
    CONFIGS,
    GENERATE,
    MASK,
    PROMPTS,
    SIZES,
    T5,
    VOCAB,
    logits,
    offloaded,
    on_meta,
    resident,
    save,
    smallest,
)

pytestmark = pytest.mark.usefixtures("small_slices")


def test_tokens_are_those_without_offloading_and_streamed_logits_are_the_resident_bits(checkpoint):
    theirs, model = resident(checkpoint), on_meta(checkpoint)
    expected = theirs.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, **GENERATE)
    expected_logits = logits(theirs, input_ids=PROMPTS, attention_mask=MASK)
    least, streamed, results = smallest(checkpoint, model), [], []
    for memory in (least, least + 60_000, "1GiB"):  # the second: four more slots, and some slices
        with offloaded(checkpoint, model, memory) as run:
            streamed.append(run.plan.streamed)
            tokens = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, **GENERATE)
            assert torch.equal(tokens, expected)
            results.append([logits(model, input_ids=PROMPTS[:, :n]) for n in (5, 1)])
            ours = logits(model, input_ids=PROMPTS, attention_mask=MASK)
            torch.testing.assert_close(ours, expected_logits, atol=2e-5, rtol=0)
    assert streamed[0] > streamed[1] > streamed[2] == 0
    for first, *rest in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in rest)


def test_assisted_decoding_is_unchanged(checkpoint):
    theirs, model = resident(checkpoint), on_meta(checkpoint)
    prompt = torch.tensor([[3, 1, 4, 3, 1, 4, 3, 1]])
    expected = theirs.generate(prompt, max_new_tokens=8, **GENERATE)
    with offloaded(checkpoint, model, smallest(checkpoint, model)) as run:
        by_lookup = model.generate(prompt, max_new_tokens=8, prompt_lookup_num_tokens=3, **GENERATE)
        passes = run.stats.passes
        by_draft = model.generate(prompt, max_new_tokens=8, assistant_model=theirs, **GENERATE)
        assert run.stats.passes - passes < 8  # drafts were verified several at a time
    assert torch.equal(by_lookup, expected)
    assert torch.equal(by_draft, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon 40b", "gemma2", "gpt neox", "mixtral"])
def test_bfloat16_is_no_farther_from_fp32_than_transformers_is(name, tmp_path):
    path = save(CONFIGS[name], tmp_path, torch.bfloat16)
    model, theirs = on_meta(path), resident(path)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected, truth = logits(theirs, input_ids=PROMPTS).float(), logits(exact, input_ids=PROMPTS)
    with offloaded(path, model, smallest(path, model)):
        assert model.dtype == torch.bfloat16
        ours = logits(model, input_ids=PROMPTS).float()
    assert (ours - expected).abs().mean() <= (expected - truth).abs().mean()


MAMBA = hf.MambaConfig(
    hidden_size=32, num_hidden_layers=4, state_size=4, **VOCAB
)  # computes with a Linear's weight itself


@pytest.mark.parametrize("config", [*(CONFIGS[name] for name in ("llama", "gpt2", "falcon 40b", "mixtral")), MAMBA])
def test_whole_blocks_give_the_same_tokens(config, tmp_path):
    path = save(config, tmp_path)
    model = on_meta(path)
    expected = resident(path).generate(PROMPTS, max_new_tokens=8, **GENERATE)
    cache = "1MiB" if config is MAMBA else None  # its state is not counted
    whole: dict[str, Any] = dict(whole_blocks=True, cache=cache)
    with offloaded(path, model, smallest(path, model, **whole), **whole) as run:
        assert run.plan.streamed
        assert torch.equal(model.generate(PROMPTS, max_new_tokens=8, **GENERATE), expected)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "beams": dict(num_beams=3),
    "several beams of each": dict(num_beams=3, num_return_sequences=2),
    "samples": dict(do_sample=True),
    "several samples of each": dict(do_sample=True, num_return_sequences=3, temperature=0.7),
    "a static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
    "a prompt in chunks": dict(prefill_chunk_size=2),
    "scores and hidden states": dict(output_scores=True, output_hidden_states=True),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "gemma2", "falcon 40b", "mixtral"])
def test_every_way_to_generate_is_unchanged(name, how, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    theirs, model = resident(path), on_meta(path)
    settings = GENERATE | dict(attention_mask=MASK, max_new_tokens=6) | WAYS[how]

    def generate(generator):
        torch.manual_seed(5)
        return generator.generate(PROMPTS, **settings)

    expected = generate(theirs)
    with offloaded(path, model, smallest(path, model, rows=6), rows=6) as run:
        for _ in range(2):
            assert torch.equal(generate(model), expected)
        assert run.stats.passes >= 12


def test_of_an_encoder_and_a_decoder_the_larger_is_streamed_and_the_other_serves_as_it_is(tmp_path):
    theirs: Any = hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(**T5)).eval()
    theirs.save_pretrained(tmp_path)
    model = on_meta(tmp_path, hf.AutoModelForSeq2SeqLM)
    expected = theirs.generate(PROMPTS, max_new_tokens=8, do_sample=False)
    with offloaded(tmp_path, model, smallest(tmp_path, model)) as run:
        assert run.blocks[0] == "decoder.block.0"
        assert torch.equal(model.generate(PROMPTS, max_new_tokens=8, do_sample=False), expected)
        with pytest.warns(UserWarning, match=r"encoder.*was asked for when it was not its turn"):
            again = model.generate(PROMPTS, max_new_tokens=8, do_sample=False)
        assert torch.equal(again, expected)


class ProductsIn16Bits(TorchDispatchMode):
    """Counts batched products of several rows in bf16, for whose shapes oneDNN would keep code."""

    met = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        batched = func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        self.met += batched and args[-1].dtype == torch.bfloat16 and args[-2].shape[-2] > 1
        return func(*args, **(kwargs or {}))


def test_attention_of_an_encoder_beside_the_blocks_leaves_nothing_in_16_bits_behind(tmp_path):
    path = save(hf.T5Config(**T5), tmp_path, torch.bfloat16, hf.AutoModelForSeq2SeqLM)
    model, theirs = on_meta(path, hf.AutoModelForSeq2SeqLM), resident(path, hf.AutoModelForSeq2SeqLM)
    for each in (model, theirs):
        each.set_attn_implementation("eager")
    with ProductsIn16Bits() as products:
        theirs.generate(PROMPTS, max_new_tokens=2, do_sample=False)
    assert products.met
    with offloaded(path, model), ProductsIn16Bits() as products:
        model.generate(PROMPTS, max_new_tokens=2, do_sample=False)
    assert not products.met


WHISPER = hf.WhisperConfig(
    d_model=32, encoder_layers=2, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=24,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **VOCAB,
)  # fmt: skip


DEBERTA = hf.DebertaV2Config(
    **SIZES, intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    **dict[str, Any](position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind", "inputs"),
    [
        (WHISPER, hf.AutoModelForSpeechSeq2Seq, dict(input_features=torch.randn(2, 8, 40), decoder_input_ids=PROMPTS)),
        (DEBERTA, hf.AutoModelForMaskedLM, dict(input_ids=PROMPTS)),
    ],
    ids=["whisper cuts rows out", "deberta has a norm of all"],
)
def test_a_small_table_of_positions_is_there_as_a_whole(config, kind, inputs, tmp_path):
    path = save(config, tmp_path, kind=kind)
    model = on_meta(path, kind)
    with offloaded(path, model, smallest(path, model)) as run:
        assert run.plan.streamed
        ours = logits(model, **inputs)
    torch.testing.assert_close(ours, logits(resident(path, kind), **inputs), atol=2e-5, rtol=0)


def test_blocks_that_share_their_weights_are_refused(tmp_path):
    config = hf.AlbertConfig(**SIZES, embedding_size=16, intermediate_size=48)
    with torch.device("meta"):
        model = hf.AutoModelForMaskedLM.from_config(config).eval()
    with pytest.raises(ValueError, match="no sequence of blocks"):
        llm_partial_run.layout_from_module(model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_copies_of_experts_for_each_token_are_refused_before_and_between_passes(name, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    model = on_meta(path)
    model.set_experts_implementation("batched_mm")
    with pytest.raises(ValueError, match=r"Experts has experts_implementation='batched_mm'"):
        offloaded(path, model)
    model.set_experts_implementation("grouped_mm")
    with offloaded(path, model):
        torch.testing.assert_close(
            logits(model, input_ids=PROMPTS), logits(resident(path), input_ids=PROMPTS), atol=2e-5, rtol=0
        )
        model.set_experts_implementation("batched_mm")
        with pytest.raises(ValueError, match=r"Experts has experts_implementation='batched_mm'"):
            model(PROMPTS)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_experts_may_say_how_it_would_reach_them(name, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    model = on_meta(path)
    model.config._experts_implementation = "batched_mm"
    with offloaded(path, model):
        logits(model, input_ids=PROMPTS)


def test_the_program_in_the_readme_runs(tmp_path):
    readme = (Path(__file__).parent.parent / "partial_run/README.md").read_text()
    (program,) = [block for block in readme.split("```")[1::2] if "layout_from_module" in block]
    names: dict[str, Any] = dict(model_dir=save(CONFIGS["gpt2"], tmp_path), input_ids=PROMPTS)
    exec(program, names)
    assert names["run"].stats.passes == 32
