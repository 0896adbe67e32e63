"""Which files of a split model are not what its manifest says, byte for byte."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llm_sepweight._catalog import inside, size_of
from llm_sepweight._copying import Progress, checksums, of_file
from llm_sepweight._errors import WeightError
from llm_sepweight._manifest import Manifest
from llm_sepweight._reading import WeightFile


@dataclass(frozen=True)
class Damage:
    """A file of a split model that is not what it was; `part` is whose file it is, if any."""

    file: str
    problem: str
    part: str | None = None
    repaired: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}{', repaired' if self.repaired else ''}"


def file_checksum(path: Path) -> str:
    """The checksum of a file as it is on the disk."""
    file = WeightFile(str(path), size_of(path), lambda _: None)
    with closing(file), closing(checksums([of_file(file)])) as texts:
        return next(texts)


def damages(directory: Path, manifest: Manifest, progress: Progress | None = None) -> list[Damage]:
    """All files that the manifest names and that are missing, of another size, or hold other bytes."""
    expected = {info.file: (part, info.nbytes, info.checksum) for part, info in manifest.parts.items()}
    expected |= {name: (None, info.nbytes, info.checksum) for name, info in manifest.files.items()}
    problems: dict[str, str] = {}
    sound = []
    for name, (_, nbytes, _) in expected.items():
        try:
            if (found := size_of(inside(directory / name))) != nbytes:
                raise WeightError(f"{found} bytes, where {nbytes} are expected")
            sound.append(name)
        except WeightError as error:
            problems[name] = error.problem
    total, done = sum(nbytes for _, nbytes, _ in expected.values()), 0
    done = total - sum(expected[name][1] for name in sound)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    while sound:  # again after an error, with what comes after the file that could not be read
        files = [WeightFile(str(directory / name), expected[name][1], lambda _: None) for name in sound]
        try:
            with closing(checksums(map(of_file, files), advance=advance)) as texts:
                for file, text in zip(files, texts, strict=True):
                    file.close()
                    name = sound.pop(0)
                    if text != expected[name][2]:
                        problems[name] = "the contents are damaged: the checksum is not that of the manifest"
        except WeightError as error:
            problems[sound.pop(0)] = error.problem
        finally:
            for file in files:
                file.close()
    return [Damage(name, problems[name], expected[name][0]) for name in expected if name in problems]
