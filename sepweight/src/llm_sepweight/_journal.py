"""What a split, or export, that is not finished has done: a line for what it does, one more for each part, or file.

A line is a checksum, a space and the JSON that it is of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import parse_json
from llm_sepweight._checksum import checksum
from llm_sepweight._errors import WeightError
from llm_sepweight._manifest import FileInfo
from llm_sepweight._states import same
from llm_sepweight._writing import naming, remove, write_bytes

JOURNAL, EXPORT = ".sepweight.journal", ".sepweight.export"
UNREADABLE = {
    JOURNAL: (
        "the record of an unfinished split cannot be read",
        "If that split was in place, the directory holds the only copy of parts. If not, remove it and split again.",
    ),
    EXPORT: (
        "the record of an unfinished export cannot be read",
        "Remove it, and what that export has written, which is in the split model, too; then export again.",
    ),
}


@dataclass
class Journal:
    """`plan` says what is written and from what; `done` has size and checksum of the parts that are complete.

    `nbytes`: of its file, but for a last line that was cut short. `add` is for the one that holds the directory's lock.
    """

    path: Path
    plan: dict[str, Any]
    nbytes: int
    done: dict[str, FileInfo] = field(default_factory=dict)
    file: FileIO | None = None

    @property
    def only_copy(self) -> bool:
        """Whether parts may be here and nowhere else: those of a split in place, unless it is of a copy that `dump` made."""
        return bool(self.plan.get("in_place")) and self.plan.get("fingerprint") is not None

    def remedy(self, otherwise: str) -> str:
        """What to do about an unfinished split that is in the way: `otherwise`, where nothing would be lost with it."""
        if not self.only_copy:
            return otherwise
        keep = "Do not remove the directory: it holds the only copy of parts, since that split is in place."
        return f"{keep} Finish that one, as it was begun."

    def add(self, part: str, info: FileInfo) -> None:
        """Remember, beyond a crash, that a part is complete."""
        self.done[part] = info
        with naming(self.path):
            if self.file is None:
                self.file = FileIO(self.path, "a")
                self.file.truncate(self.nbytes)
            line = _line({"part": part, **vars(info)})
            if self.file.write(line) < len(line):
                raise OSError(0, "it was cut short")
            os.fsync(self.file.fileno())
            self.nbytes += len(line)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def begin_journal(directory: Path, plan: dict[str, Any], name: str = JOURNAL) -> Journal:
    """A new one, with nothing done."""
    line = _line(plan)
    write_bytes(directory / name, line)
    return Journal(directory / name, plan, len(line))


def read_journal(directory: Path, name: str = JOURNAL) -> Journal | None:
    """That of an unfinished split, or export, if there is one. A last line that was cut short counts for nothing."""
    path = directory / name
    try:
        data = path.read_bytes()
        first, *lines, torn = data.split(b"\n")
        journal = Journal(path, _fields(first), len(data) - len(torn))
        for line in lines:
            entry = _fields(line)
            journal.done[entry["part"]] = FileInfo(entry["nbytes"], entry["checksum"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem, remedy = UNREADABLE[name]
        raise WeightError(problem, file=path, remedy=remedy) from error
    return journal


def _line(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields).encode()
    return b"%s %s\n" % (checksum(text).encode(), text)


def _fields(line: bytes) -> dict[str, Any]:
    found, _, text = line.partition(b" ")
    if found != checksum(text).encode():
        raise ValueError("the line is damaged")
    return parse_json(text)


def remove_journal(directory: Path) -> None:
    remove(directory / JOURNAL)


def check_order(journal: Journal, order: Mapping[str, Any]) -> None:
    """Raises WeightError where an unfinished split is another one."""
    if any(journal.plan.get(name) != value for name, value in order.items()):
        problem = f"there is an unfinished split of {journal.plan.get('source')!r} here, with other options or tensors"
        remedy = journal.remedy("Finish that one, or remove the directory.")
        raise WeightError(problem, file=journal.path.parent, remedy=remedy)


def check_not_needed(journal: Journal | None) -> None:
    """Raises WeightError where an unfinished split in place has parts here that are nowhere else."""
    if journal is not None and journal.only_copy:
        problem = f"there is an unfinished split of {journal.plan.get('source')!r} here"
        raise WeightError(problem, file=journal.path.parent, remedy=journal.remedy(""))


def check_fingerprint(journal: Journal, found: Mapping[str, Any] | None, freed: bool) -> None:
    """The source is the one that the unfinished split began with.

    Files that a split in place removed may be missing, or were put back: a refusal would leave parts of a model that
    nobody else has.
    """
    begun, found = journal.plan["fingerprint"] or {}, found or {}
    for name in {**begun, **found}:
        if not same(begun.get(name), found.get(name), put_back=freed) and not (freed and name not in found):
            problem = "the source has changed since the split that is unfinished here began"
            remedy = journal.remedy(f"Remove {journal.path.parent}, and split again.")
            raise WeightError(problem, file=name, remedy=remedy)
