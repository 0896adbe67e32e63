"""Part specs: `b 0:16`, `16:32 e`, `f`."""

from __future__ import annotations

import re
from collections.abc import Sequence


def chosen(spec: str, parts: Sequence[str]) -> list[str]:
    """Those of `parts` that a spec names, in their order; parts of a part come with it.

    `b` is begin, `16:32` layers 16 to 31, `e` end, `f` everything; several are separated by spaces.
    Raises ValueError naming the character at which a spec goes wrong, or the part that is not there.

    >>> chosen("b 1:2", ["begin", "mid.00000", "mid.00001", "end"])
    ['begin', 'mid.00001']
    """
    wanted: set[str] = set()
    for item in re.finditer(r"\S+", spec):
        names = _names(spec, item, parts)
        if absent := sorted(names - set(parts)):
            raise ValueError(
                f"part spec {spec!r}: there is no {absent[0]}; the parts go from {parts[0]} to {parts[-1]}"
            )
        wanted |= names
    if not wanted:
        raise ValueError(f"part spec {spec!r} names nothing; 'f' is everything")
    return [part for part in parts if part.split("/")[0] in wanted]


def _names(spec: str, item: re.Match[str], parts: Sequence[str]) -> set[str]:
    word = item.group()
    if word == "f":
        return {part.split("/")[0] for part in parts}
    if word in ("b", "e"):
        return {"begin" if word == "b" else "end"}
    if match := re.fullmatch(r"([0-9]{1,5})[:-]([0-9]{1,5})", word):  # 16-32 is the older spelling
        start, stop = int(match[1]), int(match[2])
        if start >= stop:
            raise ValueError(f"part spec {spec!r}: {word} holds no layer; in start:stop, stop is not included")
        return {f"mid.{layer:05d}" for layer in range(start, stop)}
    understood = re.match(r"([0-9]{1,5}([:-][0-9]{0,5})?)?", word)
    bad = item.start() + (understood.end() if understood else 0)
    found = f"{spec[bad]!r} at character {bad + 1}" if bad < item.end() else f"the end of {word!r}"
    raise ValueError(f"part spec {spec!r}: {found} is not understood; write b, e, f or a range such as 0:16")
