"""Opens a source of images: one line of config, one or two NumPy arrays per split.

    source = open_source("tfds:cifar10", data_dir=None, image_size=32)
    source.info.num_train, source.info.class_names   # before an image is decoded
    train, test = source.load()                      # uint8 images, int32 labels or None

| source          | images                                                               |
|-----------------|----------------------------------------------------------------------|
| `tfds:<name>`   | a TensorFlow Datasets image classification set; downloaded if needed |
| `npz:<file>`    | arrays in one file, see `npz`; `save_npz` writes them                |
| `npy:<path>`    | an array in a file, or arrays in the files of a folder, see `npy`    |
| `folder:<path>` | one sub-folder of image files per class, see `folder_files`          |
| `images:<path>` | all image files below a folder, without labels                       |
| `shapes`        | built-in procedural images, see `hjepa_jax.data.shapes`              |

The order of the images depends on the source alone. TensorFlow is imported only to read a `tfds:`
source.
"""

import dataclasses
import os
import sys
from pathlib import Path

from hjepa_jax.data.base import Source, SourceInfo, Split, check_memory, check_size
from hjepa_jax.data.pixels import channels_of
from hjepa_jax.data.records import NOT_STREAMED, Streaming
from hjepa_jax.data.sides import Sides
from hjepa_jax.errors import InputError, first_line

STREAMABLE = ("tfds", "folder", "images", "npy")  # kinds of sources


def open_source(
    source: str,
    *,
    data_dir: str | None,
    image_size: Sides,
    seed: int = 0,
    streaming: Streaming = NOT_STREAMED,
    follow_links: bool = False,
    num_channels: int | None = 3,
    may_download: bool = True,
    stored_area: float = 1.0,
    quiet: bool = False,
) -> Source:
    """Opens a source and reads its description; downloads a TFDS set that is not prepared.

    Args:
      source: one of the forms in the table above, with `~` expanded.
      data_dir: folder in which TFDS keeps prepared data; None = the default of TFDS
        (`TFDS_DATA_DIR`, or a folder in the home directory). Other sources ignore it.
      image_size: pixels; images of varying size get this side, or height and width (resized to
        cover it, then centre crop). Images that all have one size keep it.
      seed: seed of `shapes`. Other sources ignore it: if they have no test images, every seed holds
        out the same tenth (`hjepa_jax.data.rows.draw_test_rows`).
      streaming: whether the training images are read during training.
      follow_links: whether links out of a folder are followed; other sources ignore it.
      num_channels: channels of the images (grey values are repeated for three); None = as stored.
      may_download: if False, a TFDS set that is not prepared is refused.
      stored_area: if above 1, files of varying size give larger images to train on, which crops
        are cut from: see `hjepa_jax.data.sides.stored_sides`.
      quiet: do not print the line about used and unused images.

    Raises:
      InputError: the source does not exist, cannot be read or breaks a rule of its format.
    """
    try:
        opener = _Opener(
            source, data_dir, image_size, seed, streaming, follow_links, num_channels, may_download,
            stored_area,
        )  # fmt: skip
        found = opener.open()
    except (OSError, RuntimeError, ValueError) as error:  # missing rights, impossible characters
        raise InputError("data.source", source, first_line(error)) from error
    for num_images in (found.info.num_train, found.info.num_test):
        check_size(source, (num_images, found.info.image_bytes))
    if found.usage and not quiet:
        print(found.usage, file=sys.stderr, flush=True)
    if source.partition(":")[0] not in STREAMABLE:  # small, or already in memory
        return found

    def load() -> tuple[Split, Split]:
        num_images = found.info.num_train + found.info.num_test
        check_memory(source, num_images * found.info.image_bytes)
        return found.load()

    return dataclasses.replace(found, load=load)


@dataclasses.dataclass(frozen=True)
class _Opener:
    """The arguments of `open_source`."""

    source: str
    data_dir: str | None
    image_size: Sides
    seed: int
    streaming: Streaming
    follow_links: bool
    num_channels: int | None
    may_download: bool
    stored_area: float

    def open(self) -> Source:
        # The readers are imported on use: they load Pillow or TFDS.
        from hjepa_jax.data import folder, npy, npz, tfds

        source, streaming, channels = self.source, self.streaming, self.num_channels
        kind, _, rest = source.partition(":")
        if streaming.when == "always" and kind not in STREAMABLE:
            rule = f"needs a source {', '.join(f'{each}:...' for each in STREAMABLE)}, not {source}"
            raise InputError("data.streaming", streaming.when, rule)
        if (streaming.train_split or streaming.class_list) and kind != "tfds":
            field = "data.train_split" if streaming.train_split else "data.class_list"
            value = streaming.train_split or streaming.class_list
            raise InputError(field, value, f"needs a source tfds:<name>, not {source}")
        if source == "shapes":
            channels_of(source, 3, channels)
            return _open_shapes(self.seed)
        if kind == "tfds" and rest:
            return tfds.open_tfds(
                source, rest, self.data_dir, self.image_size, streaming, self.may_download,
                channels, self.stored_area,
            )  # fmt: skip
        if kind == "npz" and rest:
            return npz.open_npz(source, Path(rest), channels)
        if kind == "npy" and rest:
            return npy.open_npy(source, Path(rest), streaming, channels)
        if kind in ("folder", "images") and rest:
            return folder.open_folder(
                source, Path(rest), self.image_size, streaming,
                follow_links=self.follow_links, num_channels=channels, stored_area=self.stored_area,
            )  # fmt: skip
        raise InputError("data.source", source, KINDS + _hint(source))


KINDS = "must be tfds:<name>, npz:<file>, npy:<path>, folder:<path>, images:<path> or shapes"


def _hint(source: str) -> str:
    """Returns the correct spelling of a source that is only a path; "" for anything else."""
    if os.path.isdir(path := os.path.expanduser(source)):
        return f"; did you mean folder:{source} (or images:{source}, without labels)?"
    return f"; did you mean {path[-3:]}:{source}?" if path[-4:] in (".npz", ".npy") else ""


def _open_shapes(seed: int) -> Source:
    from hjepa_jax.data import shapes

    num_train, num_test = shapes.NUM_TRAIN, shapes.NUM_TEST
    info = SourceInfo(
        num_train, num_test, (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3), shapes.CLASS_NAMES
    )
    return Source("shapes", info, lambda: shapes.create_shapes(num_train, num_test, seed))
