"""Parts of a model by name, and the part specs ("b 0:16", "16:32 e", "f") that choose among them."""

from __future__ import annotations

import re

import torch
from torch import nn

from ._config import Config
from ._model import Begin, End, Layer


def parts(config: Config, spec: str = "f") -> dict[str, nn.Module]:
    """The modules that `spec` names, on the meta device, in the order in which a forward pass runs them.

    spec: `b` is begin, `16:32` layers 16 to 31, `e` end, `f` the full model; several are separated by spaces.
    Raises ValueError naming the character at which a spec goes wrong, or the layer that the model does not have.

    >>> config = Config.from_hf(dict(model_type="bloom", vocab_size=96, hidden_size=32,
    ...                              n_layer=4, n_head=4))
    >>> list(parts(config, "2:4 e"))
    ['mid.00002', 'mid.00003', 'end']
    """
    names = _names(spec, config.num_hidden_layers)
    with torch.device("meta"):
        return {name: _build(config, name) for name in names}


def _build(config: Config, name: str) -> nn.Module:
    if name == "begin":
        return Begin(config)
    return End(config) if name == "end" else Layer(config, int(name.removeprefix("mid.")))


def _names(spec: str, num_hidden_layers: int) -> list[str]:
    layers = [f"mid.{layer:05d}" for layer in range(num_hidden_layers)]
    full = ["begin", *layers, "end"]
    chosen: set[str] = set()
    for item in re.finditer(r"\S+", spec):
        word = item.group()
        if word in ("b", "e", "f"):
            names = {"b": full[:1], "e": full[-1:], "f": full}[word]
        else:
            start, stop = _range(spec, word, item.start())
            if stop > num_hidden_layers:
                raise ValueError(f"part spec {spec!r}: {word} goes beyond the {num_hidden_layers} layers of the model")
            names = layers[start:stop]
        if twice := chosen.intersection(names):
            raise ValueError(f"part spec {spec!r}: {word} names {min(twice)} a second time")
        chosen.update(names)
    if not chosen:
        raise ValueError(f"part spec {spec!r} names nothing; 'f' is the full model")
    return [name for name in full if name in chosen]


def _range(spec: str, word: str, at: int) -> tuple[int, int]:
    """The layers of `16:32`, or of `16-32` as it was once spelled; `word` stands at index `at` of `spec`."""
    if whole := re.fullmatch(r"([0-9]+)[:-]([0-9]+)", word):
        start, stop = int(whole[1]), int(whole[2])
        if start >= stop:
            raise ValueError(f"part spec {spec!r}: {word} holds no layer; in start:stop, stop is not included")
        return start, stop
    good = re.match(r"([0-9]+([:-][0-9]*)?)?", word)
    bad = at + (good.end() if good else 0)
    found = f"{spec[bad]!r} at character {bad + 1}" if bad < at + len(word) else f"the end of {word!r}"
    raise ValueError(f"part spec {spec!r}: {found} is not understood; write b, e, f or a range such as 0:16")
