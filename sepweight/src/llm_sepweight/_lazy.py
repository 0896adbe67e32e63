"""Checking the files of a split model the first time that something is read from them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from llm_sepweight._copying import Contents, Piece, checksums, of_file
from llm_sepweight._errors import WeightError
from llm_sepweight._reading import WeightFile


@dataclass(frozen=True)
class Span:
    """Bytes of a file from `offset` on, as many as `memory` has, and where they go."""

    offset: int
    memory: memoryview


class LazyChecks:
    """Which files were not checked yet, and what their checksums must be."""

    def __init__(self, expected: Mapping[str, str]) -> None:
        self._expected = dict(expected)
        self._locks = {file: threading.Lock() for file in expected}

    def pending(self, file: str) -> bool:
        return file in self._expected

    def check(self, file: WeightFile, span: Span | None = None) -> bool:
        """Read a whole file, unless it was checked before; other threads that need it wait.

        Whether this was done here, and what is in `span` was filled on the way.
        """
        if not self.pending(file.path):
            return False
        with self._locks[file.path]:
            if not self.pending(file.path):
                return False
            with closing(checksums([_filling(file, span)])) as texts:
                self.compare(file.path, next(texts))
        return True

    def compare(self, file: str, text: str) -> None:
        """Raises WeightError where a file that was read has not the checksum that it must have."""
        if self._expected.get(file, text) != text:
            problem = "the contents are damaged: the checksum is not that of the manifest"
            raise WeightError(problem, file=file, remedy="Repair it with verify, or fetch the file again.")
        self._expected.pop(file, None)


def _filling(file: WeightFile, span: Span | None) -> Contents:
    """A file's bytes, of which those in a span are also put where they go."""
    [whole] = of_file(file)
    if span is None:
        return [whole]

    def copy(start: int, out: memoryview) -> None:
        whole.copy(start, out)
        first, last = max(start, span.offset), min(start + len(out), span.offset + len(span.memory))
        if first < last:
            span.memory[first - span.offset : last - span.offset] = out[first - start : last - start]

    return [Piece(whole.nbytes, copy)]
