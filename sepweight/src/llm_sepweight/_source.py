"""Where a split takes its tensors from: a checkpoint or split model on disk; others can be written to the same form."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_sepweight._catalog import JSON_LIMIT, Entry, inside, read_limited
from llm_sepweight._checksum import checksum
from llm_sepweight._errors import WeightError
from llm_sepweight._lazy import LazyChecks
from llm_sepweight._manifest import MANIFEST
from llm_sepweight._states import sample, states
from llm_sepweight._store import WeightStore
from llm_sepweight._writing import remove

SMALL = (  # what configurations, tokenizers, chat templates and a model's own code end in
    ".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".codes", ".tokenizer", ".py",
)  # fmt: skip
LICENSES = ("LICENSE", "NOTICE", "USE_POLICY")


def travels_along(name: str) -> bool:
    """Whether this is one of the small files that belong to a model, which no index of weights is.

    >>> [name for name in ("tekken.json", "model.safetensors.index.json", "x/vocab.txt", ".cache.json") if travels_along(name)]
    ['tekken.json']
    """
    if "/" in name or name.startswith(".") or name == MANIFEST or name.endswith(".index.json"):
        return False
    return name.endswith(SMALL) or name.startswith(LICENSES)


class Source(Protocol):
    """Tensors by part, from anywhere."""

    name: str  # stands in the manifest
    model: str  # the same
    config: dict[str, Any]
    parts: Mapping[str, Mapping[str, Entry]]  # in the order of the model

    def copy(self, part: str, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `start` on; called by several threads."""
        ...

    def fingerprint(self) -> dict[str, Any] | None:
        """JSON that is the same as long as the source is, by file: a split goes on only from what it began with.

        None where this cannot be told: a split then begins anew.
        """
        ...

    def check_unchanged(self) -> None:
        """Raises WeightError where the source is not what it was when it was opened."""
        ...

    def companions(self) -> dict[str, bytes]:
        """The small files that belong to the model."""
        ...


class StoreSource:
    """What a store holds, on disk. Of a split model each file is checked before anything of it is given."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.name = store.path.resolve().name if store.manifest is None else store.manifest.source
        self.model = "" if store.manifest is None else store.manifest.model
        self.config = store.config
        self.parts: Mapping[str, Mapping[str, Entry]] = {part: store._part(part) for part in store.parts}
        self._found = dict(store._states)
        self.check_unchanged()
        self._checks = LazyChecks(store._unchecked)
        self._checking = threading.Lock()  # one file at a time, for the memory that it takes

    def copy(self, part: str, name: str, start: int, out: memoryview) -> None:
        entry = self.parts[part][name]
        for file in {extent.file for extent in entry.extents}:
            if self._checks.pending(file):
                with self._checking:
                    self.store._reader.check(part, file, self._checks)
        self.store._reader.copy(part, name, entry, start, out)

    def fingerprint(self) -> dict[str, Any] | None:
        headers: dict[str, int] = {}  # bytes before the first tensor
        for entries in self.parts.values():
            for extent in (extent for entry in entries.values() for extent in entry.extents):
                name = Path(extent.file).name
                headers[name] = min(headers.get(name, extent.offset), extent.offset)
        return {
            Path(file).name: {"state": found, "sample": sample(Path(file), headers.get(Path(file).name, 0))}
            for file, found in self._found.items()
        }

    def check_unchanged(self) -> None:
        now = states(self.store.path)
        for file, found in self._found.items():
            if now.get(file) != found:
                remedy = "Nothing of it was used; split again from a source that stays as it is."
                raise WeightError("the source was changed meanwhile", file=file, remedy=remedy)

    def release(self, file: str) -> None:
        """Remove a file of the source."""
        self.store._reader.files[file].close()
        if Path(file).exists():
            remove(Path(file))
        self._found.pop(file, None)

    def companions(self) -> dict[str, bytes]:
        return {name: self.companion(name) for name in self.companion_names()}

    def companion(self, name: str) -> bytes:
        """One of the small files; that of a split model is checked, too."""
        file = self.store.path / name
        data = read_limited(inside(file))
        if self.store.manifest is not None and checksum(data) != self.store.manifest.files[name].checksum:
            problem = "the contents are damaged: the checksum is not that of the manifest"
            raise WeightError(problem, file=file, remedy="Repair it with verify, or fetch the file again.")
        return data

    def companion_names(self) -> list[str]:
        if self.store.manifest is not None:
            return sorted(self.store.manifest.files)
        found = (path for path in self.store.path.iterdir() if travels_along(path.name) and path.is_file())
        return sorted(path.name for path in found if path.stat().st_size <= JSON_LIMIT)
