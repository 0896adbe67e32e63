"""A Hugging Face model as a forward function: only the last logits, and its own cache under it, found by content.

Rows lie right-aligned, as transformers pads for generation: the last n positions of all rows are the last n slots, what
is new to any row is computed for all of them from the same slot on, and rows that grow together share one cache that
grows in place. transformers is not imported here; the model brings it along.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor

from ._abilities import (
    WINDOWS,
    cache_class,
    cannot_be_told_of_padding,
    length_of_the_same_rope,
    other_layers,
    position_count,
    text_config,
)
from ._kept import Block, Kept
from ._tree_mask import tree_mask


def from_huggingface(
    model: Any, *, cache: bool = True, keep: int = 2, max_length: int | None = None
) -> HuggingFaceForward:
    """A `forward_func` from a causal language model of transformers (4.56 or newer, PyTorch).

    It keeps the keys and values of the last batches and finds by content what it has of each row: rows may grow,
    shrink, change places, be dropped or fan out. A beginning that several rows share is computed once. What it returns
    are the logits of the ids alone, up to rounding: the last bits depend on what was kept and which rows are beside.

    Args:
        model: such as `AutoModelForCausalLM.from_pretrained(...)`, in eval mode; where it lies, the ids are taken.
        cache: False computes all tokens each time; for models whose state cannot be wound back (Mamba and hybrids), or
            that take no keys and values.
        keep: of how many batches keys and values are kept; more for several loops that take turns.
        max_length: the longest row; by default what the model was made for.

    Raises:
        ValueError: for a model in training mode, an encoder-decoder, or one that needs cache=False.

    Example:
        >>> from_huggingface(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"))  # doctest: +SKIP
    """
    return HuggingFaceForward(model, cache=cache, keep=keep, max_length=max_length)


class HuggingFaceForward:
    """See `from_huggingface`. vocab_size: ids are below it."""

    def __init__(self, model: Any, *, cache: bool, keep: int, max_length: int | None):
        if not callable(getattr(model, "forward", None)) or not hasattr(model, "config"):
            raise TypeError(f"model is {type(model).__name__}; a model of transformers is needed, not its name")
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep is {keep!r}; it must be an integer >= 1, or cache=False given")
        config = text_config(model)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder; a causal language model is needed")
        self.model = model
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        self.max_length = position_count(model) if max_length is None else max_length
        original = length_of_the_same_rope(config)
        if original is not None:
            if max_length is not None and max_length > original:
                raise ValueError(
                    f"max_length is {max_length}, and with this model's rope, tokens after the first {original} change "
                    f"what those were: give at most {original}"
                )
            self.max_length = original if max_length is None else max_length
        self._takes = set(inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters)
        self._recurrent = bool(other_layers(model))
        self._own_positions = cannot_be_told_of_padding(model, self._takes)
        self._kept = Kept(cache_class(model, self._takes), keep) if cache else None
        self._lock = threading.RLock()  # one call at a time: it takes blocks that others have

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of every position of ids [B, T]."""
        rows, length = input_ids.shape
        return self.last_logits(input_ids, torch.full((rows,), length), length)

    @torch.no_grad()
    def last_logits(self, input_ids: Tensor, lengths: Tensor, n: int = 1) -> Tensor:
        """Logits [B, n, V] of the last n positions of each right-padded row of ids [B, T]."""
        if self.model.training:
            raise ValueError("the model is in training mode, in which dropout changes its logits: call model.eval()")
        rows = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        self._check(rows, n)
        with self._lock:
            if self._recurrent:
                return self._padded_behind(rows, n)
            parts = len(set(map(len, rows))) if self._own_positions else 1
            if self._kept is not None:
                heads = self._kept.shared_beginnings(rows)
                if heads:
                    self._passes(heads, 1, parts)
            return self._passes(rows, n, parts)

    @torch.no_grad()
    def tree_logits(self, input_ids: Tensor, parents: Tensor) -> Tensor:
        """Logits [B, N, V] of drafts that branch: node i of row b is at `parents[b, 0] + 1 + i` in its ids, and follows
        the token at `parents[b, i]`; node 0 is the last of a plain sequence. For models with rotary or learned positions.
        """
        self.check_trees()
        self._check_window(parents.shape[1] + int(parents[:, 0].max()) + 1)
        table, nodes = parents.tolist(), parents.shape[1]
        rows = [row[: own[0] + 1 + nodes] for row, own in zip(input_ids.tolist(), table, strict=True)]
        self._check(rows, nodes, spare=nodes - 1)  # nodes beside each other take no more positions
        with self._lock:
            return self._pass(rows, nodes, table)

    def check_trees(self) -> None:
        """ValueError for a model that cannot see drafts that branch, however short its rows are."""
        name = type(self.model).__name__
        if self._own_positions or "position_ids" not in self._takes or getattr(text_config(self.model), "alibi", False):
            raise ValueError(
                f"{name} takes no position_ids that count from 0, or has only a mask of its own, so it cannot see drafts "
                "that branch: draft without branches"
            )
        if kinds := other_layers(self.model):
            raise ValueError(
                f"{name} has layers of {kinds}, which cannot see drafts that branch: draft without branches"
            )

    def clear(self) -> None:
        """Let go of all keys and values."""
        with self._lock:
            if self._kept is not None:
                self._kept.clear()

    def _padded_behind(self, rows: list[list[int]], n: int) -> Tensor:
        """As `last_logits`, all anew, for a model whose state padding in front would go through."""
        width = max(map(len, rows))
        ids = [row + [0] * (width - len(row)) for row in rows]
        places = torch.tensor([range(len(row) - n, len(row)) for row in rows])  # (B, n)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._takes else {}
        if "logits_to_keep" in self._takes:
            ends, places = places.unique(return_inverse=True)
            options["logits_to_keep"] = n if all(len(row) == width for row in rows) else ends.to(self._device())
        logits = self._computed(ids, options)
        return logits[torch.arange(len(rows)).unsqueeze(1), places]

    def _passes(self, rows: list[list[int]], n: int, parts: int) -> Tensor:
        """As `last_logits`; by themselves the rows of each length, where the model cannot be told of padding."""
        lengths = sorted(set(map(len, rows)))
        if not self._own_positions or len(lengths) == 1:
            return self._pass(rows, n, parts=parts)
        order = [i for length in lengths for i, row in enumerate(rows) if len(row) == length]
        logits = torch.cat([self._pass([row for row in rows if len(row) == own], n, parts=parts) for own in lengths])
        return logits[torch.tensor(order).argsort()]

    def _pass(self, rows: list[list[int]], n: int, parents: list[list[int]] | None = None, *, parts: int = 1) -> Tensor:
        found = [self._kept.longest(row) if self._kept is not None else (0, None, 0) for row in rows]
        new = max(len(row) - min(length, len(row) - n) for row, (length, *_) in zip(rows, found, strict=True))
        known = [max(0, len(row) - new) for row in rows]
        before, width = max(known), max(map(len, rows))
        ids = [[0] * (new - len(row)) + row[-new:] for row in rows]
        device = self._device()
        options: dict[str, Any] = {}
        if any(len(row) < width for row in rows):
            pads = torch.tensor([[width - len(row)] for row in rows], device=device)  # (B, 1)
            slots = torch.arange(width, device=device)
            options["attention_mask"] = (slots >= pads).long()
            if "position_ids" in self._takes:
                options["position_ids"] = (slots[before:] - pads).clamp_(min=0)
        if parents is not None:
            mask, positions = tree_mask(rows, parents, self.model.dtype)
            options["attention_mask"] = mask[:, :, before:].to(device)
            options["position_ids"] = positions[:, before:].to(device)
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = n
        cache: Any = None
        if self._kept is not None:
            cache = self._kept.taken(rows, known, before) or self._kept.gathered(found, known, before)
            options |= {"past_key_values": cache, "use_cache": True}
        elif "use_cache" in self._takes:
            options["use_cache"] = False

        logits = self._computed(ids, options)[:, -n:]
        if self._kept is not None and cache.get_seq_length() != width:
            raise ValueError(
                f"{type(self.model).__name__} kept keys and values of {cache.get_seq_length()} tokens, not of {width}: "
                "give cache=False, which computes all tokens each time"
            )
        if self._kept is not None and not bool(
            logits.amax(-1).isnan().any()
        ):  # NaN would reach who takes these keys next
            if parents is not None:  # the nodes are no sequence: what was accepted of them is computed again
                cache.crop(-n)
                rows, width = [row[:-n] for row in rows], width - n
            if width:
                self._kept.remember(Block(cache, rows, width), parts)
        return logits

    def _computed(self, ids: list[list[int]], options: dict[str, Any]) -> Tensor:
        logits = getattr(self.model(input_ids=torch.tensor(ids, device=self._device()), **options), "logits", None)
        if logits is None:
            raise ValueError(f"{type(self.model).__name__} returns no logits; load it with AutoModelForCausalLM")
        return logits

    def _device(self) -> torch.device:
        return self.model.device if self.model.device.type != "meta" else torch.device("cpu")

    def _check_window(self, length: int) -> None:
        config = text_config(self.model)
        windows = {window: getattr(config, window, None) for window in WINDOWS}
        if not getattr(config, "use_sliding_window", True):
            del windows["sliding_window"]
        window = min((size for size in windows.values() if size is not None), default=length)
        if length > window:  # the mask of a tree takes the place of the model's own
            raise ValueError(f"rows of {length} tokens are longer than the window of {window}: draft without branches")

    def _check(self, rows: list[list[int]], n: int, *, spare: int = 0) -> None:
        for index, row in enumerate(rows):
            if not 1 <= n <= len(row):
                raise ValueError(f"row {index} has {len(row)} tokens, and logits of its last {n} are asked for")
            if self.max_length is not None and len(row) - spare > self.max_length:
                raise ValueError(
                    f"row {index} has {len(row)} tokens, and the model takes {self.max_length}: shorten it, or give "
                    "from_huggingface a larger max_length if the model can do it"
                )
            if self.vocab_size is not None and not 0 <= min(row) <= max(row) < self.vocab_size:
                place, token = next((p, t) for p, t in enumerate(row) if not 0 <= t < self.vocab_size)
                raise ValueError(
                    f"row {index} holds the id {token} at position {place}, and the vocabulary has {self.vocab_size}; "
                    "does the tokenizer belong to this model?"
                )
