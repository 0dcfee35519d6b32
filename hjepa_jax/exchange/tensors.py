"""Files of named tensors: safetensors, and files of `torch.save`. Reading runs no code.

Every problem of a file is a ValueError with the reason.
"""

import collections
import dataclasses
import json
import math
import pathlib
import pickle
import zipfile
from typing import IO, Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the same limit as in the reader of the safetensors package
# NumPy types by their names in safetensors, and these names by PyTorch's storages.
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
# Names in the pickle of a NumPy number.
_NUMBERS = (
    ("numpy._core.multiarray", "scalar"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"),
    ("_codecs", "encode"),
)  # fmt: skip

Tensors = dict[str, np.ndarray]


def read_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors of a file, mapped from disk, and its metadata.

    Raises:
      ValueError: the file deviates from the format in any byte.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = sorted(
                (*entry["data_offsets"], _TYPES[entry["dtype"]], entry["shape"], name)
                for name, entry in header.items()
            )
            end = 0
            for start, after, dtype, shape, name in entries:
                whole = all(type(n) is int and n >= 0 for n in (start, after, *shape))
                if not whole or start != end or after - start != _bytes(shape, dtype):
                    raise ValueError(f"tensor {name} has no place of its own")
                end = after
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata is no text")
        except (TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(f"its header is malformed ({error!r})") from error
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, and {8 + length + end} by its header")
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if end else np.zeros(0, np.uint8)
    return {
        name: data[start:after].view(dtype).reshape(shape)
        for start, after, dtype, shape, name in entries
    }, metadata


def _bytes(shape: list[int], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def write_safetensors(file: IO[bytes], tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes tensors in the order of their names."""
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        kind = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in sorted(tensors.items()):
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def read_torch(path: pathlib.Path) -> "TorchFile":
    """Opens a file of `torch.save`; tensors stay on disk until `TorchFile.tensors` reads them.

    Raises:
      ValueError: the file contains anything but tensors, numbers, texts and collections of them,
        or is not in the format of PyTorch.
    """
    try:
        archive = zipfile.ZipFile(path)
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1 or any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("it is no archive of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") == b"big":
            raise ValueError("its numbers begin with their highest byte")
        with archive.open(pickles[0]) as file:
            return TorchFile(archive, root, _Reader(file).load())
    except zipfile.BadZipFile as error:
        rule = "it is no whole archive of torch.save (of PyTorch 1.6 or newer)"
        raise ValueError(f"{rule}: {error}") from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"its list of tensors is malformed ({error!r})") from error


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a TorchFile, as its pickle describes it."""

    storage: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """An open file of `torch.save`; `content` has a `_Tensor` for each tensor."""

    archive: zipfile.ZipFile
    root: str
    content: Any

    def tensors(self, found: dict[str, Any]) -> Tensors:
        """Reads the tensors of a dictionary in `content`.

        Raises:
          ValueError: if one of them does not lie within its storage.
        """
        return {name: self._read(name, t) for name, t in found.items() if isinstance(t, _Tensor)}

    def _read(self, name: str, tensor: _Tensor) -> np.ndarray:
        try:
            data = self.archive.read(f"{self.root}data/{tensor.storage}")
        except (KeyError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"tensor {name} cannot be read ({error})") from error
        values = np.frombuffer(data, _TYPES[tensor.kind])
        spans = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((n - 1) * stride for n, stride in spans)
        lowest = min((tensor.offset, *tensor.shape, *tensor.strides))
        count = math.prod(tensor.shape)
        if lowest < 0 or count > len(values) or (count and last >= len(values)):
            raise ValueError(f"tensor {name} does not lie within its storage")
        strides = [stride * values.itemsize for stride in tensor.strides]
        first = values[tensor.offset :]
        return np.lib.stride_tricks.as_strided(first, tensor.shape, strides).copy()


class _Ignored:
    """Stands for a value that is not needed, such as a score that NumPy has computed."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Reads the pickle in a file of `torch.save`; only the names in `find_class` are allowed."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Returns a harmless replacement for a name in the pickle.

        Raises:
          ValueError: for a name that is not listed here.
        """
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            **dict.fromkeys(_NUMBERS, _Ignored),
        }
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        if (module_name, global_name) not in known:
            name = f"{module_name}.{global_name}"
            raise ValueError(f"it names {name}, and only tensors are read, never code")
        return known[module_name, global_name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """Returns number and type of a storage."""
        what, kind, number, _, _ = pid
        if what != "storage" or kind not in _TYPES or not str(number).isdecimal():
            raise ValueError("it names a storage of an unknown type")
        return str(number), kind

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        number, kind = storage
        if not all(type(n) is int for n in (offset, *shape, *strides)):
            raise ValueError("it has a tensor without a shape")
        return _Tensor(number, kind, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor
