"""The rows of ids that go into a forward function, and the logits that come out, checked on both ways."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._note import note
from ._settings import plain

Rows: TypeAlias = Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[int] | Tensor
ForwardFunc: TypeAlias = Callable[[Tensor], Tensor]


class Forward:
    """Calls `forward_func(ids) -> [B, T, V]`, or its `last_logits(ids, lengths, n) -> [B, n, V]` where it has one."""

    def __init__(self, forward_func: ForwardFunc):
        if not callable(forward_func):
            raise TypeError(
                f"forward_func must be callable with ids [B, T] and return logits [B, T, V], got {type(forward_func)}"
            )
        self.forward_func = forward_func
        self.last_logits = getattr(forward_func, "last_logits", None)
        self.tree_logits = getattr(forward_func, "tree_logits", None)
        self.check_trees = getattr(forward_func, "check_trees", None)
        self.vocab_size = _stated(forward_func, "vocab_size")  # ids are below it
        self.max_length = _stated(forward_func, "max_length") or sys.maxsize  # of a row
        self.vocabulary: int | None = None
        self.device: torch.device | None = None

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, lengths: list[int], n: int, where: str, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [B, n, V] of the last n positions before the end of each right-padded row of ids [B, T].

        rows: how errors number these rows, if not from 0.
        """
        batch, width = ids.shape
        if self.last_logits is not None:
            try:
                logits = self.last_logits(ids, torch.tensor(lengths, device=ids.device), n)
            except Exception as error:
                placed(error, "forward_func.last_logits", where, ids, rows)
                raise
            self._check(logits, (batch, n), "forward_func.last_logits", where)
        else:
            try:
                logits = self.forward_func(ids)
            except Exception as error:
                placed(error, "forward_func", where, ids, rows)
                raise
            self._check(logits, (batch, width), "forward_func", where)
            if all(length == width for length in lengths):
                logits = logits[:, width - n :]
            else:
                ends = torch.tensor(lengths, device=logits.device).unsqueeze(-1)
                places = ends - n + torch.arange(n, device=logits.device)  # (B, n)
                logits = logits[torch.arange(batch, device=logits.device).unsqueeze(-1), places]
        return logits.cpu() if logits.device.type == "mps" else logits  # that device has no float64

    @torch.no_grad()
    def tree(self, ids: Tensor, parents: Tensor, where: str, rows: Sequence[int] | None = None) -> Tensor:
        """Logits [B, N, V] of the nodes of each row's tree, by `tree_logits(ids [B, T], parents [B, N])`.

        Node i of row b is at `parents[b, 0] + 1 + i` in its ids and follows the token at `parents[b, i]`; node 0 is the
        last of a plain sequence.
        """
        tree_logits = self.checker_of_trees(where)
        try:
            logits = tree_logits(ids, parents)
        except Exception as error:
            placed(error, "forward_func.tree_logits", where, ids, rows)
            raise
        self._check(logits, (parents.shape[0], parents.shape[1]), "forward_func.tree_logits", where)
        return logits.cpu() if logits.device.type == "mps" else logits

    def checker_of_trees(self, where: str) -> Callable[[Tensor, Tensor], Tensor]:
        """forward_func.tree_logits; ValueError where it has none, and drafts that branch cannot be checked."""
        if self.tree_logits is None:
            raise ValueError(
                f"{where}: the drafts branch, and forward_func has no tree_logits(input_ids, parents); "
                "give it one, or draft one continuation (PromptLookup with branches=1, DraftModel)"
            )
        return self.tree_logits

    def _check(self, logits: object, leading: tuple[int, int], name: str, where: str) -> None:
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{where}: {name} returned {type(logits).__name__}, not a tensor of logits; "
                + (
                    "wrap it as `lambda ids: torch.as_tensor(model(ids.numpy()))`"
                    if hasattr(logits, "__array__")
                    else "a Hugging Face model is wrapped as `lambda ids: model(ids).logits`"
                )
            )
        shape = logits.shape
        if len(shape) != 3 or shape[:2] != leading or shape[2] < 1 or not logits.is_floating_point():
            raise ValueError(
                f"{where}: {name} returned {logits.dtype} {list(shape)}; "
                f"floating-point logits [{leading[0]}, {leading[1]}, vocabulary] are needed"
            )
        if self.vocabulary not in (None, shape[2]):
            raise ValueError(
                f"{where}: {name} returned {shape[2]} logits per position, and {self.vocabulary} before; "
                "the vocabulary must stay the same"
            )
        if self.vocab_size is not None and self.vocab_size > logits.shape[2]:
            raise ValueError(
                f"{where}: {name} returned {logits.shape[2]} logits per position, and its vocab_size is "
                f"{self.vocab_size}; it must not be more than there are"
            )
        if logits.device.type == "meta" or self.device not in (None, logits.device):
            before = f", and on {self.device} before" if self.device is not None else ""
            raise ValueError(
                f"{where}: {name} returned logits on {logits.device}{before}; "
                "they must hold values, on the same device each time"
            )
        self.vocabulary, self.device = logits.shape[2], logits.device


