"""Checkpoints of every family as transformers writes them, and both sides of a comparison.

A family's variants are tiny random models, one for each switch that its config has. Add yours to VARIANTS.

python tests_integration/families.py bloom    # how far its variants are from transformers, and both from fp32
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import llm_sepweight

D: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)
LL: dict[str, Any] = dict(**D, num_key_value_heads=2, max_position_embeddings=64)
LLAMA3: dict[str, Any] = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN: dict[str, Any] = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
QWEN: dict[str, Any] = dict(**LL, use_sliding_window=True, sliding_window=5)


def but(sizes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return sizes | changes


def rope(**parameters: Any) -> LlamaConfig:
    return LlamaConfig(**LL, head_dim=32, rope_parameters={"rope_theta": 1e4} | parameters)  # wide, for many speeds


LLAMA: dict[str, Callable[[], PretrainedConfig]] = {
    "llama 1, a key for each head": lambda: LlamaConfig(**D),
    "llama 2, grouped": lambda: LlamaConfig(**LL),
    "llama, one key head": lambda: LlamaConfig(**D, num_key_value_heads=1),
    "llama, head_dim of its own": lambda: LlamaConfig(**LL, head_dim=16),
    "openllama, head_dim 100": lambda: LlamaConfig(**but(D, hidden_size=200, num_attention_heads=2)),
    "llama, attention and mlp biases": lambda: LlamaConfig(**LL, attention_bias=True, mlp_bias=True),
    "llama 3.2, tied": lambda: LlamaConfig(
        **LL, tie_word_embeddings=True, rope_parameters=but(LLAMA3, original_max_position_embeddings=32)
    ),
    "llama3 rope, length of the config": lambda: rope(**LLAMA3),
    "llama3 rope, longer": lambda: rope(**LLAMA3, original_max_position_embeddings=1024),
    "linear rope": lambda: rope(rope_type="linear", factor=4.0),
    "yarn rope": lambda: rope(**YARN),
    "yarn rope, attention factor": lambda: rope(**YARN, attention_factor=1.3, beta_fast=2.0, beta_slow=0.2),
    "yarn rope, mscale": lambda: rope(**YARN, mscale=0.7, mscale_all_dim=1.0),
    "yarn rope, not truncated": lambda: rope(**YARN, truncate=False),
    "dynamic rope": lambda: rope(rope_type="dynamic", factor=4.0),
    "mistral, window": lambda: MistralConfig(**LL, sliding_window=5),
    "mistral, no window": lambda: MistralConfig(**LL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**LL),
    "qwen2, window from a layer on": lambda: Qwen2Config(**QWEN, max_window_layers=1),
    "qwen2, windows by layer_types": lambda: Qwen2Config(**QWEN, layer_types=["sliding_attention", "full_attention"]),
    "qwen3": lambda: Qwen3Config(**LL, head_dim=16),
    "qwen3, biases and window": lambda: Qwen3Config(**QWEN, head_dim=16, attention_bias=True, max_window_layers=0),
    "yi": lambda: LlamaConfig(**LL, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=5e6)),
}

MIXTURE: dict[str, Any] = dict(**LL, num_experts_per_tok=2, num_local_experts=5)
QWEN_MOE: dict[str, Any] = dict(**LL, num_experts_per_tok=2, num_experts=5, moe_intermediate_size=24, head_dim=16)

MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**MIXTURE),
    "mixtral, window": lambda: MixtralConfig(**MIXTURE, sliding_window=5),
    "mixtral, one expert each": lambda: MixtralConfig(**but(MIXTURE, num_experts_per_tok=1)),
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN_MOE, norm_topk_prob=True),
    "qwen3_moe, weights as they are": lambda: Qwen3MoeConfig(**QWEN_MOE),
    "qwen3_moe, every second layer": lambda: Qwen3MoeConfig(**QWEN_MOE, decoder_sparse_step=2),
    "qwen3_moe, first layer dense, tied, biases, window": lambda: Qwen3MoeConfig(
        **QWEN_MOE,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
    ),
}

F: dict[str, Any] = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
FALCON_40B: dict[str, Any] = dict(**F, new_decoder_architecture=True, num_kv_heads=2)
FALCON_RW: dict[str, Any] = dict(**F, alibi=True, bias=True, multi_query=False, parallel_attn=False)

FALCON: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon 7b": lambda: FalconConfig(**F),
    "falcon 7b, untied": lambda: FalconConfig(**F, tie_word_embeddings=False),
    "falcon 7b, biases": lambda: FalconConfig(**F, bias=True),
    "falcon 40b": lambda: FalconConfig(**FALCON_40B),
    "falcon 11b": lambda: FalconConfig(
        **FALCON_40B,
        num_ln_in_parallel_attn=1,
        tie_word_embeddings=False,
        ffn_hidden_size=80,
        rope_parameters=dict(rope_type="default", rope_theta=500042.0),
    ),
    "falcon, linear rope": lambda: FalconConfig(
        **F, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)
    ),
    "falcon rw": lambda: FalconConfig(**FALCON_RW),
    "falcon rw, seven heads": lambda: FalconConfig(**but(FALCON_RW, hidden_size=56, num_attention_heads=7)),
    "falcon, alibi for a shared key head": lambda: FalconConfig(**F, alibi=True),
    "falcon, one after the other": lambda: FalconConfig(**F, parallel_attn=False),
}

B: dict[str, Any] = dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)

BLOOM: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: BloomConfig(**B),
    "bloom, seven heads": lambda: BloomConfig(**but(B, hidden_size=56, n_head=7)),
    "bloom, untied": lambda: BloomConfig(**B, tie_word_embeddings=False),
}

VARIANTS = LLAMA | MIXTURES | FALCON | BLOOM
EAGER_ONLY = ("bloom",)  # for which transformers has no other attention


def save(config: PretrainedConfig, path: Path) -> Path:
    """Writes a checkpoint of random weights in which no bias is zero and no norm is one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def edit_config(path: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def theirs(path: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    how = {"attn_implementation": "eager" if model_type_of(path) in EAGER_ONLY else "sdpa"}
    if model_type_of(path) in ("mixtral", "qwen3_moe"):
        how["experts_implementation"] = "eager"  # the default multiplies in groups, with other kernels
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how).eval()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def family_of(path: Path) -> Any:
    """The package that runs a checkpoint, found as a user's program finds it."""
    (entry,) = entry_points(group="llm_microlibs.families", name=model_type_of(path))
    return entry.load()


def model_type_of(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["model_type"]


def load_with_experts(store: Any, part: str) -> dict[str, Tensor]:
    """A part with the parts of it: what lies in mid.00003/experts.00005 is experts.5 of the layer's module."""
    weights = dict(store.load(part))
    for inner in (name for name in store.parts if name.startswith(f"{part}/")):
        child, number = inner.removeprefix(f"{part}/").split(".")
        weights |= {f"{child}.{int(number)}.{key}": tensor for key, tensor in store.load(inner).items()}
    return weights


class Ours:
    """The parts of a checkpoint, weights bound, each read through the store."""

    def __init__(self, path: Path, *specs: str, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.parts = dtype, {}
        family = family_of(path)
        with llm_sepweight.open(path, layout=family.layout) as store:
            self.config = family.Config.from_hf(store.config)
            for spec in specs or ("f",):
                self.parts |= family.parts(self.config, spec)
            for name, part in self.parts.items():
                weights = {key: tensor.to(dtype, copy=True) for key, tensor in load_with_experts(store, name).items()}
                part.load_state_dict(weights, assign=True)
        self.caches: dict[str, tuple[Tensor, ...]] = {}

    def new_caches(self, rows: int, slots: int) -> None:
        for name, part in self.parts.items():
            if name.startswith("mid."):
                self.caches[name] = part.new_cache(rows, slots, dtype=self.dtype, device="cpu")

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor | None = None, **how: Any) -> Tensor:
        """Logits of ids [B, T]: of whole rows without positions, with the caches otherwise."""
        at = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
        x = ids
        for name, part in self.parts.items():
            if name == "end":
                x = part(x)
            elif name == "begin":
                x = part(x, at)
            else:
                x = part(x, at, None if positions is None else self.caches[name], **how)
        return x


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def report(names: list[str]) -> None:
    """Print, for each variant that has one of the names in its own, what separates both sides."""
    ids = torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))
    print(f"{'':40}  fp32 max   bf16 mean  cached     theirs to fp32  ours to fp32")
    for name in [name for name in VARIANTS if not names or any(part in name for part in names)]:
        with tempfile.TemporaryDirectory() as folder:
            path = save(VARIANTS[name](), Path(folder))
            exact, rounded = theirs(path, ids), theirs(path, ids, torch.bfloat16)
            ours = Ours(path, dtype=torch.bfloat16)
            full = ours(ids)
            ours.new_caches(3, 48)
            steps = [ours(ids[:, i : i + 1], torch.full((3, 1), i), kv_len=i + 1) for i in range(48)]
            pairs = ((full, rounded), (torch.cat(steps, dim=1), rounded), (rounded, exact), (full, exact))
            means = [f"{(a - b).abs().mean():.1e}" for a, b in pairs]
            print(
                f"{name:40}  {(Ours(path)(ids) - exact).abs().max():.1e}    {means[0]}    {means[1]}    {means[2]:14}  {means[3]}"
            )


if __name__ == "__main__":
    report(sys.argv[1:])
