"""Whether two stores hold the same weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_sepweight._catalog import TensorInfo
from llm_sepweight._checkpoint import Layout
from llm_sepweight._copying import Piece, Progress, checksums
from llm_sepweight._header import DTYPE_NAMES
from llm_sepweight._store import WeightStore, open


@dataclass(frozen=True)
class Difference:
    """A tensor, or where `tensor` is None a part, that two stores do not have in common."""

    part: str
    tensor: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.part}{'' if self.tensor is None else ' ' + self.tensor}: {self.problem}"


def diff(
    first: str | Path | WeightStore,
    second: str | Path | WeightStore,
    *,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> list[Difference]:
    """What differs between two stores, each a split model or, with a layout, a checkpoint: parts, names, dtypes, shapes, bits.

    Both are read once, as far as they could be the same. progress: called with (bytes done, bytes in all).

    >>> import tempfile, safetensors.torch, torch, llm_sepweight
    >>> with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
    ...     for directory, value in ((a, 1.0), (b, 2.0)):
    ...         state = {"norm": torch.ones(2), "head": torch.full((2, 3), value)}
    ...         safetensors.torch.save_file(state, f"{directory}/model.safetensors")
    ...     print(*diff(a, b, layout=lambda key, config: [("end", key)]))
    end head: the values differ
    """
    with _opened(first, layout) as a, _opened(second, layout) as b:
        found: list[Difference] = []
        same_form: list[tuple[str, str]] = []
        for part in {**dict.fromkeys(a.parts), **dict.fromkeys(b.parts)}:
            if part not in a.parts or part not in b.parts:
                found.append(Difference(part, None, f"only in {a.path if part in a.parts else b.path}"))
                continue
            in_a, in_b = a.tensors(part), b.tensors(part)
            for name in {**in_a, **in_b}:
                if name not in in_a or name not in in_b:
                    found.append(Difference(part, name, f"only in {a.path if name in in_a else b.path}"))
                elif in_a[name] != in_b[name]:
                    found.append(Difference(part, name, f"{_form(in_a[name])} and {_form(in_b[name])}"))
                else:
                    same_form.append((part, name))
        found += _with_other_values(a, b, same_form, progress)
    return found


def _opened(source: str | Path | WeightStore, layout: Layout | None) -> AbstractContextManager[WeightStore]:
    return nullcontext(source) if isinstance(source, WeightStore) else open(source, layout)


def _form(info: TensorInfo) -> str:
    return f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"


def _with_other_values(
    a: WeightStore, b: WeightStore, tensors: list[tuple[str, str]], progress: Progress | None
) -> list[Difference]:
    total, done = 2 * sum(a.tensors(part)[name].nbytes for part, name in tensors), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    texts = []
    for store in (a, b):
        entries = ((part, name, store._part(part)[name]) for part, name in tensors)
        pieces = ([Piece(entry.info.nbytes, partial(store._reader.copy, p, name, entry))] for p, name, entry in entries)
        with closing(checksums(pieces, advance=advance)) as found:
            texts.append(list(found))
    return [
        Difference(part, name, "the values differ")
        for (part, name), in_a, in_b in zip(tensors, *texts, strict=True)
        if in_a != in_b
    ]
