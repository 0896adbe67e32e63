"""llm_llama_model against transformers: tiny random checkpoints, written by save_pretrained, read where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import llm_llama_model as llama
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


VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
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
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


class Ours:
    """The parts of a checkpoint, weights bound, each read through the store."""

    def __init__(self, path: Path, *specs: str, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.parts = dtype, {}
        with llm_sepweight.open(path, layout=llama.layout) as store:
            self.config = llama.Config.from_hf(store.config)
            for spec in specs or ("f",):
                self.parts |= llama.parts(self.config, spec)
            for name, part in self.parts.items():
                weights = {key: tensor.to(dtype, copy=True) for key, tensor in store.load(name).items()}
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


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(VARIANTS[request.param](), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_fp32_logits_are_those_of_transformers(checkpoint: Path, ids: Tensor) -> None:
    expected = theirs(checkpoint, ids)
    assert expected.abs().max() > 1, "the logits are too small to tell anything"
    assert_near(Ours(checkpoint)(ids), expected)


def test_bf16_error_is_not_above_that_of_transformers(checkpoint: Path, ids: Tensor) -> None:
    exact, rounded = theirs(checkpoint, ids), theirs(checkpoint, ids, torch.bfloat16)
    ours = Ours(checkpoint, dtype=torch.bfloat16)
    allowed = (rounded - exact).abs().mean()
    assert (ours(ids) - rounded).abs().mean() <= allowed
    ours.new_caches(3, 48)
    steps = [ours(ids[:, :40], torch.arange(40).expand(3, -1), kv_len=40)]
    steps += [ours(ids[:, i : i + 1], torch.full((3, 1), i), kv_len=i + 1) for i in range(40, 48)]
    assert (torch.cat(steps, dim=1) - rounded).abs().mean() <= allowed


@pytest.mark.parametrize("sizes", [[1] * 17, [3] * 5 + [2]], ids=["token by token", "by three"])
def test_prefill_and_cached_steps_equal_transformers_full_forward(
    checkpoint: Path, ids: Tensor, sizes: list[int]
) -> None:
    ours, start = Ours(checkpoint), 48 - sum(sizes)
    ours.new_caches(3, 48)
    steps = [ours(ids[:, :start], torch.arange(start).expand(3, -1), kv_len=start)]
    for size in sizes:
        stop = start + size
        steps.append(ours(ids[:, start:stop], torch.arange(start, stop).expand(3, -1), kv_len=stop))
        start = stop
    assert_near(torch.cat(steps, dim=1), theirs(checkpoint, ids))


def test_parts_from_ranges_compose_to_the_whole(checkpoint: Path, ids: Tensor) -> None:
    assert torch.equal(Ours(checkpoint, "b 0:1", "1:2 e")(ids), Ours(checkpoint)(ids))


def test_rows_of_different_length_in_one_batch_equal_transformers_on_each_row_alone(
    checkpoint: Path, ids: Tensor
) -> None:
    ours, lengths, spare = Ours(checkpoint), torch.tensor([[3], [20], [11]]), 48
    ours.new_caches(3, spare + 1)
    at = torch.arange(20).expand(3, -1)
    prompt = ours(ids[:, :20], at, slots=torch.where(at < lengths, at, spare), kv_len=20)
    steps = [ours(ids.gather(1, lengths + i), lengths + i, kv_len=21 + i) for i in range(4)]
    for row, length in enumerate(lengths[:, 0].tolist()):
        alone = theirs(checkpoint, ids[row : row + 1, : length + 4])[0]
        together = torch.cat([prompt[row, :length], *(step[row] for step in steps)])
        assert_near(together, alone)


def test_a_rolled_back_cache_equals_a_fresh_one(checkpoint: Path, ids: Tensor) -> None:
    ours = Ours(checkpoint)
    ours.new_caches(1, 48)
    ours(ids[:1], torch.arange(48)[None], kv_len=48)
    changed = torch.cat((ids[:1, :9], ids[1:2, 9:30]), dim=1)
    got = ours(changed[:, 9:], torch.arange(9, 30)[None], kv_len=30)
    assert_near(got, theirs(checkpoint, changed)[:, 9:])


def test_a_missing_sliding_window_means_4096_to_mistral(tmp_path: Path) -> None:
    path = save(MistralConfig(**but(LL, num_hidden_layers=1), sliding_window=None), tmp_path)
    ids = torch.randint(0, 96, (1, 4100), generator=torch.Generator().manual_seed(1))
    full = Ours(path)(ids)
    edit_config(path, drop=("sliding_window",))
    windowed = Ours(path)(ids)
    assert_near(windowed, theirs(path, ids))
    assert (windowed - full)[:, :4096].abs().max() <= 2e-5 < (windowed - full)[:, 4096:].abs().max()


def test_the_first_yi_uploads_are_read_under_their_own_names(tmp_path: Path, ids: Tensor) -> None:
    path = save(VARIANTS["yi"](), tmp_path)
    expected = theirs(path, ids)
    file, old = path / "model.safetensors", {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    weights = load_file(file)
    for name in list(weights):
        for new_norm, old_norm in old.items():
            if new_norm in name:
                weights[name.replace(new_norm, old_norm)] = weights.pop(name)
    save_file(weights, file)
    edit_config(path, model_type="Yi", drop=("rope_parameters",), rope_theta=5e6)
    assert_near(Ours(path)(ids), expected)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    "variant", ["linear rope", "dynamic rope", "llama3 rope, longer", "yarn rope", "yarn rope, mscale"]
)
def test_older_spellings_of_rope_in_config_json_mean_the_same(
    tmp_path: Path, ids: Tensor, variant: str, spelling: str
) -> None:
    path = save(VARIANTS[variant](), tmp_path)
    expected = Ours(path)(ids)
    new = json.loads((path / "config.json").read_text())["rope_parameters"]
    theta, rope_type = new.pop("rope_theta"), new.pop("rope_type")
    edit_config(path, drop=("rope_parameters",), rope_theta=theta, rope_scaling={spelling: rope_type, **new})
    assert torch.equal(Ours(path)(ids), expected)
    assert_near(theirs(path, ids), expected)


def test_a_head_that_is_tied_and_stored_all_the_same_changes_nothing(tmp_path: Path, ids: Tensor) -> None:
    path = save(VARIANTS["llama 3.2, tied"](), tmp_path)
    expected, file = theirs(path, ids), path / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert_near(Ours(path)(ids), expected)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=137, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8),
        LlamaConfig(num_hidden_layers=30, vocab_size=102400, eos_token_id=100001),
        LlamaConfig(num_hidden_layers=26, hidden_size=3200, intermediate_size=8640, num_attention_heads=32),
    ],
    ids=["goliath", "deepseek-llm", "openllama-3b"],
)
def test_large_models_have_the_parameters_that_transformers_gives_them(config: LlamaConfig) -> None:
    with torch.device("meta"):
        expected = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    written = json.loads(config.to_json_string(use_diff=False))
    modules = llama.parts(llama.Config.from_hf(written))
    ours = {(part, name): p.shape for part, module in modules.items() for name, p in module.state_dict().items()}
    assert ours == {place: shape for key, shape in expected.items() for place in llama.layout(key, written)}
