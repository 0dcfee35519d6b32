"""A table of features, one row per image: made shard by shard, then written as one file.

A shard is an npz file with one array per column. Shards are read one after the other, so that
memory stays constant. Shards of an interrupted command are reused.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from hjepa_jax.runtime.files import replacing

SUFFIXES = (".npz", ".npy", ".parquet")
NOT_FEATURES = ("labels", "files")  # columns
INTERNAL = ("rows", "errors")  # arrays of a shard that are not columns

Shapes = dict[str, tuple[int, ...]]
IsTest = Bool[np.ndarray, " n"] | None


class Shards:
    """The shards of one table, in the folder `.NAME.partial` beside the output file.

    Args:
      output: the output file.
      made_from: description of everything that the rows depend on. If it has changed, existing
        shards are removed.
    """

    def __init__(self, output: pathlib.Path, made_from: dict[str, Any]):
        self.folder = output.with_name(f".{output.name}.partial")
        self._note = self.folder / "made_from.json"
        text = json.dumps(made_from)
        if not (self._note.exists() and self._note.read_text() == text):
            self.remove()
            self.folder.mkdir()
            with replacing(self._note) as file:
                file.write(text.encode())
        self.paths: list[pathlib.Path] = []

    def add(self, number: int) -> pathlib.Path:
        """Adds a shard and returns its path; the file may already exist."""
        self.paths.append(self.folder / f"{number:08}.npz")
        return self.paths[-1]

    def remove(self) -> None:
        """Removes all shards and the folder."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def column(self, name: str, rows: IsTest = None) -> Iterator[Shaped[np.ndarray, "_ ..."]]:
        """Yields a column shard by shard; `rows` selects rows of the table."""
        start = 0
        for path in self.paths:
            with np.load(path) as shard:
                values = shard[name]
            end = start + len(values)
            yield values if rows is None else values[rows[start:end]]
            start = end

    def whole(self, name: str) -> Shaped[np.ndarray, "n ..."]:
        """Reads a column into memory."""
        return np.concatenate([*self.column(name)])

    def columns(self) -> list[str]:
        """Returns the names of the columns."""
        with np.load(self.paths[0]) as shard:
            return [name for name in shard.files if name not in INTERNAL]


def write_table(output: pathlib.Path, shards: Shards, is_test: IsTest) -> Shapes:
    """Writes the shards as one file, in the format of its suffix.

    Args:
      output: the file; its suffix is one of `SUFFIXES`.
      shards: the rows, at least one.
      is_test: which rows are test images; None = the rows have no split.

    Returns:
      Shapes of the arrays in the file, by name.
    """
    write = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}
    with replacing(output) as file:
        return write[output.suffix.lower()](file, shards, is_test)


def _write_npz(file: Any, shards: Shards, is_test: IsTest) -> Shapes:
    """Writes each column as two arrays, `train_<name>` and `test_<name>`; without split as one."""
    shapes: Shapes = {}
    splits = {"": None} if is_test is None else {"train_": ~is_test, "test_": is_test}
    with zipfile.ZipFile(file, "w") as archive:
        for split, rows in splits.items():
            for name in shards.columns():
                with archive.open(f"{split}{name}.npy", "w", force_zip64=True) as member:
                    shapes[f"{split}{name}"] = _write_array(member, shards, name, rows)
    return shapes


def _write_npy(file: Any, shards: Shards, _: IsTest) -> Shapes:
    """Writes one array: the features side by side, or the tokens if there are any."""
    names = [name for name in shards.columns() if name not in NOT_FEATURES]
    if "tokens" in names:
        return {"tokens": _write_array(file, shards, "tokens", None)}
    parts = zip(*(shards.column(name) for name in names), strict=True)
    first = np.concatenate([next(shards.column(name))[:1] for name in names], axis=1)
    shape = (len(shards.whole("rows")), first.shape[1])
    _write_header(file, first.dtype, shape)
    for columns in parts:
        file.write(np.concatenate(columns, axis=1).tobytes())
    return {"+".join(names): shape}


def _write_array(file: Any, shards: Shards, name: str, rows: IsTest) -> tuple[int, ...]:
    # Strings of file names have different lengths in different shards, hence different types.
    dtypes = {part.dtype for part in shards.column(name)} if name in NOT_FEATURES else None
    first = next(shards.column(name))
    dtype = np.result_type(*dtypes) if dtypes else first.dtype
    count = len(shards.whole("rows")) if rows is None else int(rows.sum())
    shape = (count, *first.shape[1:])
    _write_header(file, dtype, shape)
    for part in shards.column(name, rows):
        file.write(part.astype(dtype).tobytes())
    return shape


def _write_header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**described, "shape": shape})


def _write_parquet(file: Any, shards: Shards, is_test: IsTest) -> Shapes:
    """Writes one row per image in input order: split, labels, files, and a list per feature."""
    import pyarrow
    from pyarrow import parquet

    shapes: Shapes = {}
    writer, start, count = None, 0, len(shards.whole("rows"))
    for parts in zip(*(shards.column(name) for name in shards.columns()), strict=True):
        columns: dict[str, Any] = {}
        for name, values in zip(shards.columns(), parts, strict=True):
            shapes[name] = (count, *values.shape[1:])
            columns[name] = pyarrow.array(values if values.ndim == 1 else values.ravel())
            if values.ndim > 1:  # the metadata has the shape of tokens
                size = math.prod(values.shape[1:])
                columns[name] = pyarrow.FixedSizeListArray.from_arrays(columns[name], size)
        if is_test is not None:
            test = is_test[start : start + len(parts[0])]
            columns["split"] = pyarrow.array(np.where(test, "test", "train"))
        start += len(parts[0])
        table = pyarrow.table(columns)
        if writer is None:
            told = {"shapes": json.dumps({name: shape[1:] for name, shape in shapes.items()})}
            writer = parquet.ParquetWriter(file, table.schema.with_metadata(told))
        writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
    assert writer is not None  # there is at least one row
    writer.close()
    return shapes
