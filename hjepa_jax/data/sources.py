"""Opens a source of labelled images: one line of config, two NumPy arrays per split.

    source = open_source("tfds:cifar10", data_dir=None, image_size=32)
    source.info.num_train, source.info.class_names   # before an image is decoded
    train, test = source.load()                      # uint8 images, int32 labels

| source          | images                                                               |
|-----------------|----------------------------------------------------------------------|
| `tfds:<name>`   | a TensorFlow Datasets image classification set; downloaded if needed |
| `npz:<file>`    | arrays in one file, see `npz`; `save_npz` writes them                |
| `folder:<path>` | one sub-folder of image files per class, see `folder_files`          |
| `shapes`        | built-in procedural images, see `hjepa_jax.data.shapes`              |

The order of the images depends on the source alone. TensorFlow is imported only to read a `tfds:`
source.
"""

import dataclasses
import math
import sys
from pathlib import Path

from hjepa_jax.data.base import Source, SourceInfo, Split, check_memory, check_size
from hjepa_jax.data.records import NOT_STREAMED, Streaming
from hjepa_jax.errors import InputError, first_line


def open_source(
    source: str,
    *,
    data_dir: str | None,
    image_size: int,
    seed: int = 0,
    streaming: Streaming = NOT_STREAMED,
    may_download: bool = True,
    quiet: bool = False,
) -> Source:
    """Opens a source and reads its description; downloads a TFDS set that is not prepared.

    Args:
      source: one of the forms in the table above, with `~` expanded.
      data_dir: folder in which TFDS keeps prepared data; None = the default of TFDS
        (`TFDS_DATA_DIR`, or a folder in the home directory). Other sources ignore it.
      image_size: pixels; images of varying size become squares of this side (shorter side resized,
        then centre crop). Images that all have one size keep it.
      seed: seed of `shapes`. Other sources ignore it: if they have no test images, every seed holds
        out the same tenth (`hjepa_jax.data.rows.draw_test_rows`).
      streaming: whether the training images are read during training.
      may_download: if False, a TFDS set that is not prepared is refused.
      quiet: do not print the line about used and unused images.

    Raises:
      InputError: the source does not exist, cannot be read or breaks a rule of its format.
    """
    try:
        found = _open(source, data_dir, image_size, seed, streaming, may_download)
    except (OSError, RuntimeError, ValueError) as error:  # missing rights, impossible characters
        raise InputError("data.source", source, first_line(error)) from error
    for num_images in (found.info.num_train, found.info.num_test):
        check_size(source, (num_images, *found.info.image_shape))
    if found.usage and not quiet:
        print(found.usage, file=sys.stderr, flush=True)
    if source.partition(":")[0] not in ("tfds", "folder"):  # small, or already in memory
        return found

    def load() -> tuple[Split, Split]:
        num_images = found.info.num_train + found.info.num_test
        check_memory(source, num_images * math.prod(found.info.image_shape))
        return found.load()

    return dataclasses.replace(found, load=load)


def _open(
    source: str,
    data_dir: str | None,
    image_size: int,
    seed: int,
    streaming: Streaming,
    may_download: bool,
) -> Source:
    # The readers are imported on use: they load Pillow or TFDS.
    from hjepa_jax.data import folder, npz, tfds

    kind, _, rest = source.partition(":")
    if streaming.when == "always" and kind not in ("tfds", "folder"):
        rule = f"needs a source tfds:<name> or folder:<path>, not {source}"
        raise InputError("data.streaming", streaming.when, rule)
    if (streaming.train_split or streaming.class_list) and kind != "tfds":
        field = "data.train_split" if streaming.train_split else "data.class_list"
        value = streaming.train_split or streaming.class_list
        raise InputError(field, value, f"needs a source tfds:<name>, not {source}")
    if source == "shapes":
        return _open_shapes(seed)
    if kind == "tfds" and rest:
        return tfds.open_tfds(source, rest, data_dir, image_size, streaming, may_download)
    if kind == "npz" and rest:
        return npz.open_npz(source, Path(rest))
    if kind == "folder" and rest:
        return folder.open_folder(source, Path(rest), image_size, streaming)
    rule = "must be tfds:<name>, npz:<file>, folder:<path> or shapes"
    if (path := Path(source)).exists():
        rule += f"; did you mean {'folder' if path.is_dir() else 'npz'}:{source}?"
    raise InputError("data.source", source, rule)


def _open_shapes(seed: int) -> Source:
    from hjepa_jax.data import shapes  # it needs Split from here

    num_train, num_test = shapes.NUM_TRAIN, shapes.NUM_TEST
    info = SourceInfo(
        num_train, num_test, (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3), shapes.CLASS_NAMES
    )
    return Source("shapes", info, lambda: shapes.create_shapes(num_train, num_test, seed))
