"""Weights by part: what there is, and how it gets into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch

from llm_sepweight._catalog import Catalog, Entry, TensorInfo
from llm_sepweight._checkpoint import Layout, read_checkpoint
from llm_sepweight._errors import WeightError
from llm_sepweight._manifest import MANIFEST, Manifest, read_directory
from llm_sepweight._placing import RowGroup, in_place, place, row_groups
from llm_sepweight._reader import THREADS, Reader
from llm_sepweight._reading import PAGE, as_tensor, page_aligned, pages, whole_pages
from llm_sepweight._states import states
from llm_sepweight._writing import unfinished


def open(path: str | Path, layout: Layout | None = None, *, verify: str | None = None) -> WeightStore:
    """The weights in a directory: one that `split` wrote, or a Hugging Face checkpoint as downloaded, with a layout.

    Files of the form begin.pth, mid.00000.pth, ..., end.pth need no layout; one that is given gets keys such as
    "mid.00000." and the name in the file.

    layout(key, config) says for each tensor of a checkpoint where it belongs, as a list of (part, name) or, where it
    is row `index` of a larger tensor, (part, name, index). An empty list drops it.
    Only headers and file sizes are read, and whatever is wrong with them is raised as WeightError now.
    verify="lazy" also checks the contents of each file of a split model against its checksum, the first time that
    something is read from it: `load` on the way, `read` and `rows` by reading the whole file, from which the rows are taken.

    >>> import tempfile, safetensors.torch
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     safetensors.torch.save_file({"head": torch.ones(2, 3)}, f"{directory}/model.safetensors")
    ...     with open(directory, layout=lambda key, config: [("end", f"{key}.weight")]) as weights:
    ...         print(weights.parts, weights.nbytes("end"), weights.load("end")["head.weight"].sum())
    ('end',) 24 tensor(6.)
    """
    if verify not in (None, "lazy"):
        raise ValueError(f"verify: None or 'lazy', not {verify!r}")
    directory = Path(path)
    if not directory.is_dir():
        raise WeightError("there is no such directory", file=directory, remedy="Check the path.")
    before = states(directory)
    if (directory / MANIFEST).exists():
        manifest, catalog = read_directory(directory)
        return WeightStore(directory, catalog, manifest, checked=verify == "lazy", states=before)
    if unfinished(directory):
        problem = "a split, fetch or export to this directory is not finished"
        raise WeightError(problem, file=directory, remedy="Run it again, as it was.")
    if verify is not None:
        raise WeightError("a checkpoint has no checksums to verify", file=directory, remedy="Split it first.")
    return WeightStore(directory, read_checkpoint(directory, layout), states=before)


class WeightStore:
    """Weights by part. Made by `open`; all methods but `close` may be called by several threads at once."""

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        manifest: Manifest | None = None,
        *,
        checked: bool = False,
        states: Mapping[str, list[int]],
    ) -> None:
        self.path = path
        self.manifest = manifest  # None: a checkpoint
        self.catalog = catalog
        self.config: dict[str, Any] = catalog.config
        self.parts: tuple[str, ...] = tuple(catalog.parts)
        self._entries = catalog.parts
        infos = () if manifest is None else manifest.parts.values()
        checksums = {str(path / info.file): info.checksum for info in infos}
        self._states = {file: states[file] for file in catalog.file_sizes if file in states}
        self._reader = Reader(path, catalog.file_sizes, self._states, checksums if checked else {})
        self._unchecked = {} if checked else checksums

    def tensors(self, part: str) -> Mapping[str, TensorInfo]:
        """Name, dtype, shape and bytes of the tensors of a part; names are as in the part's state_dict."""
        return MappingProxyType({name: entry.info for name, entry in self._part(part).items()})

    def nbytes(self, part: str) -> int:
        """Bytes of all tensors of a part."""
        return sum(entry.info.nbytes for entry in self._part(part).values())

    def buffer_nbytes(self, part: str) -> int:
        """Bytes of page-aligned memory that `load(part, into=...)` needs: a few pages more than `nbytes(part)`."""
        return place(self._part(part)).nbytes

    def load(self, part: str, into: Any = None) -> dict[str, torch.Tensor]:
        """All tensors of a part, read with several large reads in flight.

        into: memory that is filled and that the tensors are views of: a writable buffer or uint8 tensor with
        `buffer_nbytes(part)` bytes from a page boundary on. Without it, memory is allocated that lives as long as a
        tensor of the part does. A tensor's address modulo 4096 is that of its data in the file.
        Raises WeightError where a read fails; no read is under way any more then.
        """
        entries = self._part(part)
        placement = place(entries)
        memory = pages(placement.nbytes) if into is None else page_aligned(into, placement.nbytes)
        self._reader.load(part, entries, placement, memory)
        return {
            name: as_tensor(memory, placement.starts[name], entry.info.dtype, entry.info.shape)
            for name, entry in entries.items()
        }

    def read(self, part: str, name: str, start: int, stop: int, into: Any) -> torch.Tensor:
        """Rows [start, stop) along the first dimension of a tensor, read by this thread; a view of `into`.

        into: page-aligned writable memory of at least 8192 bytes more than the rows take.
        The address of the view modulo 4096 depends only on where the rows are in the file.
        """
        entry = self._tensor(part, name)
        info = entry.info
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            problem = f"there are no rows {start}:{stop} in shape {info.shape}"
            raise WeightError(problem, part=part, tensor=name)
        row_nbytes = info.nbytes // max(info.shape[0], 1)
        first, nbytes = start * row_nbytes, (stop - start) * row_nbytes
        shape = (stop - start, *info.shape[1:])
        if nbytes == 0:
            return torch.empty(shape, dtype=info.dtype)
        if not in_place(entry):
            at = first % PAGE
            memory = page_aligned(into, at + nbytes)
            self._reader.copy(part, name, entry, first, memory[at : at + nbytes])
        else:
            extent = entry.extents[0]
            at = (extent.offset + first) % PAGE
            memory = page_aligned(into, whole_pages(at + nbytes))
            self._reader.fetch(part, name, extent.file, extent.offset + first - at, at + nbytes, memory)
        return as_tensor(memory, at, info.dtype, shape)

    def rows(self, part: str, name: str, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Single rows of a tensor, [len(ids), ...], in any order, also repeatedly; each is read once."""
        entry = self._tensor(part, name)
        info = entry.info
        wanted = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        count = info.shape[0] if info.shape else 0
        if wanted.dim() != 1:
            raise WeightError(
                f"ids must be a list of row numbers, not {wanted.dim()}-dimensional", part=part, tensor=name
            )
        for row in (int(wanted.min()), int(wanted.max())) if len(wanted) else ():
            if not 0 <= row < count:
                raise WeightError(f"there is no row {row} in shape {info.shape}", part=part, tensor=name)
        row_nbytes = info.nbytes // max(count, 1)
        if row_nbytes == 0 or len(wanted) == 0:
            return torch.empty((len(wanted), *info.shape[1:]), dtype=info.dtype)
        unique, where = torch.unique(wanted, return_inverse=True)
        out = torch.empty((len(unique), row_nbytes), dtype=torch.uint8)
        groups = row_groups(unique.numpy(), row_nbytes)
        self._reader.run(
            [
                partial(self._row_groups, part, name, entry, groups[i::THREADS], out.numpy())
                for i in range(min(THREADS, len(groups)))
            ]
        )
        found = out.view(info.dtype).reshape(len(unique), *info.shape[1:])
        return found if torch.equal(unique, wanted) else found[where]

    def close(self) -> None:
        """Close all files and end all threads, once reads under way have ended. Tensors stay valid."""
        self._reader.close()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _part(self, part: str) -> dict[str, Entry]:
        if part not in self._entries:
            raise WeightError(f"there is no part {part!r}; there are {self._beside(part)}", file=self.path)
        return self._entries[part]

    def _beside(self, part: str) -> str:
        """Where a part is looked for and is not: the others of its layer, or the layers. A few of them, if many."""
        layer = part.rpartition("/")[0]
        names = [name for name in self.parts if name.rpartition("/")[0] == layer]
        names = names or [name for name in self.parts if "/" not in name]
        shown = names if len(names) <= 8 else [*names[:2], f"{len(names) - 4} others", *names[-2:]]
        return ", ".join(shown)

    def _tensor(self, part: str, name: str) -> Entry:
        entries = self._part(part)
        if name not in entries:
            raise WeightError(f"there is no tensor {name!r}; there are {', '.join(entries)}", file=self.path, part=part)
        return entries[name]

    def _row_groups(self, part: str, name: str, entry: Entry, groups: list[RowGroup], out: np.ndarray) -> None:
        for start, ids in groups:
            span = np.empty((ids[-1] - ids[0] + 1, out.shape[1]), dtype=np.uint8)
            self._reader.copy(part, name, entry, int(ids[0]) * out.shape[1], span.data.cast("B"))
            out[start : start + len(ids)] = span[ids - ids[0]]
