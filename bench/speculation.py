"""How many tokens a forward gives with prompt lookup, on text that is grounded in its prompt and on text that is not.

python bench/speculation.py --help

With exact greedy speculation that depends on the prompt and the text alone, not on the model: whichever model writes this
text needs this many forwards for it. So the model is replaced by one that replays known text, of this repository as it was
at one commit, so that the numbers stay what they are while it goes on:

edit    a file as it was before one of the commits up to there -> the file after it
quote   a document -> every third paragraph of it, with a line before each
other   the first half of a file -> the second half, which quotes nothing
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "117187db7a3d7314408ec7537a00ac986483cf94"  # the one that brought this file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=12, help="of each kind (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 10, 20], help="drafted at most (default: 5 10 20)")
    parser.add_argument("--min-match", type=int, nargs="+", default=[2], help="(default: 2)")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 4], help="places followed (default: 1 4)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the tokenizer that is trained for this")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()

    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        raise SystemExit("the texts are this repository's history, and this clone lacks it: git fetch --unshallow")
    tokenizer = trained_tokenizer(args.vocabulary)
    kinds = {"edit": edits(args.texts), "quote": quotes(args.texts), "other": halves(args.texts)}
    results = []
    print(f"{'text':7}{'texts':>6}{'tokens':>8}{'drafted':>9}{'match':>7}{'branches':>10}", end="")
    print(f"{'tokens/forward':>16}{'accepted':>10}{'ms/forward':>12}")
    for kind, pairs in kinds.items():
        encoded = [(tokenizer.encode(prompt).ids, tokenizer.encode(text).ids) for prompt, text in pairs]
        for branches in args.branches:
            for tokens in args.tokens:
                for match in args.min_match:
                    result = replayed(encoded, tokenizer.get_vocab_size(), tokens, match, branches)
                    results.append({"text": kind, "branches": branches, "tokens": tokens, "min_match": match, **result})
                    print(f"{kind:7}{len(pairs):6}{result['gained']:8}{tokens:9}{match:7}{branches:10}", end="")
                    print(f"{result['tokens_per_forward']:16.2f}{result['accepted']:10.0%}", end="")
                    print(f"{result['seconds_beside_the_model'] * 1e3:12.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def replayed(pairs: list[tuple[list[int], list[int]]], vocabulary: int, tokens: int, match: int, branches: int) -> Any:
    """Each text by itself, greedily; the mean over all tokens and forwards."""
    import llm_sampler

    gained = forwards = drafted = accepted = 0
    seconds = 0.0
    for prompt, text in pairs:
        model = Replay(prompt + text, vocabulary)
        drafter = llm_sampler.PromptLookup(tokens, min_match=match, branches=branches)
        start = time.perf_counter()
        steps = llm_sampler.sample(model, [prompt], max_new_tokens=len(text), temperature=0, drafter=drafter)
        if [step.tokens[0] for step in steps] != text:
            raise AssertionError("speculation has changed the text")
        seconds += time.perf_counter() - start - model.seconds
        gained, forwards = gained + steps.stats.tokens, forwards + steps.stats.forwards
        drafted, accepted = drafted + steps.stats.drafted, accepted + steps.stats.accepted
    return {
        "gained": gained,
        "forwards": forwards,
        "tokens_per_forward": gained / forwards,
        "accepted": accepted / max(drafted, 1),
        "seconds_beside_the_model": seconds / forwards,
    }


class Replay:
    """The model that writes one text, whatever its prompt: after anything else it is sure of the id 0."""

    def __init__(self, text: list[int], vocabulary: int):
        self.text = text
        self.vocabulary = vocabulary
        self.seconds = 0.0

    def __call__(self, ids: Any) -> Any:
        raise NotImplementedError("last_logits is what is called")

    def last_logits(self, ids: Any, lengths: Any, n: int) -> Any:
        length = int(lengths[0])
        return self._logits([ids[0, : end + 1].tolist() for end in range(length - n, length)])

    def tree_logits(self, ids: Any, parents: Any) -> Any:
        row, own = ids[0].tolist(), parents[0].tolist()
        paths = {own[0]: row[: own[0] + 1]}
        for node, parent in enumerate(own):
            paths[own[0] + 1 + node] = [*paths[parent], row[own[0] + 1 + node]]
        return self._logits([paths[own[0] + 1 + node] for node in range(len(own))])

    def _logits(self, paths: list[list[int]]) -> Any:
        import torch

        start = time.perf_counter()
        following = [self.text[len(path)] if self.text[: len(path)] == path else 0 for path in paths]
        logits = torch.nn.functional.one_hot(torch.tensor([following]), self.vocabulary).float()
        self.seconds += time.perf_counter() - start
        return logits


def edits(count: int) -> list[tuple[str, str]]:
    """Files before and after a commit that changed them, the newest first, each file once."""
    options = ("--no-merges", "--diff-filter=M", "--name-only", "--format=commit %H")
    log = git("log", COMMIT, *options, "--", "*.py", "*.md")
    pairs, commit, seen = [], "", set()
    for line in log.splitlines():
        if line.startswith("commit "):
            commit = line.split()[1]
        elif line and line not in seen and len(pairs) < count:
            before, after = git("show", f"{commit}~:{line}"), git("show", f"{commit}:{line}")
            if 500 < len(after) < 12_000:
                seen.add(line)
                pairs.append((f"{before}\n\nThe same file after the change:\n\n", after))
    return pairs


def quotes(count: int) -> list[tuple[str, str]]:
    pairs = []
    for document in files(".md"):
        paragraphs = [p for p in re.split(r"\n\n+", document) if len(p) > 80]
        quoted = "".join(f"It says, in paragraph {i}:\n\n{p}\n\n" for i, p in enumerate(paragraphs) if i % 3 == 0)
        if len(paragraphs) > 3:
            pairs.append(("\n\n".join(paragraphs) + "\n\n", quoted[:4000]))
    return pairs[:count]


def halves(count: int) -> list[tuple[str, str]]:
    texts = [text for text in files(".py") if 2000 < len(text) < 12_000]
    return [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts[:count]]


def files(ending: str) -> list[str]:
    """The texts of the files at the commit whose names end so, in the order of the names."""
    names = git("ls-tree", "-r", "--name-only", COMMIT).splitlines()
    return [git("show", f"{COMMIT}:{name}") for name in names if name.endswith(ending)]


def trained_tokenizer(vocabulary: int) -> Any:
    """Byte-level pairs of the repository's own code and documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(files(".py") + files(".md"), trainer)
    return tokenizer


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"the texts are this repository's history, and git gives: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
