"""Files of tensors that ``torch.save`` wrote, read as data: nothing in them is called or imported.

Only tensors and plain values are rebuilt. Every other class or function is replaced by a `Foreign`, which does nothing,
so that a file with a pickled transform in its hyperparameters is readable. The memory is in proportion to the file:
arrays must lie uncompressed in it, and no tensor is larger than its bytes there.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

MOST_PICKLE_BYTES = 8 << 20
"""Limit of the structure of a file, arrays not included: a checkpoint's has less than 1 MB."""

_DTYPES = {
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
}
_WRAPPERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


class Foreign(NamedTuple):
    """Placeholder of a class, a function, or an object of a class, that is not rebuilt."""

    module: str
    """Module that it names."""

    name: str
    """Its name there."""


def read_tensors(source: Path | bytes) -> object:
    """Return the content of a file that ``torch.save`` wrote, on the CPU.

    Args:
        source: The file, or its bytes.

    Returns:
        Tensors and plain values in dictionaries, lists and tuples; a `Foreign` stands for anything else.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file, or damaged; the message completes "FILE ...".
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            return _read(archive, size)
    except zipfile.BadZipFile:
        raise ValueError("is cut short, or not a checkpoint of tensors that torch.save wrote") from None
    except (OSError, _RefusedError):
        raise
    except Exception as error:  # damaged bytes can end zipfile and the unpickler with any error
        raise ValueError(
            f"is damaged ({type(error).__name__}): its bytes are not those of a checkpoint of tensors"
        ) from None


class _RefusedError(ValueError):
    """Content that is refused, with the reason."""


def _read(archive: zipfile.ZipFile, size: int) -> object:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _RefusedError("is not a checkpoint of tensors that torch.save wrote: it has no data.pkl")
    files = _Files(archive, names[0].removesuffix("data.pkl"), size)
    if f"{files.folder}byteorder" in archive.namelist() and files.read("byteorder", 16) != b"little":
        raise _RefusedError("was written by a machine of another byte order: convert it there")
    data = files.read("data.pkl", MOST_PICKLE_BYTES)
    return _Unpickler(io.BytesIO(data), files).load()


class _Files:
    """Files in the archive; all together they may not be larger than it."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, size: int) -> None:
        self.folder = folder
        self._archive, self._left = archive, size

    def read(self, name: str, limit: int | None = None) -> bytearray:
        """Return the content of a file; at most ``limit`` bytes are allowed."""
        info = self._archive.getinfo(self.folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise _RefusedError(f"has the compressed part {name!r}, which torch.save never writes")
        if info.file_size > (self._left if limit is None else min(limit, self._left)):
            raise _RefusedError(f"has the part {name!r} of {info.file_size} bytes, which is more than it can hold")
        self._left -= info.file_size
        content = bytearray(info.file_size)
        with self._archive.open(info) as file:
            if cast(io.BufferedIOBase, file).readinto(content) != len(content):
                raise EOFError(name)
        return content


# The Python class, not its twin in C: that one allocates what an index in the file says.
class _Unpickler(pickle._Unpickler):
    """Unpickler that rebuilds tensors and plain values only."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    if TYPE_CHECKING:  # attributes of the class in Python, which its type stubs lack
        stack: list[Any]
        append: Callable[[object], None]

        def pop_mark(self) -> list[Any]: ...

    def __init__(self, file: io.BytesIO, files: _Files) -> None:
        super().__init__(file)
        self._files = files
        self._storages: dict[str, bytearray] = {}

    def find_class(self, module: str, name: str) -> Foreign:
        """Return the name only; nothing is imported."""
        return Foreign(module, name)

    def get_extension(self, code: int) -> None:
        """Refuse a class that is named by a number."""
        raise _RefusedError(f"names a class by the number {code}, which torch.save never writes")

    def persistent_load(self, pid: object) -> Tensor:
        """Return the array of a storage, as a flat tensor."""
        kind, storage, key, _, count = cast(tuple[Any, Any, Any, Any, Any], pid)
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise TypeError(f"no storage: {kind}")
        dtype = _DTYPES[storage.name]
        if key not in self._storages:
            self._storages[key] = self._files.read(f"data/{key}")
        memory = self._storages[key]
        if count * dtype.itemsize > len(memory):
            raise _RefusedError(f"has an array of {count} values in {len(memory)} bytes")
        return torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)

    def _instantiate(self, kind: Any, arguments: Sequence[Any]) -> None:
        self.append(self._made(kind, arguments))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self._made(function, arguments))

    def _reduce_with_names(self) -> None:
        self.stack.pop()
        self._reduce()

    def _made(self, kind: Any, arguments: Any) -> object:
        """Return what a call would give if it is one of the few known; else a placeholder."""
        name = f"{kind.module}.{kind.name}" if isinstance(kind, Foreign) else ""
        if name == "torch._utils._rebuild_tensor_v2":
            return _tensor(*arguments[:4])
        if name in _WRAPPERS and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == "collections.OrderedDict":
            return {}
        return kind if isinstance(kind, Foreign) else Foreign("builtins", type(kind).__name__)

    def _build(self) -> None:
        self.stack.pop()  # the state of an object that is a placeholder, or attributes of a plain one

    def _append(self, values: Sequence[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise TypeError(type(target).__name__)

    def _append_one(self) -> None:
        value = self.stack.pop()
        self._append([value])

    def _append_many(self) -> None:
        self._append(self.pop_mark())

    def _set(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Foreign):
            raise TypeError(type(target).__name__)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_many(self) -> None:
        self._set(self.pop_mark())

    def _new_dict(self) -> None:
        self.append(dict(_pairs(self.pop_mark())))

    def _refuse(self) -> None:
        raise _RefusedError("has a pickled set or buffer, which a checkpoint of tensors does not have")

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _reduce_with_names,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append_one,
        pickle.APPENDS[0]: _append_many,
        pickle.SETITEM[0]: _set_one,
        pickle.SETITEMS[0]: _set_many,
        pickle.DICT[0]: _new_dict,
        # Each byte of these makes a large object.
        **dict.fromkeys(
            (pickle.EMPTY_SET[0], pickle.FROZENSET[0], pickle.ADDITEMS[0], pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0]),
            _refuse,
        ),
    }


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return keys and values; keys must be plain, since hashing a deeply nested one would end the process."""
    keys = items[::2]
    for key in keys:
        if not isinstance(key, str | bytes | int | float | Foreign | None):
            raise TypeError(type(key).__name__)
    return list(zip(keys, items[1::2], strict=True))


def _tensor(flat: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return a view of a storage.

    Raises:
        ValueError: If it leaves the storage, or repeats values of it.
    """
    if len(shape) != len(strides) or any(type(value) is not int or value < 0 for value in (offset, *shape, *strides)):
        raise _RefusedError("has an array of an impossible shape")
    end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    count = math.prod(list(shape))
    if count > flat.numel() or (count and end > flat.numel()):
        raise _RefusedError(f"has an array of shape {list(shape)[:8]} in a storage of {flat.numel()} values")
    return flat.as_strided(shape, strides, offset) if count else flat.new_empty(shape)
