"""The command `llm-sepweight`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llm_sepweight import WeightStore, diff, export, fetch, filenames, open, split, verify
from llm_sepweight._families import find_layout
from llm_sepweight._header import DTYPE_NAMES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIFFERENT, WRONG, FAULT, INTERRUPTED, UNREAD = 1, 2, 70, 130, 141  # exit statuses
DESCRIPTION = """\
The weights of a language model as one file per part: begin, each layer, end.

A DIR is a split model or a Hugging Face checkpoint as downloaded. A SPEC names parts: b is begin, 16:32 are
the layers 16 to 31, e is end, f is everything; write several in quotes, as in "b 0:16"."""
EPILOG = """\
examples:
  llm-sepweight split Llama-3.1-70B-Instruct llama-70b      one file per part, checked by checksums
  llm-sepweight split MODEL MODEL --in-place                the same, with room for a few parts only
  llm-sepweight verify llama-70b                            is every byte what it was?
  llm-sepweight verify llama-70b --source /backup/llama-70b and mend what is not
  llm-sepweight fetch https://host/llama-70b "16:32" node1  what a machine needs that runs 16 layers
  llm-sepweight info llama-70b --json | jq .nbytes

exit status: 0 done; 1 damage or differences were found; 2 it cannot be done, and one line on stderr says why;
70 an error of the program itself, with its traceback; 130 interrupted; 141 nobody reads. Progress is shown on a terminal only, on stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest when it exits
        return UNREAD
    except (ValueError, OSError, ImportError) as error:
        print(f"llm-sepweight: {error}", file=sys.stderr)
        return WRONG
    except Exception:
        traceback.print_exc()
        print("llm-sepweight: this is an error of the program itself; please report it", file=sys.stderr)
        return FAULT


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="llm-sepweight", description=DESCRIPTION, epilog=EPILOG, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout")
    shared.add_argument(
        "--layout",
        metavar="PACKAGE[:FUNCTION]",
        help="says which part each tensor of a checkpoint belongs to, like llm_llama_model:layout "
        "(default: that of the installed package for the checkpoint's model_type)",
    )

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    added = command("split", _split, "write a checkpoint as one file per part; run again, it goes on where it was")
    added.add_argument("source", metavar="DIR", type=Path)
    added.add_argument("destination", metavar="DESTINATION", type=Path)
    added.add_argument("--spec", default="f", help="parts to write (default: f, everything)")
    added.add_argument("--dtype", choices=DTYPES, help="convert floating-point tensors (default: as they are)")
    added.add_argument(
        "--in-place",
        action="store_true",
        help="remove each file of the checkpoint once all its tensors are written and read back; "
        "the destination may be the same directory",
    )

    added = command("verify", _verify, "compare every byte with the checksums; name what is damaged or missing")
    added.add_argument("path", metavar="DIR", type=Path)
    added.add_argument("--source", metavar="DIR", type=Path, help="repair from this checkpoint or other copy")

    added = command(
        "fetch",
        _fetch,
        "get the files that a spec needs, from a URL or a directory; "
        "those that are there already are read, at the speed of the disk, and fetched again if their checksums are wrong",
    )
    added.add_argument("source", metavar="SOURCE", help="http(s)://..., hf://owner/name, s3://..., or a directory")
    added.add_argument("spec", metavar="SPEC")
    added.add_argument("destination", metavar="DESTINATION", type=Path)
    added.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    added.add_argument("--connections", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    added.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds without a byte (default: 30)")
    added.add_argument("--retries", type=int, default=5, metavar="N", help="tries more of a request (default: 5)")

    added = command("info", _info, "show what is in a directory: parts, tensors, bytes, dtypes")
    added.add_argument("path", metavar="DIR", type=Path)
    added.add_argument("--tensors", action="store_true", help="a line for each tensor")

    added = command("filenames", _filenames, "list the files that a spec needs, one a line")
    added.add_argument("path", metavar="DIR", type=Path)
    added.add_argument("spec", metavar="SPEC")

    added = command("diff", _diff, "tell whether two directories hold the same weights")
    added.add_argument("first", metavar="DIR", type=Path)
    added.add_argument("second", metavar="DIR", type=Path)

    added = command("export", _export, "write a split model as a checkpoint that transformers loads")
    added.add_argument("path", metavar="DIR", type=Path)
    added.add_argument("destination", metavar="DESTINATION", type=Path)
    added.add_argument("--max-shard", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    return parser


def _split(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    with Bar("splitting") as progress:
        split(
            arguments.source,
            arguments.destination,
            layout=find_layout(arguments.layout),
            spec=arguments.spec,
            dtype=DTYPES.get(arguments.dtype),
            in_place=arguments.in_place,
            progress=progress,
        )
    return _say_written(arguments, start)


def _fetch(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    with Bar("fetching") as progress:
        fetch(
            arguments.source,
            arguments.spec,
            arguments.destination,
            layout=find_layout(arguments.layout),
            headers=dict(map(_header, arguments.header)),
            connections=arguments.connections,
            timeout=arguments.timeout,
            retries=arguments.retries,
            progress=progress,
        )
    return _say_written(arguments, start)


def _say_written(arguments: argparse.Namespace, start: float) -> int:
    seconds = time.perf_counter() - start
    with open(arguments.destination) as store:
        nbytes = sum(store.catalog.file_sizes.values())
        facts = {"destination": str(store.path), "parts": list(store.parts), "nbytes": nbytes, "seconds": seconds}
    text = f"{len(facts['parts'])} parts, {_bytes(nbytes)}, in {arguments.destination}, {seconds:.1f} s"
    print(json.dumps(facts) if arguments.json else text)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with Bar("verifying") as progress:
        layout = find_layout(arguments.layout)
        found = verify(arguments.path, source=arguments.source, layout=layout, progress=progress)
    left = [damage for damage in found if not damage.repaired]
    if arguments.json:
        print(json.dumps({"path": str(arguments.path), "sound": not left, "damaged": [vars(each) for each in found]}))
    else:
        print(*found or [f"{arguments.path}: every byte is as it was written"], sep="\n")
    return DIFFERENT if left else 0


def _info(arguments: argparse.Namespace) -> int:
    with open(arguments.path, find_layout(arguments.layout)) as store:
        rows = [_row(store, part) for part in store.parts]
        facts = {
            "path": str(arguments.path),
            "format": "checkpoint" if store.manifest is None else "sepweight",
            "model_type": store.config.get("model_type"),
            "source": None if store.manifest is None else store.manifest.source,
            "tool": None if store.manifest is None else store.manifest.tool,
            "nbytes": sum(store.catalog.file_sizes.values()),
            "parts": rows,
        }
        listed = [
            (part, name, DTYPE_NAMES[info.dtype], str(list(info.shape)))
            for part in store.parts
            for name, info in store.tensors(part).items()
        ]
    if arguments.json:
        print(json.dumps(facts))
    elif arguments.tensors:
        print(_table(("part", "tensor", "dtype", "shape"), listed))
    else:
        kind = (
            "a checkpoint"
            if store.manifest is None
            else f"split by {store.manifest.tool} from {store.manifest.source!r}"
        )
        print(f"{arguments.path}: {facts['model_type'] or 'a model'}, {kind}, {_bytes(facts['nbytes'])}")
        lines = [
            (row["part"], str(len(row["tensors"])), _bytes(row["nbytes"]), " ".join(row["dtypes"])) for row in rows
        ]
        print(_table(("part", "tensors", "bytes", "dtypes"), lines))
    return 0


def _row(store: WeightStore, part: str) -> dict[str, Any]:
    tensors = store.tensors(part)
    dtypes = sorted({DTYPE_NAMES[info.dtype] for info in tensors.values()})
    described = {
        name: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "nbytes": info.nbytes}
        for name, info in tensors.items()
    }
    return {"part": part, "nbytes": store.nbytes(part), "dtypes": dtypes, "tensors": described}


def _filenames(arguments: argparse.Namespace) -> int:
    names = filenames(arguments.path, arguments.spec, layout=find_layout(arguments.layout))
    print(json.dumps({"spec": arguments.spec, "files": names}) if arguments.json else "\n".join(names))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    with Bar("comparing") as progress:
        found = diff(arguments.first, arguments.second, layout=find_layout(arguments.layout), progress=progress)
    if arguments.json:
        print(json.dumps({"same": not found, "differences": [vars(each) for each in found]}))
    else:
        print(*found or ["the weights are the same"], sep="\n")
    return DIFFERENT if found else 0


def _export(arguments: argparse.Namespace) -> int:
    with Bar("exporting") as progress:
        export(
            arguments.path,
            arguments.destination,
            layout=find_layout(arguments.layout),
            max_shard_nbytes=_nbytes(arguments.max_shard),
            progress=progress,
        )
    files = sorted(path.name for path in arguments.destination.glob("*.safetensors"))
    facts = {"destination": str(arguments.destination), "files": files}
    print(json.dumps(facts) if arguments.json else f"{', '.join(files)} in {arguments.destination}")
    return 0


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"--header {text!r}: write it as 'Name: value'")
    return name.strip(), value.strip()


def _nbytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.upper())
    if match is None:
        raise ValueError(f"--max-shard {text!r}: write a number and a unit, like 5GB or 500MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def _bytes(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *lines))


class Bar:
    """A progress bar with bytes, rate and time left; on a terminal only, and if tqdm is installed."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and sys.stderr.isatty():
            with suppress(ImportError):
                tqdm = importlib.import_module("tqdm").tqdm
                self._bar = tqdm(desc=self._what, total=total, initial=done, unit="B", unit_scale=True, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
