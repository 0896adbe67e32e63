"""What tells whether a file is still the one that it was, without reading all of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_sepweight._checksum import Checksum
from llm_sepweight._errors import WeightError

PAGE = 4096
SAMPLES = 64  # pages of a file


def state(path: Path) -> list[int]:
    """Size, time of the last change of the contents and of anything, inode: no writer can set all of these back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def states(directory: Path) -> dict[str, list[int]]:
    """Those of the files in a directory, by path."""
    try:
        paths = list(directory.iterdir())
    except OSError as error:
        raise WeightError(f"the directory cannot be read: {error.strerror}", file=directory) from error
    found: dict[str, list[int]] = {}
    for path in paths:
        with suppress(OSError):  # what has gone, or is a link to nowhere; who needs it will say so
            found[str(path)] = state(path)
    return found


def sample(path: Path, header_nbytes: int) -> str:
    """Checksum of a file's size, of what is before its tensors, and of pages that are spread over all of it.

    Another model's file has another one, and a copy of the file the same, whatever times it bears.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = Checksum()
            found.update(size.to_bytes(8, "little"))
            found.update(os.pread(file.fileno(), header_nbytes, 0))
            last = max(size - PAGE, 0)
            for offset in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                found.update(os.pread(file.fileno(), PAGE, offset))
    except OSError as error:
        raise WeightError(f"the file cannot be read: {error.strerror}", file=path) from error
    return found.text


def same(before: dict[str, Any] | None, now: dict[str, Any] | None, *, put_back: bool) -> bool:
    """Whether two fingerprints, each of a state and a sample, are of one file.

    put_back: it may be another copy, as from a backup, which has other times and another inode.
    When anything of it last changed counts for nothing: another link, or mode, changes that, too.
    """
    if before is None or now is None:
        return before is now
    (*was, _, inode_was), (*is_now, _, inode) = before["state"], now["state"]
    return before["sample"] == now["sample"] and (put_back or (was, inode_was) == (is_now, inode))
