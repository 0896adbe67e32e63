"""The command `llm-partial-run`: composes the packages. The only module here that needs others of this family."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from . import PartialRun, format_bytes, plan
from ._memory import peak_resident_set

FAMILIES = "llm_microlibs.families"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EXAMPLE = """
examples:
  llm-partial-run plan Llama-3.1-70B-Instruct --memory 14GiB
  llm-partial-run generate Llama-3.1-70B-Instruct --memory 14GiB --prompt "The capital of France is"
  cat question.txt | llm-partial-run generate MODEL_DIR --prompt - --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input (one line on stderr says what), 130 interrupted, 141 nobody reads."""
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest when it exits
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        print(f"llm-partial-run: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-partial-run",
        description="Run a language model that is larger than memory: what fits stays, the rest is streamed from disk.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "model_dir", type=Path, help="a Hugging Face checkpoint as downloaded, or one split by llm-sepweight"
    )
    shared.add_argument(
        "--memory", metavar="SIZE", help="what the whole process may use, like 4GiB (default: 90%% of what is free)"
    )
    shared.add_argument(
        "--context", type=int, metavar="N", help="most tokens of prompt and answer (default: what they need)"
    )
    shared.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="most tokens that one pass over the weights computes (default: 128). Where reading a layer takes longer than computing "
        "128 tokens with it, more make long prompts faster; a layer is then held in memory as a whole",
    )
    shared.add_argument("--dtype", choices=DTYPES, help="to compute in (default: the one most weights are stored in)")
    shared.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    shared.add_argument(
        "--device-memory", metavar="SIZE", help="what may be used there (default: 90%% of what is free)"
    )
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")

    command = commands.add_parser("plan", parents=[shared], help="show where every byte would go; loads nothing")
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "generate", parents=[shared], help="continue a prompt; tokens appear as they are sampled"
    )
    command.add_argument("--prompt", required=True, help="the text to continue; - reads it from stdin")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest")
    command.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest that have P of the mass")
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.set_defaults(run=_generate)
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    family, config = _family(arguments.model_dir)
    with _sibling("llm_sepweight").open(arguments.model_dir, layout=family.layout) as weights:
        decided = plan(
            family.parts(config),
            weights,
            **_budget(arguments, 2048 if arguments.context is None else arguments.context),
        )
    print(json.dumps(decided.as_dict()) if arguments.json else decided)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    sampler = _sibling("llm_sampler")
    family, config = _family(arguments.model_dir)
    tokenizer = _tokenizer(arguments.model_dir)
    try:
        text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        text.encode()
    except UnicodeError as error:
        raise ValueError(f"the prompt is no UTF-8 ({error}): convert it") from error
    prompt = tokenizer.encode(text).ids
    if not prompt:
        raise ValueError("the prompt is empty: give --prompt at least one token")
    with _sibling("llm_sepweight").open(arguments.model_dir, layout=family.layout) as weights:
        settings = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "seed": arguments.seed,
            "stop_ids": _stop_ids(arguments.model_dir, config),
            "vocab_size": config.vocab_size,
        }
        sampler.sample(
            _nothing_loaded, [prompt], **settings
        )  # refuses what is wrong; runs nothing before its first step
        needed = len(prompt) + arguments.max_new_tokens
        context = needed if arguments.context is None else arguments.context
        if context < needed:
            raise ValueError(
                f"--context {context} is less than the prompt's {len(prompt)} tokens and --max-new-tokens "
                f"{arguments.max_new_tokens} together"
            )
        longest = getattr(config, "longest_context", None)
        if longest is not None and needed - 1 > longest:  # the last new token is not computed with
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and --max-new-tokens {arguments.max_new_tokens} together are more than the "
                f"{longest + 1} up to which this model is supported, by its config.json: give fewer of either"
            )
        budget = _budget(arguments, context)
        start = time.perf_counter()
        with Bar() as progress, PartialRun(family.parts(config), weights, **budget, progress=progress) as run:
            loaded = time.perf_counter()
            progress.passes = -(-len(prompt) // run.plan.tokens)
            print(run.plan, file=sys.stderr)
            steps = sampler.sample(run.forward, [prompt], **settings)
            times: list[float] = []
            pieces: list[str] = []
            for piece in sampler.stream_text(_clocked(steps, times, progress), tokenizer.decode):
                pieces.append(piece)
                if not arguments.json:
                    print(piece, end="", flush=True)
            facts = _facts(run, prompt, times, start, loaded)
    if arguments.json:
        print(json.dumps({"prompt": text, "text": "".join(pieces)} | facts))
    else:
        print()
        print(
            f"{facts['new_tokens']} tokens, first after {facts['seconds_to_first_token']:.2f} s, "
            f"then {facts['seconds_per_token']:.3f} s each; loading took {facts['seconds_loading']:.2f} s; "
            f"{format_bytes(facts['bytes_read'])} read; of {facts['seconds_total']:.2f} s {facts['seconds_computing']:.2f} computing, "
            f"{facts['seconds_waiting']:.2f} waiting for the disk; peak memory {format_bytes(facts['peak_memory'])}",
            file=sys.stderr,
        )
    return 0


def _nothing_loaded(_: Any) -> Any:
    raise RuntimeError("a token was asked for before anything was loaded")


def _facts(run: PartialRun, prompt: list[int], times: list[float], start: float, loaded: float) -> dict[str, Any]:
    stats = run.stats
    later = [b - a for a, b in itertools.pairwise(times)]
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": len(times),
        "seconds_loading": loaded - start,
        "seconds_to_first_token": times[0] - loaded if times else 0.0,
        "seconds_per_token": sorted(later)[len(later) // 2] if later else 0.0,
        "passes": stats.passes,
        "bytes_read": stats.bytes_read,
        "seconds_total": stats.seconds_total,
        "seconds_computing": stats.seconds_computing,
        "seconds_waiting": stats.seconds_waiting,
        "peak_memory": peak_resident_set(),
        "plan": run.plan.as_dict(),
    }


def _family(model_dir: Path) -> tuple[Any, Any]:
    """The package that runs what config.json describes, and its config."""
    path = model_dir / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the directory of a checkpoint, as downloaded or split")
    try:
        said = json.loads(path.read_text("utf-8"))
        model_type = said["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no model's config ({type(error).__name__}: {error}): download it again") from error
    found = {entry.name: entry for entry in entry_points(group=FAMILIES)}
    if not isinstance(model_type, str) or model_type not in found:
        package = (
            "the package of its family, if there is one" if found else "llm_llama_model, or another family's package"
        )
        raise ValueError(
            f"{path}: no installed package runs the model_type {model_type!r}; those here run {', '.join(sorted(found)) or 'none'}. "
            f"Install {package}, or run it with transformers under llm_partial_run.offload"
        )
    family = found[model_type].load()
    try:
        return family, family.Config.from_hf(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sibling(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this command needs {error.name or name}: pip install 'llm_partial_run[cli]'") from error


def _tokenizer(model_dir: Path) -> Any:
    path = model_dir / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: a prompt needs the model's own tokenizer; download it beside the config"
        )
    tokenizers = _sibling("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} is no tokenizer ({error}): download it again") from error
    tokenizer.no_truncation()  # some files ask for them, for training
    tokenizer.no_padding()
    return tokenizer


def _stop_ids(model_dir: Path, config: Any) -> tuple[int, ...]:
    """The end-of-text ids: generation_config.json's, which chat models extend, and the config's."""
    path = model_dir / "generation_config.json"
    try:
        listed = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again, or delete it") from error
    more = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(each) is int and 0 <= each < config.vocab_size for each in more):
        raise ValueError(
            f"{path}: eos_token_id has to be an id below {config.vocab_size}, a list of them or null, and is {listed!r}: "
            "download it again, or delete it"
        )
    return tuple(dict.fromkeys([*more, *config.eos_ids]))


def _budget(arguments: argparse.Namespace, context: int) -> dict[str, Any]:
    return {
        "memory": arguments.memory,
        "context": context,
        "tokens": arguments.tokens,
        "dtype": DTYPES.get(arguments.dtype),
        "device": arguments.device,
        "device_memory": arguments.device_memory,
    }


class Bar:
    """A progress bar on a terminal, for what takes longer than two seconds until the first token is there."""

    def __init__(self) -> None:
        self.passes = 1  # that the prompt takes
        self._begun = 0
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._what == "done":
            return
        if what == "pass":
            self._begun += done == 0
            done, total = done + (self._begun - 1) * total, total * self.passes
        if what != self._what:
            self.close()
            unit = {"unit": "B", "unit_scale": True} if what == "loading" else {"unit": "part"}
            description = "loading" if what == "loading" else "reading the prompt"
            self._bar = _sibling("tqdm").tqdm(desc=description, total=total, delay=2, disable=None, leave=False, **unit)
            self._what = what
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar; later calls show nothing."""
        if self._bar is not None:
            self._bar.close()
        self._what = "done" if self._what == "pass" else ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _clocked(steps: Iterator[Any], times: list[float], progress: Bar) -> Iterator[Any]:
    """The steps as they come; when they came goes into `times`, and the first ends the bar."""
    for step in steps:
        progress.close()
        times.append(time.perf_counter())
        yield step


if __name__ == "__main__":
    sys.exit(main())
