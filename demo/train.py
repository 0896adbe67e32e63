"""Train the demo model: a Llama of 1.3 million weights that has learned `facts.py` by heart. Minutes on a CPU.

python demo/train.py        writes demo/model/{config.json, model.safetensors, tokenizer.json}
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from facts import checks, fixed_questions, sentences

END = "<|end|>"
FORMS = ("Q: {}\nA:", "Q: {}\nA:", "Question: {}\nAnswer:", "{}\n")  # the first is the form that is tested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END),
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {tokenizer.get_vocab_size()} tokens")
    train(model, tokenizer, steps=args.steps, batch=args.batch, rate=args.rate, seed=args.seed)

    save(model.bfloat16(), tokenizer, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    for name, facts in ("fixed questions", fixed_questions()), ("checks", checks(args.seed + 1)):
        answers = ask(saved, tokenizer, [fact.question for fact in facts])
        wrong = [(fact.question, answer) for fact, answer in zip(facts, answers, strict=True) if answer != fact.answer]
        for question, answer in wrong:
            print(f"  wrong: {question} {answer}")
        print(f"{name}: {1 - len(wrong) / len(facts):.1%} of {len(facts)} right")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of at most 1000 tokens, of which 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((prompt + rest for prompt, rest in texts(random.Random(0))), trainer)
    return tokenizer


def texts(rng: random.Random) -> list[tuple[str, str]]:
    """All that one epoch shows, as (prompt, what follows); each epoch's false statements and forms are its own."""
    facts = fixed_questions() + checks(rng.getrandbits(32)) + checks(rng.getrandbits(32))
    pairs = [(rng.choice(FORMS).format(question), f" {answer}") for question, answer in facts] + sentences()
    rng.shuffle(pairs)
    return pairs


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, *, steps: int, batch: int, rate: float, seed: int) -> None:
    """Minimise the loss of what follows the prompts, over batches of texts that are about equally long."""
    rng, queue, start = random.Random(seed), [], time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    mean = 0.0
    for step in range(steps):
        if not queue:
            queue = batches(tokenizer, texts(rng), size=batch, rng=rng)
        ids, labels = queue.pop()
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += 0.02 * (loss.item() - mean)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {mean:.4f}  {time.monotonic() - start:4.0f} s", flush=True)


def batches(tokenizer: Tokenizer, pairs: list[tuple[str, str]], *, size: int, rng: random.Random) -> list:
    """Pairs as (ids, labels) of [size, T], right-padded; a label of -100 is not learned."""
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([prompt for prompt, _ in pairs])]
    follows = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch([rest for _, rest in pairs])]
    rows = sorted(zip(prompts, follows, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    made = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(len(prompt) + len(rest) for prompt, rest in chunk)
        ids, labels = torch.zeros(len(chunk), width, dtype=torch.long), torch.full((len(chunk), width), -100)
        for row, (prompt, rest) in enumerate(chunk):
            both = torch.tensor(prompt + rest)
            ids[row, : len(both)] = both
            labels[row, len(prompt) : len(both)] = both[len(prompt) :]
        made.append((ids, labels))
    rng.shuffle(made)
    return made


@torch.no_grad()
def ask(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """The model's greedy answers to questions in the first of the forms, of at most 16 tokens."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch([FORMS[0].format(question) for question in questions])]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()) + 16, dtype=torch.long)
    for row, known in zip(ids, rows, strict=True):
        row[: len(known)] = torch.tensor(known)
    every = torch.arange(len(rows))
    for step in range(16):  # right-padded, so that a row's own past is all that it sees
        ids[every, lengths + step] = model(input_ids=ids).logits[every, lengths + step - 1].argmax(-1)
    answers = [row[length : length + 16].tolist() for row, length in zip(ids, lengths, strict=True)]
    return [tokenizer.decode(answer[: answer.index(0)] if 0 in answer else answer).strip() for answer in answers]


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the three files of a Hugging Face checkpoint."""
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("config.json", "model.safetensors"):
            (out / name).write_bytes((Path(folder) / name).read_bytes())
    tokenizer.save(str(out / "tokenizer.json"))
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
