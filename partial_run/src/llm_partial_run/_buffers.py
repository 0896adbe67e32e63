"""Buffers that no checkpoint has, such as a rotary embedding's frequencies: computed again where they are on meta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def computed_buffers(module: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The values of the buffers on meta that are not in the module's state_dict.

    Their owner computes them: by `_init_weights` of the innermost transformers model around it, or else by its own
    `reset_parameters`. That is done twice, over different rubbish, and believed where both agree.

    :param given: values for buffers, by name, which are taken instead.
    :raises ValueError: naming a buffer that nothing computes.
    """
    given = given or {}
    stored = module.state_dict(keep_vars=True).keys()
    wanted = {name: buffer for name, buffer in module.named_buffers() if name not in stored and buffer.is_meta}
    unknown = sorted(given.keys() - dict(module.named_buffers()).keys())
    if unknown:
        raise ValueError(f"buffers= has {unknown[0]!r}, which is no buffer of {type(module).__name__}")
    owners: dict[str, list[str]] = {}
    for name in wanted.keys() - given.keys():
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    values = {name: tensor for name, tensor in given.items() if name not in stored}
    for path, names in owners.items():
        owner = module.get_submodule(path)
        compute = _initializer(module, path)
        try:
            twice = [_computed(owner, {name: wanted[name] for name in names}, rubbish, compute) for rubbish in (0, 1)]
        except Exception as error:
            raise _not_computed(names[0], owner) from error
        for name in names:
            if not torch.equal(twice[0][name], twice[1][name]):
                raise _not_computed(name, owner)
        values |= twice[0]
    return values


def _not_computed(name: str, owner: nn.Module) -> ValueError:
    return ValueError(
        f"buffer {name} is on meta, no checkpoint has it, and {type(owner).__name__} does not compute it again: "
        "give buffers={" + repr(name) + ": its value}"
    )


def _initializer(module: nn.Module, path: str) -> Callable[[], Any]:
    owner, names = module.get_submodule(path), path.split(".")
    for depth in range(len(names), -1, -1):
        around = module.get_submodule(".".join(names[:depth]))
        initialize: Any = getattr(around, "_init_weights", None)  # transformers
        if initialize is not None:
            return lambda: initialize(owner)
    return getattr(owner, "reset_parameters", lambda: None)


def _computed(
    owner: nn.Module, wanted: Mapping[str, Tensor], rubbish: int, compute: Callable[[], Any]
) -> dict[str, Tensor]:
    buffers = {name: torch.full(like.shape, rubbish, dtype=like.dtype) for name, like in wanted.items()}
    leaves = {name.rpartition(".")[2]: name for name in wanted}
    before = {leaf: owner._buffers[leaf] for leaf in leaves}
    parameters = [(names, dict(names)) for child in owner.modules() if (names := child._parameters)]
    try:
        for names, own in parameters:  # an initializer would overwrite those that are in memory
            names.update({k: p if p is None else nn.Parameter(p.to("meta"), False) for k, p in own.items()})
        owner._buffers.update({leaf: buffers[name] for leaf, name in leaves.items()})
        with torch.no_grad():
            compute()
        return {name: tensor for leaf, name in leaves.items() if (tensor := owner._buffers[leaf]) is not None}
    finally:
        owner._buffers.update(before)
        for names, own in parameters:
            names.update(own)
