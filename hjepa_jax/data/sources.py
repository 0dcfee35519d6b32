"""Where labelled images come from: one line of config, two NumPy arrays per split.

    source = open_source("tfds:cifar10", data_dir=None, image_size=32)
    source.info.num_train, source.info.class_names   # before a single image is decoded
    train, test = source.load()                      # uint8 images, int32 labels

| source          | what                                                                 |
|-----------------|----------------------------------------------------------------------|
| `tfds:<name>`   | a TensorFlow Datasets image classification set; downloaded if needed |
| `npz:<file>`    | arrays in one file; `save_npz` writes them                           |
| `folder:<path>` | one sub-folder of image files per class                              |
| `shapes`        | built-in procedural images, see `hjepa_jax.data.shapes`              |

The order of the examples is a function of the source alone; whoever shuffles brings a seed.
TensorFlow is imported only when a `tfds:` source is really read.
"""

import dataclasses
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, Shaped, UInt8
from PIL import Image, ImageOps

from hjepa_jax.errors import InputError

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels of one split, on the host."""

    images: UInt8[np.ndarray, "n H W C"]
    labels: Int32[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before its images are decoded.

    Attributes:
      num_train: training images, the ones held out for validation included.
      num_test: test images.
      image_shape: (H, W, C) of every image that `load` returns; C is 3.
      class_names: indexed by label.
    """

    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that exists and can be read; `load` does the work and returns (train, test)."""

    name: str
    info: SourceInfo
    load: Callable[[], tuple[Split, Split]]


def open_source(source: str, *, data_dir: str | None, image_size: int, seed: int = 0) -> Source:
    """Finds a source and says what is in it; downloads it first where TFDS has to.

    Args:
      source: one of the forms in the table above.
      data_dir: where TFDS keeps prepared data; None is its own default (`TFDS_DATA_DIR`, or a
        folder in the home directory). Other sources ignore it.
      image_size: side in pixels to which images of varying size are brought (shorter side resized,
        then centre crop). Images that all have one size keep it.
      seed: chooses the test images where the source has none of its own (10 %), and draws `shapes`.

    Raises:
      InputError: the source does not exist, cannot be had or breaks a rule of its format.
    """
    kind, _, rest = source.partition(":")
    if source == "shapes":
        return _open_shapes(seed)
    if kind == "tfds" and rest:
        from hjepa_jax.data import tfds_source  # it needs Split from here

        return tfds_source.open_tfds(source, rest, data_dir, image_size, seed)
    if kind == "npz" and rest:
        return _open_npz(source, Path(rest).expanduser(), seed)
    if kind == "folder" and rest:
        return _open_folder(source, Path(rest).expanduser(), image_size, seed)
    rule = "must be tfds:<name>, npz:<file>, folder:<path> or shapes"
    raise InputError("data.source", source, rule)


def fingerprint(split: Split) -> str:
    """Returns 16 hexadecimal digits over the shapes, all labels and about 256 whole images."""
    sample = np.ascontiguousarray(split.images[:: max(1, len(split.images) // 256)])
    digest = hashlib.sha256(repr(split.images.shape).encode())
    digest.update(split.labels.astype("<i4").tobytes())
    digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def hold_out(
    num_examples: int, num_held: int, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held"]]:
    order = np.random.default_rng(seed).permutation(num_examples)
    num_kept = num_examples - num_held
    return np.sort(order[:num_kept]), np.sort(order[num_kept:])


def hold_out_test(split: Split, seed: int) -> tuple[Split, Split]:
    train, test = (
        Split(split.images[index], split.labels[index])
        for index in hold_out(len(split.labels), num_held_out(len(split.labels)), seed)
    )
    return train, test


def first_line(error: BaseException) -> str:
    """Returns the first line of a message that says something, or the name of the error."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def num_held_out(num_examples: int) -> int:
    return max(1, num_examples // 10)


def _open_shapes(seed: int) -> Source:
    from hjepa_jax.data import shapes  # it needs Split from here

    num_train, num_test = 20_000, 4_000
    info = SourceInfo(
        num_train, num_test, (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3), shapes.CLASS_NAMES
    )
    return Source("shapes", info, lambda: shapes.create_shapes(num_train, num_test, seed))


def save_npz(path: str | os.PathLike[str], train: Split, test: Split) -> None:
    """Writes a file that `npz:<path>` reads back; `path` should end in .npz."""
    arrays = (train.images, train.labels, test.images, test.labels)
    np.savez(path, **dict(zip(NPZ_KEYS, arrays, strict=True)))


def _open_npz(source: str, path: Path, seed: int) -> Source:
    """Reads and checks the whole file: there is nothing to decode, and errors come at once."""
    arrays = _read_npz(source, path)
    train = _check_split(source, "train", arrays)
    if "test_images" in arrays:
        test = _check_split(source, "test", arrays)
        if test.images.shape[1:] != train.images.shape[1:]:
            shapes = f"{train.images.shape[1:]} and {test.images.shape[1:]}"
            raise InputError(
                "data.source", source, f"train and test images differ in shape: {shapes}"
            )
    elif len(train.labels) < 2:
        raise InputError("data.source", source, "one image cannot be split into train and test")
    else:
        train, test = hold_out_test(train, seed)
    num_classes = 1 + max(train.labels.max(), test.labels.max())
    info = SourceInfo(
        num_train=len(train.labels),
        num_test=len(test.labels),
        image_shape=train.images.shape[1:],
        class_names=tuple(map(str, range(num_classes))),
    )
    return Source(source, info, lambda: (train, test))


def _read_npz(source: str, path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file):  # .npy, pickle, HTML: not a zip
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        rule = f"must name a readable .npz file: {first_line(error)}"
        raise InputError("data.source", source, rule) from error
    if set(arrays) not in ({*NPZ_KEYS}, {*NPZ_KEYS[:2]}):
        rule = f"must hold the arrays {', '.join(NPZ_KEYS)} (the last two or none), not " + (
            ", ".join(arrays) or "nothing"
        )
        raise InputError("data.source", source, rule)
    return arrays


def _check_split(source: str, name: str, arrays: dict[str, np.ndarray]) -> Split:
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]

    def require(condition: object, rule: str) -> None:
        if not condition:
            found = f"images {images.dtype}{images.shape}, labels {labels.dtype}{labels.shape}"
            raise InputError("data.source", source, f"{name}_{rule} (found {found})")

    require(images.dtype == np.uint8, "images must be uint8")
    channels_fit = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    require(channels_fit, "images must be [n, H, W, 3], [n, H, W, 1] or [n, H, W]")
    require(images.size, "images must not be empty")
    require(np.issubdtype(labels.dtype, np.integer), "labels must be integers")
    require(labels.shape == images.shape[:1], "labels must hold one label per image")
    require(labels.min() >= 0 and labels.max() < 2**16, "labels must lie in [0, 65535]")
    return Split(as_rgb(images), labels.astype(np.int32))


