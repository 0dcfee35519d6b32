"""A `tfds:<name>` source that is read record by record: sets prepared as array_record."""

import dataclasses
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Num
from PIL import Image

from hjepa_jax.data.base import Source, SourceInfo, Split, fit_pixels, fitted
from hjepa_jax.data.class_list import find_class_list
from hjepa_jax.data.image_file import Kind, pixels_of
from hjepa_jax.data.pixels import with_channels
from hjepa_jax.data.records import (
    MAX_UNREADABLE,
    Streaming,
    read_all,
    report_skipped,
    unreadable_errors,
)
from hjepa_jax.data.rows import draw_rows, spread_rows
from hjepa_jax.data.test_split import draw_test, keep_rows
from hjepa_jax.data.tfds_info import (
    class_names,
    files_of,
    formats_of,
    image_and_label,
    made_from,
    splits_line,
    test_splits,
)
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.runtime.user_cache import kept_arrays

UNREADABLE = -2  # label of a corrupt record; TFDS has -1 for an image without a label
SCAN_BATCH = 1000  # labels that are read at a time


@dataclasses.dataclass
class TfdsRecords:
    """Images of a split; see `hjepa_jax.data.records.Records`.

    Attributes:
      path: folder of the prepared set.
      split: name of the split.
      keys: names of the image feature and the label feature; None = no labels.
      image_shape: (H, W, C) of the returned images.
      crops: whether stored images vary in size: shorter side resized, then centre crop.
      rows: records of the split, in their order here.
      dtype: type of the pixels.
      num_stored: channels of the stored images.
    """

    path: str
    split: str
    keys: tuple[str, str | None]
    image_shape: tuple[int, int, int]
    crops: bool
    rows: Int[np.ndarray, " n"]
    dtype: str = "uint8"
    num_stored: int = 3

    def __post_init__(self):
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # every worker opens the files itself

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Num[np.ndarray, "H W C"]:
        try:
            encoded = self.encoded(row)
            if self.dtype != "uint8" or self.image_shape[2] != 3:
                with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
                    pixels = pixels_of(image, Kind(self.num_stored, self.dtype))
                if self.crops:
                    return fit_pixels(pixels, self.image_shape)
                pixels = with_channels(pixels[None], self.image_shape[2])[0]
            else:
                with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
                    if self.crops:
                        return fitted(image, self.image_shape[:2])
                    pixels = np.asarray(image.convert("RGB"))
            if pixels.shape != self.image_shape:
                raise ValueError(f"its shape is {pixels.shape}, not {self.image_shape}")
            return pixels
        except Exception as error:  # on corrupt data the readers raise almost anything
            record = f"{self.split}[{self.rows[row]}]"
            rule = f"cannot be read as an image: {first_line(error)}"
            raise InputError("data.source", record, rule) from error

    def encoded(self, row: int) -> bytes:
        """Returns an image as it is stored, in the format of its file."""
        return self._source()[int(self.rows[row])][self.keys[0]]

    def stamps(self) -> list[tuple[str, int, int]]:
        which = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        files = [(name, size, time) for name, size, time, _ in files_of(Path(self.path))]
        return [(f"{self.split} {which}", len(self), 0), *files]

    def labels(self, rows: Sequence[int]) -> Int32[np.ndarray, " n"]:
        """Returns the labels of some rows: `UNREADABLE` for a corrupt record, -1 for no label."""
        if self.keys[1] is None:
            return np.full(len(rows), -1, np.int32)
        source = self._source()
        try:
            examples = source.__getitems__([int(self.rows[row]) for row in rows])
            return np.array([example[self.keys[1]] for example in examples], np.int32)
        except Exception:  # some record is corrupt: read one by one, which is slower
            return np.array([self._label(row) for row in rows], np.int32)

    def _label(self, row: int) -> int:
        try:
            return int(self._source()[int(self.rows[row])][self.keys[1]])
        except Exception:  # see `read`
            return UNREADABLE

    def part(self, rows: Int[np.ndarray, " rows"]) -> "TfdsRecords":
        """Returns some of the records."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def _source(self) -> Any:
        if self._opened is None:
            import tensorflow_datasets

            tfds: Any = tensorflow_datasets
            # Opened by its folder, because the code that defines the set may not be installed.
            builder = tfds.builder_from_directory(self.path)
            decoders = {self.keys[0]: tfds.decode.SkipDecoding()}
            self._opened = builder.as_data_source(self.split, decoders=decoders)
        return self._opened


def open_streamed(
    source: str,
    builder: Any,
    image_shape: tuple[int, int, int],
    streaming: Streaming,
    dtype: str = "uint8",
    stored: tuple[int, int, int] | None = None,
) -> Source:
    """Returns a source that reads its training images during training, in the shape `stored`."""
    if "array_record" not in (formats := formats_of(builder)):
        rule = (
            f"is prepared as {', '.join(sorted(formats))} in {builder.data_path}, which cannot be "
            "read record by record; name another folder as data.dir, and it is prepared there as "
            "array_record"
        )
        raise InputError("data.source", source, rule)
    names = class_names(builder)
    classes = list(range(len(names)))
    if streaming.class_list is not None:
        classes = _read_classes(streaming.class_list, names)

    def open_split(name: str) -> TfdsRecords:
        records = _all_records(builder, name, image_shape)
        if streaming.class_list is None:
            return records
        chosen = np.isin(_split_labels(records, builder), classes)
        return records.part(np.flatnonzero(chosen).astype(np.int32))

    labelled = open_split("train")
    has_classes = _is_labelled(labelled)
    others = (open_split(name) for name in test_splits(builder))
    test = next((split for split in others if not has_classes or _is_labelled(split)), None)
    test_name = test.split if test else None
    if test is None:
        labels = None
        if has_classes:
            whole = _all_records(builder, labelled.split, image_shape)
            labels = _split_labels(whole, builder)[labelled.rows]
        rows = draw_test(source, len(labelled), labels, ())
        labelled, test = map(labelled.part, rows)
    records = open_split(streaming.train_split) if streaming.train_split else labelled
    drawn = [
        split.part(draw_rows(len(split), streaming.max_labelled).held) for split in (labelled, test)
    ]
    chosen = tuple(names[label] for label in classes) if has_classes else ()
    records = dataclasses.replace(records, image_shape=stored or image_shape)
    used = (records.split, test_name, labelled.split)
    usage = splits_line(source, builder, used, len(records), len(test), class_names=chosen)
    info = SourceInfo(len(drawn[0]), len(drawn[1]), image_shape, chosen, dtype)
    new_label = np.full(len(names), -1, np.int32)
    new_label[classes] = np.arange(len(classes))
    labels = new_label if has_classes else None
    return Source(source, info, lambda: _load(source, drawn, labels), records, usage=usage)


def _load(
    source: str, drawn: list[TfdsRecords], new_label: Int32[np.ndarray, " classes"] | None
) -> tuple[Split, Split]:
    """Decodes the images for probes; `new_label` numbers the chosen classes; None = no labels."""
    skipped: list[InputError] = []
    loaded = []
    for records in drawn:
        images, labels, errors = _read_labelled(records)
        if new_label is not None and np.any(labels == -1):
            rule = f"split {records.split} has images without a label"
            raise InputError("data.source", source, rule)
        loaded.append(Split(images, None if new_label is None else new_label[labels]))
        skipped += errors
    report_skipped(source, skipped, f"{sum(map(len, drawn))} images")
    return loaded[0], loaded[1]


def read_split(
    builder: Any, name: str, image_shape: tuple[int, int, int]
) -> tuple[Num[np.ndarray, "n H W C"], Int32[np.ndarray, " n"]]:
    """Decodes images and labels of a split, in the order of its files; -1 is no label.

    Raises:
      InputError: an image cannot be read.
    """
    images, labels, errors = _read_labelled(_all_records(builder, name, image_shape))
    if errors:
        raise errors[0]
    return images, labels


def read_encoded(builder: Any, name: str, count: int) -> list[bytes]:
    """Returns evenly spaced images of a split, not decoded."""
    records = _all_records(builder, name, (0, 0, 3))
    return [records.encoded(int(row)) for row in spread_rows(records.rows, count)]


def _all_records(builder: Any, name: str, image_shape: tuple[int, int, int]) -> TfdsRecords:
    rows = np.arange(builder.info.splits[name].num_examples, dtype=np.int32)
    keys = image_and_label(builder)
    crops = None in builder.info.features[keys[0]].shape  # images vary in size
    feature: Any = builder.info.features[keys[0]]
    dtype, stored = np.dtype(feature.np_dtype).name, feature.shape[-1]
    if dtype == "float32" or (dtype == "uint16" and stored > 1):
        rule = f"has images of {dtype} with {stored} channels, which cannot be read as array_record"
        raise InputError("data.source", f"tfds:{builder.name}", rule)
    path = str(builder.data_path)
    return TfdsRecords(path, name, keys, image_shape, crops, rows, dtype, stored)


def _read_labelled(
    records: TfdsRecords,
) -> tuple[Num[np.ndarray, "n H W C"], Int32[np.ndarray, " n"], list[InputError]]:
    """Returns images and labels of the readable records, and one error per unreadable record."""
    images, kept, errors = read_all(records)
    labels = records.labels(kept)
    readable = np.flatnonzero(labels != UNREADABLE)
    errors += unreadable_errors(records, np.delete(kept, readable).astype(int).tolist())
    return keep_rows(images, readable), labels[readable], errors


def has_labels(labels: Int32[np.ndarray, " n"]) -> bool:
    """Returns whether a split has labels, by its first images."""
    return bool(labels[:MAX_UNREADABLE].max(initial=-1) >= 0)


def _is_labelled(split: TfdsRecords) -> bool:
    """Returns `has_labels` of a split.

    Raises:
      InputError: all of the first records are corrupt.
    """
    labels = split.labels(range(min(len(split), MAX_UNREADABLE)))
    if len(labels) and labels.max() == UNREADABLE:
        raise unreadable_errors(split, [0])[0]
    return has_labels(labels)


def _read_classes(path: str, names: Sequence[str]) -> list[int]:
    """Returns the labels of the classes that a file names, one per line."""
    try:
        lines = find_class_list(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        rule = f"must be a file of class names: {first_line(error)}"
        raise InputError("data.class_list", path, rule) from error
    unknown = [line for line in lines if line not in names]
    if unknown or len(set(lines)) < len(lines) or len(lines) < 2:
        rule = "must name at least two classes of the set, each once"
        rule += f", and {unknown[0]} is none" if unknown else ""
        raise InputError("data.class_list", path, rule)
    return [names.index(line) for line in lines]


def _split_labels(records: TfdsRecords, builder: Any) -> Int32[np.ndarray, " n"]:
    """Returns the labels of a whole split; they are cached on disk."""

    def scan() -> dict[str, np.ndarray]:
        line = f"looking through {len(records)} labels of split {records.split}, once"
        print(line, file=sys.stderr, flush=True)
        parts = []
        for start in range(0, len(records), SCAN_BATCH):
            labels = records.labels(range(start, min(start + SCAN_BATCH, len(records))))
            if labels.max() == UNREADABLE:  # all are corrupt: the files themselves are unreadable
                raise unreadable_errors(records, [start])[0]
            parts.append(labels)
        return {"labels": np.concatenate(parts)}

    key = f"labels {builder.info.full_name} {records.split} {builder.data_path}"
    labels = kept_arrays(key, scan, made_from=made_from(builder))["labels"]
    corrupt = np.flatnonzero(labels == UNREADABLE)
    labels[corrupt] = records.labels(corrupt.tolist())  # the disk may have failed for a moment
    corrupt = np.flatnonzero(labels == UNREADABLE).tolist()
    what = f"{len(records)} records of split {records.split} (their class is unknown)"
    report_skipped("data.class_list", unreadable_errors(records, corrupt), what)
    return labels
