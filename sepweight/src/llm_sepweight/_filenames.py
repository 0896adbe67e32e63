"""Which files a part spec needs."""

from __future__ import annotations

from pathlib import Path

from llm_sepweight._checkpoint import FORMS, Layout
from llm_sepweight._manifest import MANIFEST
from llm_sepweight._source import StoreSource
from llm_sepweight._spec import chosen
from llm_sepweight._store import open


def filenames(path: str | Path, spec: str = "f", *, layout: Layout | None = None) -> list[str]:
    """The files that a part spec needs, of a split model or, with a layout, of a checkpoint; the small ones first.

    Raises ValueError for a bad spec.

    >>> import tempfile, safetensors.torch, torch, llm_sepweight
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(1)}, f"{directory}/model.safetensors")
    ...     split = f"{directory}/split"
    ...     llm_sepweight.split(directory, split, layout=lambda key, config: [("begin" if key == "a" else "end", key)])
    ...     filenames(split, "e")
    ['sepweight.json', 'end.safetensors']
    """
    with open(path, layout) as store:
        if store.manifest is not None:
            manifest = store.manifest.select(spec)
            return [MANIFEST, *manifest.files, *(info.file for info in manifest.parts.values())]
        small = [name for name, _ in FORMS if name.endswith(".json") and (store.path / name).exists()][:1]
        files = {
            Path(extent.file).name
            for part in chosen(spec, store.parts)
            for entry in store.catalog.parts[part].values()
            for extent in entry.extents
        }
        return [*small, *StoreSource(store).companion_names(), *sorted(files)]