def as_rgb(images: Shaped[np.ndarray, "n H W *C"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Replicates grey values to three channels; colour images pass."""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def decode_image(path: Path, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Reads one file: upright by its EXIF tag, RGB, shorter side resized, centre crop.

    Args:
      path: a file in any format that Pillow reads; of an animation, the first frame.
      image_size: S, the side of the result in pixels.

    Raises:
      InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip 16-bit grey to white
                raise ValueError("more than 8 bits per channel")
            return square(ImageOps.exif_transpose(image), image_size)
    except Exception as error:  # on corrupt data Pillow's decoders raise almost anything
        rule = f"cannot be decoded as an image: {first_line(error)}"
        raise InputError("data.source", str(path), rule) from error


def square(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    size = (image_size, image_size)
    return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))


def _open_folder(source: str, root: Path, image_size: int, seed: int) -> Source:
    if not root.is_dir():
        raise InputError("data.source", source, "must name a folder that exists")
    test_root = None
    if _sub_folders(root / "train"):  # else "train" may be a class, beside "car" and "plane"
        test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        root = root / "train"
    class_names, train_files, train_labels = _list_classes(source, root)
    if test_root is None:
        if len(train_files) < 2:
            raise InputError("data.source", source, "one image cannot be split into train and test")
        kept, held = hold_out(len(train_files), num_held_out(len(train_files)), seed)
        test_files, test_labels = [train_files[i] for i in held], train_labels[held]
        train_files, train_labels = [train_files[i] for i in kept], train_labels[kept]
    else:
        test_names, test_files, test_labels = _list_classes(source, test_root)
        if test_names != class_names:
            differing = ", ".join(sorted({*test_names} ^ {*class_names}))
            rule = f"train and {test_root.name} must have the same classes; one lacks {differing}"
            raise InputError("data.source", source, rule)

    def load() -> tuple[Split, Split]:
        train_images = _decode_images(train_files, image_size)
        test_images = _decode_images(test_files, image_size)
        return Split(train_images, train_labels), Split(test_images, test_labels)

    info = SourceInfo(
        len(train_files), len(test_files), (image_size, image_size, 3), tuple(class_names)
    )
    return Source(source, info, load)


def _list_classes(source: str, root: Path) -> tuple[list[str], list[Path], Int32[np.ndarray, " n"]]:
    """Returns the class names, the files in order of class and name, and their labels."""
    folders = _sub_folders(root)
    if {folder.name for folder in folders} <= {"train", *TEST_FOLDERS}:
        raise InputError("data.source", source, f"{root} must hold one sub-folder per class")
    files, labels = [], []
    for label, folder in enumerate(folders):
        images = [path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise InputError("data.source", source, f"there is no image in {folder}")
        files += images
        labels += [label] * len(images)
    return [folder.name for folder in folders], files, np.array(labels, np.int32)


def _sub_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()] if folder.is_dir() else []


def _visible(folder: Path) -> list[Path]:
    """Lists a folder by name, without hidden entries such as the `._*` files of macOS."""
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(paths, key=lambda path: path.name)


def _decode_images(files: list[Path], image_size: int) -> UInt8[np.ndarray, "n S S 3"]:
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        for i, image in enumerate(pool.map(lambda path: decode_image(path, image_size), files)):
            images[i] = image
    return images
