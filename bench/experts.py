"""Which experts should stay in memory? Plays a trace of a router's choices against several rules.

The trace, experts_trace.txt, was recorded from a small mixture of experts (Mixtral, 16 experts, 2 a token), which --record
trains for a minute on the text of this repository as it is, with the usual loss for balance, and which then reads text that
it has not seen, token by token. It shows what routers do: favourites that differ between layers, and the same experts for a
while. It is no 50 GB model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRACE = Path(__file__).with_name("experts_trace.txt")
LAYERS, EXPERTS, PER_TOKEN = 4, 16, 2

Key = tuple[int, int]  # layer, expert
Trace = list[list[list[int]]]  # token, layer -> the experts chosen
Rule = Callable[[Trace, int], list[bool]]  # a trace, and how many slots there are -> of each use, whether it was a hit


def read_trace(path: Path) -> Trace:
    """The choices in a file: a line for each token, a word for each layer, a hexadecimal digit for each expert."""
    return [[[int(digit, 16) for digit in word] for word in line.split()] for line in path.read_text().splitlines()]


def write_trace(trace: Trace, path: Path) -> None:
    lines = (" ".join("".join(f"{expert:x}" for expert in experts) for experts in token) for token in trace)
    path.write_text("".join(f"{line}\n" for line in lines))


def trained_trace(steps: int, tokens: int) -> Trace:
    """The choices of a model of `steps` training steps, over `tokens` tokens (bytes) that it has not seen."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, output_router_logits=True,
        router_aux_loss_coef=0.02, max_position_embeddings=512,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    text = torch.tensor(list(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*/src/*/*.py")))))
    seen, unseen = text[: -tokens - 1], text[-tokens - 1 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        starts = torch.randint(len(seen) - 129, (8,))
        batch = torch.stack([seen[start : start + 128] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}", flush=True)
    trace: Trace = []
    with torch.inference_mode():
        for start in range(0, tokens, 256):
            logits = model(unseen[None, start : start + 256]).router_logits  # per layer [T, EXPERTS]
            chosen = torch.stack([layer.topk(PER_TOKEN).indices for layer in logits], dim=1)  # [T, LAYERS, PER_TOKEN]
            trace += chosen.tolist()
    return trace


def lru(trace: Trace, slots: int) -> list[bool]:
    """The least recently used goes, whichever its layer."""
    kept: OrderedDict[Key, None] = OrderedDict()
    hits = []
    for key in _keys(trace):
        hits.append(key in kept)
        kept[key] = None
        kept.move_to_end(key)
        if len(kept) > slots:
            kept.popitem(last=False)
    return hits


def lru_per_layer(trace: Trace, slots: int) -> list[bool]:
    """Each layer has its share of the slots, and the least recently used of the layer goes."""
    shares = [slots // LAYERS + (i < slots % LAYERS) for i in range(LAYERS)]
    layers = [lru([[token[i]] for token in trace], share) for i, share in enumerate(shares)]
    return [hit for use in zip(*layers, strict=True) for hit in use]


def lfu(fading: float) -> Rule:
    """The one used least goes, where a use counts `fading` times less with each token."""

    def rule(trace: Trace, slots: int) -> list[bool]:
        kept: set[Key] = set()
        score: dict[Key, float] = {}
        hits = []
        for t, token in enumerate(trace):
            for key in _keys([token]):
                now = -t * math.log(fading)
                before = score.get(key, -math.inf)
                score[key] = now + math.log1p(math.exp(before - now))
                hits.append(key in kept)
                kept.add(key)
                if len(kept) > slots:
                    kept.remove(min(kept - {key}, key=score.__getitem__))
        return hits

    return rule


def pinned(trace: Trace, slots: int) -> list[bool]:
    """Those used most in the first half stay for ever."""
    favourites = {key for key, _ in Counter(_keys(trace[: len(trace) // 2])).most_common(slots)}
    return [key in favourites for key in _keys(trace)]


def hit_rate(rule: Rule, trace: Trace, slots: int) -> float:
    """The share of hits in the second half, to which the first has warmed all rules."""
    hits = rule(trace, slots)
    counted = hits[len(list(_keys(trace[: len(trace) // 2]))) :]
    return sum(counted) / len(counted)


def _keys(trace: Trace) -> Iterable[Key]:
    return ((layer, expert) for token in trace for layer, experts in enumerate(token) for expert in experts)


RULES: dict[str, Rule] = {
    "LRU": lru,
    "LRU, per layer": lru_per_layer,
    "LFU": lfu(1.0),
    "LFU, fading 0.99": lfu(0.99),
    "LFU, fading 0.97": lfu(0.97),
    "LFU, fading 0.9": lfu(0.9),
    "LFU, fading 0.8": lfu(0.8),
    "pinned by frequency": pinned,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"train a model, and write its choices to {TRACE.name}")
    parser.add_argument("--steps", type=int, default=200, help="of its training (default: 200, a minute)")
    parser.add_argument("--tokens", type=int, default=2048, help="to record (default: 2048)")
    parser.add_argument("--json", type=Path, help="write the hit rates there")
    arguments = parser.parse_args(argv)
    if arguments.record:
        write_trace(trained_trace(arguments.steps, arguments.tokens), TRACE)
    trace = read_trace(TRACE)
    print(f"trace: {len(trace)} tokens, {LAYERS} layers, {PER_TOKEN} of {EXPERTS} experts\n")
    shares = (0.2, 0.35, 0.5, 0.75)
    rates = {
        name: [hit_rate(rule, trace, round(share * LAYERS * EXPERTS)) for share in shares]
        for name, rule in RULES.items()
    }
    print(f"{'hits, with slots for':<24}" + "".join(f"{share:>8.0%}" for share in shares))
    for name, row in rates.items():
        print(f"{name:<24}" + "".join(f"{rate:>8.1%}" for rate in row))
    if arguments.json:
        arguments.json.write_text(json.dumps({"shares": shares, "hit_rates": rates}, indent=1))


if __name__ == "__main__":
    main()