def _stated(forward_func: ForwardFunc, name: str) -> int | None:
    """A number that a forward function may say of itself."""
    value = plain(getattr(forward_func, name, None))
    if not (type(value) is int and value >= 1) and value is not None:
        raise ValueError(f"forward_func.{name} is {value!r}; it must be an integer >= 1, or None")
    return value


def placed(error: Exception, name: str, where: str, ids: Tensor, rows: Sequence[int] | None = None) -> None:
    """Add to what a forward function raises where that was; raises an IndexError again, with what may be its cause."""
    if isinstance(error, IndexError):  # most likely of a table that is looked up by id
        row, position = divmod(int(ids.argmax()), ids.shape[1])
        raise IndexError(
            f"{where}: {name} raised IndexError: {error}. The largest id that it was given is "
            f"{int(ids[row, position])}, of row {rows[row] if rows else row} at position {position}; "
            "if the model's vocabulary has no such id, use the tokenizer that belongs to it, and pad_id within it"
        ) from error
    note(error, name, where)


def rows_of(input_ids: Any, name: str = "input_ids") -> tuple[list[Tensor], torch.device]:
    """Each row as a 1-D int64 tensor on the CPU, and the device on which the caller had them."""
    device = torch.device("cpu")
    if getattr(input_ids, "dtype", None) is not None and input_ids.dtype == object:  # numpy's array of lists
        input_ids = list(input_ids)
    if hasattr(input_ids, "__array__"):  # a tensor, or numpy's array
        input_ids = _tensor(input_ids, name)
        device = input_ids.device
        if input_ids.dim() not in (1, 2):
            raise ValueError(f"{name} has shape {list(input_ids.shape)}; one row [T] or rows [B, T] are needed")
        rows = list(input_ids.cpu() if input_ids.dim() == 2 else input_ids.cpu().unsqueeze(0))
    else:
        rows = list(input_ids) if isinstance(input_ids, Sequence) and not isinstance(input_ids, str) else input_ids
        if isinstance(rows, list) and rows and all(isinstance(token, Integral) for token in rows):
            rows = [rows]
        if not isinstance(rows, list):
            raise TypeError(f"{name} must be rows of token ids, not {type(input_ids).__name__}; encode the text first")
    if not rows:
        raise ValueError(f"{name} holds no row; give at least one row of token ids")
    return [_row(row, f"{name}: row {index}") for index, row in enumerate(rows)], device


def padded(rows: Sequence[Tensor], pad_id: int, device: torch.device) -> Tensor:
    """Rows of different length as one right-padded [B, T]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id).to(device)


def _row(row: object, name: str) -> Tensor:
    if isinstance(row, str):
        raise TypeError(f"{name} is text; encode it first")
    ids = _tensor(row, name).cpu()
    if ids.dim() != 1:
        raise ValueError(f"{name} is not a flat sequence of integers")
    if len(ids) == 0:
        raise ValueError(f"{name} is empty; it needs at least one token, such as the model's begin-of-text token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} holds {ids.dtype} values; token ids are integers")
    ids = ids.long()
    if int(ids.min()) < 0:
        position = int((ids < 0).nonzero()[0])
        raise ValueError(
            f"{name} holds the id {int(ids[position])} at position {position}; ids start at 0, "
            "and rows of different length are given as lists, without padding"
        )
    return ids


def _tensor(values: Any, name: str) -> Tensor:
    """A tensor as it is; what is in a list or in numpy's array, whose memory torch may not be able to take, as a copy."""
    if isinstance(values, Tensor):
        return values
    try:
        if hasattr(values, "__array__"):
            array = values.__array__()
            whole = array.dtype != object
            values = array.astype(array.dtype.newbyteorder("="), order="C") if whole else array.tolist()
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not a sequence of integers: {error}") from None
