"""What a pass is given, held against the model and the plan: what is wrong is named before anything is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._memory import format_bytes
from ._plan import Plan
from ._units import Model


def check_ids(input_ids: Tensor, vocab_size: int | None) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(
            f"input_ids have to be integers [rows, tokens], at least one; got {input_ids.dtype} {list(input_ids.shape)}"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if vocab_size is not None and (low < 0 or high >= vocab_size):
        raise ValueError(
            f"input_ids have the id {low if low < 0 else high}; the vocabulary has 0 to {vocab_size - 1}. "
            "Is this the model's own tokenizer?"
        )


def check_hidden_states(x: Tensor) -> None:
    if x.dim() != 3 or not x.is_floating_point() or not x.numel():
        raise ValueError(
            f"x has to be hidden states [rows, tokens, width], as the parts have no begin; got {x.dtype} {list(x.shape)}"
        )


def check_shapes(x: Tensor, positions: Tensor | None, slots: Tensor | None, mask: Tensor | None) -> None:
    for name, given, dims in (("positions", positions, 2), ("slots", slots, 2), ("mask", mask, 3)):
        if given is not None and (given.dim() != dims or given.shape[:2] != x.shape[:2]):
            wanted = [*x.shape[:2], *["slots in use"] * (dims - 2)]
            raise ValueError(f"{name}= has the shape {list(given.shape)}, and has to have {wanted}")
        if given is not None and (given.is_floating_point() or (given.dtype == torch.bool) != (name == "mask")):
            kind = "True where a position is seen" if name == "mask" else "integers"
            raise ValueError(f"{name}= has to be {kind}, and is {given.dtype}")


def check_length(plan: Plan, rows: int, length: int, at_once: bool) -> None:
    """Refuse more tokens than the plan is for; `at_once` where a row cannot go through a layer in chunks."""
    if rows * length > plan.tokens:
        raise ValueError(
            f"{rows} rows of {length} tokens are more than the {plan.tokens} that a pass is planned for: "
            "pass fewer at a time, or give PartialRun a larger tokens="
        )
    if at_once and length > plan.micro_batch:
        raise ValueError(
            f"a row of {length} tokens without a cache, or with a mask, goes through a layer at once, and {plan.micro_batch} "
            "are planned for: give caches (new_caches), or PartialRun a larger micro_batch="
        )


def check_labels(plan: Plan, model: Model, labels: object) -> None:
    """Refuse a loss of more tokens than the plan has memory for: transformers takes all their logits in fp32, twice."""
    if not isinstance(labels, Tensor) or plan.device_memory:
        return
    per_logit = 2 * 4 + (plan.dtype.itemsize if plan.dtype != torch.float32 else 0)
    nbytes = labels.numel() * model.vocab_size * per_logit
    room = plan.memory - plan.used + plan.activations
    if nbytes > room:
        raise ValueError(
            f"labels= of {labels.numel()} tokens: the logits that their loss is computed from take {format_bytes(nbytes)}, more "
            f"than the {format_bytes(room)} that the plan leaves: give fewer tokens in a call, or offload a larger context= and tokens="
        )


def check_experts(module: nn.Module) -> None:
    """Refuse the way of transformers that gathers the matrices of an expert for each token that is sent to it."""
    for child in module.modules():
        how = getattr(vars(child).get("config"), "_experts_implementation", None)
        if how == "batched_mm" and any(tensor.dim() > 2 for tensor in child.parameters(recurse=False)):
            raise ValueError(
                f"{type(child).__name__} has experts_implementation={how!r}, which copies an expert's matrices for each token "
                "that is sent to it, and no plan has memory for that: choose 'grouped_mm' or 'eager', "
                "as model.set_experts_implementation('grouped_mm') does"
            )


def check_logits(plan: Plan, model: Model, positions: int, at_once: int) -> None:
    """Refuse more logits than the plan has memory for: of those computed at once, and of all where that takes several turns.

    Those of a turn are there by slices, put together, and picked by row; their hidden states thrice, and twice in fp32.
    """
    size, beside = plan.dtype.itemsize, 0 if positions == at_once else positions
    nbytes = (3 * at_once + beside) * model.vocab_size * size + at_once * model.hidden_size * (3 * size + 2 * 4)
    room = plan.memory - plan.used + plan.activations
    if positions > plan.rows and nbytes > room:
        raise ValueError(
            f"logits of {positions} positions take {format_bytes(nbytes)}, more than the {format_bytes(room)} that the "
            "plan leaves: ask for fewer at a time"
        )
