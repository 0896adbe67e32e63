"""Splitting in place: each file of a checkpoint is removed once all its tensors are safe elsewhere."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import Catalog, Entry, Extent, TensorInfo, decoded, encoded, whole
from llm_sepweight._checkpoint import FORMS
from llm_sepweight._copying import Piece, checksums
from llm_sepweight._errors import WeightError
from llm_sepweight._header import DTYPE_NAMES, DTYPES
from llm_sepweight._plan import PlannedPart
from llm_sepweight._source import StoreSource
from llm_sepweight._writing import remove


class Freeing:
    """Removes the files of a checkpoint, each when the last part that takes tensors from it is complete."""

    def __init__(self, source: StoreSource) -> None:
        self._source = source
        self.directory = source.store.path
        self._files = list(source.store._reader.files)
        self._takers: dict[str, set[str]] = {}
        if source.store.manifest is not None:
            raise WeightError("this is split already", file=source.store.path, remedy="Split it without in_place.")
        for file, key in source.store.catalog.unlisted.items():
            problem = "the index leaves out this tensor, which would be lost with its file"
            remedy = "Enter it in the index, or split without in_place."
            raise WeightError(problem, file=file, tensor=key, remedy=remedy)
        _check_removable(self.directory)
        self._check_copies()
        for file in map(Path, self._files):
            if file.is_symlink():
                remedy = "Split it without in_place, and remove the cache's copy."
                raise WeightError("a link cannot be freed in place", file=file, remedy=remedy)

    def _check_copies(self) -> None:
        """Raises WeightError where a tensor that goes with its file is not the one of that key that is kept."""
        reader, copies = self._source.store._reader, self._source.store.catalog.copies
        alike = [(copy, kept) for copy, kept in copies if (copy.dtype, copy.shape) == (kept.dtype, kept.shape)]
        found = ([Piece(e.nbytes, partial(reader.copy, None, e.key, whole(e)))] for pair in alike for e in pair)
        with closing(checksums(found)) as texts:
            same = {copy for copy, _ in alike if next(texts) == next(texts)}
        for copy in (copy for copy, _ in copies if copy not in same):
            problem = "the index takes this tensor from another file, and other values, which are here, would be lost"
            remedy = "Remove them from this file, or split without in_place."
            raise WeightError(problem, file=copy.file, tensor=copy.key, remedy=remedy)

    def begin(self, everything: Mapping[str, PlannedPart], written: Iterable[Path]) -> None:
        """everything: all parts of the model. One that is not written holds on to its files. written: the files to be."""
        for path in filter(Path.exists, written):
            if any(path.samefile(file) for file in self._files if Path(file).exists()):
                problem = "a part is to be written to a file that the source needs"
                raise WeightError(problem, file=path, remedy="Choose another destination.")
        taken: dict[str, set[str]] = {file: set() for file in self._files}
        for part, planned in everything.items():
            for name in planned.order:
                for extent in self._source.parts[part][name].extents:
                    taken[extent.file].add(part)
        self._takers = {file: takers or set(everything) for file, takers in taken.items()}

    def order(self, part: str) -> tuple[int, ...]:
        """Sorts parts so that files are free early: by the files that they take from, the last one first."""
        return tuple(i for i, file in reversed(list(enumerate(self._files))) if part in self._takers[file])

    def free(self, done: Collection[str]) -> None:
        """Remove the files that only these parts, which are complete, take from."""
        for file in [file for file, takers in self._takers.items() if takers.issubset(done)]:
            self._source.release(file)
            del self._takers[file]

    def finish(self, done: Collection[str]) -> None:
        """All parts are complete: the index of files that are all gone goes, too."""
        self.free(done)
        if not self._takers:
            suffix = Path(self._files[0]).suffix
            for name, _ in FORMS:
                if name.endswith(".json") and Path(name.removesuffix(".index.json")).suffix == suffix:
                    remove(self._source.store.path / name)

    def catalog(self) -> dict[str, Any]:
        """What the source held when all of it was there, for the journal."""
        return catalog_as_json(self._source.store.catalog)


def _check_removable(directory: Path) -> None:
    """Raises WeightError where no file of this directory can be removed, as far as can be told without removing one."""
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        problem = "the files of this directory cannot be removed: permission denied"
        raise WeightError(problem, file=directory, remedy="Allow it, or split without in_place.")


def catalog_as_json(catalog: Catalog) -> dict[str, Any]:
    """A catalog whose files lie in one directory, for a journal."""
    parts = {
        part: {
            name: {
                "shape": entry.info.shape,
                "keys": entry.keys,
                "stack": entry.stack,
                "extents": [[e.key, Path(e.file).name, e.offset, DTYPE_NAMES[e.dtype], e.shape] for e in entry.extents],
            }
            for name, entry in entries.items()
        }
        for part, entries in catalog.parts.items()
    }
    sizes = {Path(file).name: size for file, size in catalog.file_sizes.items()}
    return {"config": encoded(catalog.config), "parts": parts, "file_sizes": sizes}


def catalog_from_json(fields: dict[str, Any], directory: Path) -> Catalog:
    """The catalog again, for files in `directory`."""

    def entry(field: dict[str, Any]) -> Entry:
        extents = tuple(
            Extent(key, str(directory / file), offset, DTYPES[dtype], tuple(shape))
            for key, file, offset, dtype, shape in field["extents"]
        )
        nbytes = sum(extent.nbytes for extent in extents)
        info = TensorInfo(extents[0].dtype, tuple(field["shape"]), nbytes)
        return Entry(info, extents, tuple(field["keys"]), field["stack"])

    parts = {part: {name: entry(field) for name, field in names.items()} for part, names in fields["parts"].items()}
    return Catalog(
        decoded(fields["config"]), parts, {str(directory / f): size for f, size in fields["file_sizes"].items()}
    )
