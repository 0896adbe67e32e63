"""Checking the files of a split model the first time that something is read from them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import closing

from llm_sepweight._copying import checksums, of_file
from llm_sepweight._errors import WeightError
from llm_sepweight._reading import WeightFile


class LazyChecks:
    """Which files were not checked yet, and what their checksums must be."""

    def __init__(self, expected: Mapping[str, str]) -> None:
        self._expected = dict(expected)
        self._locks = {file: threading.Lock() for file in expected}

    def pending(self, file: str) -> bool:
        return file in self._expected

    def check(self, file: WeightFile) -> None:
        """Read a whole file, unless it was checked before; other threads that need it wait."""
        if not self.pending(file.path):
            return
        with self._locks[file.path]:
            if self.pending(file.path):
                with closing(checksums([of_file(file)])) as texts:
                    self.compare(file.path, next(texts))

    def compare(self, file: str, text: str) -> None:
        """Raises WeightError where a file that was read has not the checksum that it must have."""
        if self._expected.get(file, text) != text:
            problem = "the contents are damaged: the checksum is not that of the manifest"
            raise WeightError(problem, file=file, remedy="Repair it with verify, or fetch the file again.")
        self._expected.pop(file, None)
