"""The table of contents of a `.bin` file: a zip of a pickle and, stored as they are, the bytes of each storage.

The pickle is read with every name that it may look up replaced by one of ours, so nothing that a file says is run, and
nothing in it takes more time or memory than its bytes are worth.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from llm_sepweight._catalog import DAMAGED, Extent, size_of
from llm_sepweight._errors import WeightError
from llm_sepweight._header import DTYPES

PICKLE_LIMIT = 100 << 20  # bytes
DIMENSIONS = 64  # that a tensor of torch may have
RESAVE = "Save it anew as safetensors, with torch.load(path, weights_only=True) and safetensors.torch.save_file."
# float32 is pickled as torch.FloatStorage by older, as torch.float32 by younger torch
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype | None  # None: bytes, whose meaning the tensor gives


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _tensor(args: tuple[Any, ...], dtype: Any) -> _Tensor:
    storage, offset, shape, stride = args[:4]
    return _Tensor(storage, offset, tuple(shape), tuple(stride), dtype)


def _with_keys(opcode: bytes, where: slice) -> Callable[[Any], None]:
    """An opcode that enters keys, once they are looked at: the hash of nested tuples, which share, can take for ever."""
    load = pickle._Unpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[where]:
            if type(key) not in (str, int):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
        load(unpickler)

    return checked


def _refused(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it makes objects that no weights need")


def _without_state(unpickler: Any) -> None:
    unpickler.stack.pop()  # the versions of modules, which a state dict comes with
    if type(unpickler.stack[-1]) is not OrderedDict:
        _refused(unpickler)


class _Contents(pickle._Unpickler):  # the one in Python: each opcode can be replaced
    """Gives the tensors that a pickle describes, as descriptions. Raises pickle.UnpicklingError at any other name."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _with_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_keys(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _with_keys(pickle.DICT, slice(None, None, 2)),
        pickle.BUILD[0]: _without_state,
        **{opcode[0]: _refused for opcode in (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)},
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda: OrderedDict(),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(args, args[0].dtype),
            ("torch._utils", "_rebuild_tensor_v3"): lambda *args: _tensor(args, args[6]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): tuple,
            ("torch.storage", "UntypedStorage"): None,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, record, _, _ = pid
        if type(record) is not str:
            raise pickle.UnpicklingError("a storage has no name")
        return _Storage(record, dtype)


def read_contents(path: Path) -> list[Extent]:
    """The tensors of a file that torch.save wrote from a dict of tensors.

    Raises WeightError where the pickle holds anything else (code above all), and where the file is cut short.
    """
    size = size_of(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = {record.filename: record for record in archive.infolist()}
            data = _pickle_of(archive, records, path)
            prefix = data.filename.removesuffix("data.pkl")
            order = records.get(f"{prefix}byteorder")
            if order is not None and (order.file_size > 9 or archive.read(order) != b"little"):
                raise WeightError("the numbers in this file are big-endian", file=path, remedy=RESAVE)
            contents = _unpickle(archive.read(data), path)
            extents = []
            for key, tensor in contents.items():
                if type(key) is not str or not isinstance(tensor, _Tensor):
                    problem = (
                        f"holds an entry of {type(key).__name__} and {type(tensor).__name__}, which is not a tensor"
                    )
                    raise WeightError(problem, file=path, tensor=key if type(key) is str else None, remedy=RESAVE)
                record = records.get(f"{prefix}data/{tensor.storage.record}")
                extents.append(_extent(key, tensor, record, file, path, size))
            return extents
    except WeightError:
        raise
    except OSError as error:
        raise WeightError(f"the file cannot be read: {error.strerror}", file=path) from error
    except Exception as error:  # a damaged or hostile zip file can raise anything
        problem = f"no torch file of today's form, or cut short: {error}"
        raise WeightError(problem, file=path, remedy=f"{DAMAGED} If it was made by torch < 1.6: {RESAVE}") from error


def _pickle_of(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], path: Path) -> zipfile.ZipInfo:
    for name, record in records.items():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > PICKLE_LIMIT:
                raise WeightError("its pickle is compressed or too large", file=path, remedy=RESAVE)
            return record
    raise WeightError("a zip file, but not one that torch.save wrote", file=path, remedy=RESAVE)


def _unpickle(data: bytes, path: Path) -> dict[Any, Any]:
    try:
        contents = _Contents(data).load()
    except Exception as error:  # a hostile pickle can raise anything
        problem = f"refused, since its pickle does not just list tensors: {error}"
        raise WeightError(problem, file=path, remedy="Get the weights as safetensors.") from error
    if not isinstance(contents, dict):
        raise WeightError("holds no dict of tensors", file=path, remedy=RESAVE)
    return contents


def _extent(
    key: str, tensor: _Tensor, record: zipfile.ZipInfo | None, file: io.BufferedIOBase, path: Path, size: int
) -> Extent:
    """Where a tensor's bytes are, checked against the storage that it is said to be part of."""
    counts = (tensor.offset, *tensor.shape, *tensor.stride)
    described = len(tensor.shape) <= DIMENSIONS and isinstance(tensor.dtype, torch.dtype)
    if not described or not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
        raise WeightError("no valid description of a tensor", file=path, tensor=key, remedy=DAMAGED)
    if math.prod(count or 1 for count in tensor.shape) >= 1 << 63 or not _is_contiguous(tensor.shape, tensor.stride):
        raise WeightError("not stored in the order of its elements", file=path, tensor=key, remedy=RESAVE)
    if record is None or record.compress_type != zipfile.ZIP_STORED:
        raise WeightError("its data is missing or compressed", file=path, tensor=key, remedy=RESAVE)
    file.seek(record.header_offset)
    local = file.read(30)  # a local header: its last four bytes are the lengths of name and extra field
    if local[:4] != b"PK\3\4" or len(local) < 30:
        raise WeightError("the zip file is damaged", file=path, tensor=key, remedy=DAMAGED)
    data = record.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    extent = Extent(key, str(path), data + tensor.offset * tensor.dtype.itemsize, tensor.dtype, tensor.shape)
    if extent.offset + extent.nbytes > min(data + record.file_size, size):
        raise WeightError("the data ends before the tensor does", file=path, tensor=key, remedy=DAMAGED)
    return extent


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for count, distance in zip(reversed(shape), reversed(stride), strict=True):
        if count != 1 and distance != step and 0 not in shape:
            return False
        step *= count
    return True
