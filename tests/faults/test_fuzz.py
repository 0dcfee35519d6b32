"""Each of thousands of random inputs gives a result or one InputError, in limited time.

The inputs are mutations of valid ones, drawn from fixed seeds. A failure names the draw and can be
reproduced.
"""

import contextlib
import functools
import io
import shutil
import signal
import struct
import warnings
import zipfile

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from hjepa_jax import cli
from hjepa_jax.config import base_config, build
from hjepa_jax.config.fields import flatten
from hjepa_jax.config.validation import validate
from hjepa_jax.data.folder import open_folder
from hjepa_jax.data.npz import NPZ_KEYS
from hjepa_jax.data.sources import open_source
from hjepa_jax.errors import InputError

NUM_OVERRIDES, NUM_NPZ, NUM_IMAGES = 1_500, 2_500, 1_800
LIMIT_SEC = 60  # a thousand times the usual time
IMAGE_SIZE = 8

pytestmark = pytest.mark.slow


class Hangs(BaseException):
    """A timeout. It is no Exception, because the readers treat an Exception as corrupt data."""


@contextlib.contextmanager
def in_time():
    def stop(*_):
        raise Hangs

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SEC)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def is_refused(check, what):
    """Returns whether `check` ends with a one-line error; any other error is a bug."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), in_time():
            check()
    except InputError as error:
        lines = [str(error)]
    except SystemExit:  # raised by the command line parser
        lines = stderr.getvalue().removesuffix("\n").split("\n")
    except (Exception, Hangs) as error:
        raise AssertionError(f"{type(error).__name__} ({error}) at {what}") from error
    else:
        return False
    assert len(lines) == 1, what
    assert lines[0].strip(), what
    assert "\n" not in lines[0], what
    return True


# Config overrides

NUMBERS = [
    "0", "1", "-1", "2", "3", "4", "8", "16", "32", "0.5", "0.1", "1e-9", "1e9", "1e39", "1e308",
    "1e999", "-1e999", "nan", "inf", "-inf", "2147483647", "2147483648", "-2147483649",
    str(10**18), str(-(10**18)), "9" * 4_000, "9" * 5_000, "0x10", "1_0", "1j", "-0", "0.0",
]  # fmt: skip
WORDS = [
    "", "a", "none", "None", "true", "false", "cosine", "vicreg", "vit_small", "cpu", "bfloat16",
    "()", "[]", "{}", "{'a': 1}", "{'seed': 1}", "(" * 500, "-" * 3_000 + "1", "'", '"', "\\", "\0",
    "\n", "\ud800", "é", "[[[]]]", "lambda: 0", "__import__('os')", "tfds:cifar10", "{1}", "b'x'",
]  # fmt: skip


def random_value(rng):
    kind = rng.integers(10)
    if kind < 5:
        return str(rng.choice(NUMBERS))
    if kind < 7:
        return str(rng.choice(WORDS))
    length = rng.integers(5)
    inner = [str(rng.choice(NUMBERS if rng.random() < 0.8 else WORDS)) for _ in range(length)]
    opening, closing = ("()", "[]")[rng.integers(2)]
    return opening + ", ".join(inner) + closing


def random_override(rng, defaults):
    field = str(rng.choice([*defaults]))
    value = str(defaults[field]) if rng.random() < 0.3 else random_value(rng)
    odd = rng.random()
    if odd < 0.02:
        field = field.rpartition(".")[0] or "."  # a whole section
    elif odd < 0.05:
        field += str(rng.choice([".x", "[0]", "[9]", "[a]", ".", "..", "x", " ", "[", "-"]))
    prefix = "--noconfig." if rng.random() < 0.02 else "--config."
    return f"{prefix}{field}" + ("" if rng.random() < 0.02 else f"={value}")


def build_masks_and_schedules(overrides, *, computes):
    """Builds masks and schedules from the flags, as the command does."""
    argv, values = ["main", "--config=configs/shapes_tiny.py", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    cli.parse_flags(argv, values)
    validate(values.config)
    for value in flatten(values.config.to_dict()).values():
        for number in value if isinstance(value, list) else [value]:
            assert not isinstance(number, int | float) or abs(number) < 2**31
    assert type(build.build_masks(values.config).context_capacity) is int
    schedules = build.build_schedules(values.config, 2**20)
    assert 1 <= schedules.num_steps < 2**31
    if computes:
        assert np.isfinite(schedules.learning_rate_fn(1))


def test_any_override_is_a_valid_config_or_one_line():
    rng, num_valid = np.random.default_rng(0), 0
    defaults = flatten(base_config().to_dict())
    for i in range(NUM_OVERRIDES):
        overrides = [random_override(rng, defaults) for _ in range(rng.integers(1, 4))]
        check = functools.partial(build_masks_and_schedules, overrides, computes=i % 50 == 0)
        num_valid += not is_refused(check, f"{i}: {overrides}"[:300])
    print(f"{NUM_OVERRIDES} lists of overrides, {num_valid} valid")
    assert NUM_OVERRIDES * 0.05 < num_valid < NUM_OVERRIDES * 0.9


# npz files


def random_arrays(rng, image_shape):
    """Returns images and labels that are mostly valid; each property is sometimes wrong."""
    shape = (int(rng.integers(1, 6)), *image_shape)
    if rng.random() < 0.05:
        shape = tuple(int(n) for n in rng.integers(0, 4, size=rng.integers(0, 6)))
    images = rng.integers(256, size=shape).astype(np.uint8)
    if rng.random() < 0.05:
        images = images.astype(str(rng.choice([*"bhilqBHILQefdFD?SUVmM", "S3", "U3", ">u2"])))
    num_labels = int(rng.integers(9)) if not shape or rng.random() < 0.05 else shape[0]
    labels = rng.integers(-2 if rng.random() < 0.05 else 0, 5, size=num_labels)
    if rng.random() < 0.1:
        dtypes = ["i4", "i8", ">i2", "u8", "f4", "?", "m8[s]", "M8[s]", "S2", "V0"]
        labels = labels.astype(str(rng.choice(dtypes)))
    return images, labels


def random_npz(rng):
    image_shape = (3, 2, int(rng.choice([1, 3])))[: rng.integers(2, 4)]
    arrays = [*random_arrays(rng, image_shape), *random_arrays(rng, image_shape)]
    keys = [*NPZ_KEYS] if rng.random() < 0.9 else [str(key) for key in rng.permutation(NPZ_KEYS)]
    number = int(rng.choice([2, 2, 4, 4, 4, 4, 4, 1, 3]))
    file = io.BytesIO()
    save = np.savez if rng.random() < 0.7 else np.savez_compressed
    save(file, **dict(zip(keys[:number], arrays, strict=False)))
    return file.getvalue()


HEADERS = [
    (b"(", b"(99999999999,"), (b"'shape': (", b"'shape': (-"), (b"'|u1'", b"'|O'"),
    (b"'|u1'", b"'<f8'"), (b"'<i8'", b"'|V0'"), (b"'<i8'", b"[('a','<i8')]"), (b"{", b"{" * 90),
    (b"False", b"True"), (b"False", b"None"), (b"'shape'", b"'shap'"), (b"'<i8'", b"('<i8', (9,))"),
    (b"'|u1'", b"'|u1,|u1'"), (b"'|u1'", b"'(99999999,)u1'"), (b"\x01\x00", b"\x03\x00"),
]  # fmt: skip


def edit_headers(rng, data):
    """Edits headers of arrays and writes the archive again, with correct checksums."""
    old, new = HEADERS[rng.integers(len(HEADERS))]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            array = before.read(name)
            end = 10 + struct.unpack("<H", array[8:10])[0]
            header = array[:end].replace(old, new, 1)
            length = struct.pack("<H", len(header) - 10)
            after.writestr(name, header[:8] + length + header[10:] + array[end:])
            if rng.random() < 0.05:
                after.writestr(name, array)
    return file.getvalue()


def mutate(rng, data):
    """Flips bits, replaces bytes, cuts the end, removes or repeats a part."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        match rng.integers(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.integers(8)
            case 1:
                data[at : at + 4] = rng.bytes(len(data[at : at + 4]))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + int(rng.integers(64))]
            case _:
                data[at:at] = data[at : at + int(rng.integers(64))]
    return bytes(data)


def assert_as_declared(source):
    info = source.info
    for split, num in zip(source.load(), (info.num_train, info.num_test), strict=True):
        assert 1 <= len(split.images) <= num
        assert split.images.shape[1:] == info.image_shape
        assert split.images.dtype == info.dtype
        if not info.class_names:
            assert split.labels is None
            continue
        assert split.labels.shape == (len(split.images),)
        assert split.labels.dtype == np.int32
        assert split.labels.min() >= 0
        assert split.labels.max() < len(info.class_names)


def test_any_npz_is_as_declared_or_refused(tmp_path):
    rng, path, num_valid = np.random.default_rng(0), tmp_path / "data.npz", 0

    def check():
        source = open_source(f"npz:{path}", data_dir=None, image_size=IMAGE_SIZE)
        assert_as_declared(source)
        assert source.info.num_train == len(source.load()[0].images)

    for i in range(NUM_NPZ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about casts, and about duplicate names
            data = random_npz(rng)
            if i % 3:
                data = mutate(rng, data) if i % 3 == 1 else edit_headers(rng, data)
        path.write_bytes(data)
        num_valid += not is_refused(check, f"npz {i}")
    print(f"{NUM_NPZ} npz files, {num_valid} valid")
    assert NUM_NPZ * 0.1 < num_valid < NUM_NPZ * 0.9


# Folders


def valid_images():
    """Returns one small file of each common image format and mode."""
    pixels = np.random.default_rng(0).integers(256, size=(11, 13, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    files = []
    for suffix, modes, options in (
        ("png", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), {"exif": exif}),
        ("jpg", ("RGB", "L", "CMYK"), {"exif": exif}),
        ("gif", ("RGB", "P", "L"), {}),
        ("tiff", ("RGB", "CMYK", "LAB", "F", "I;16"), {"compression": "tiff_lzw"}),
        ("tif", ("RGBA", "YCbCr", "P", "1"), {}),
        ("webp", ("RGB", "RGBA"), {"exif": exif}),
        ("bmp", ("RGB", "L", "P", "1"), {}),
        ("ppm", ("RGB", "L", "1"), {}),
    ):
        for mode in modes:
            rgba = Image.fromarray(pixels)
            if mode == "I;16":
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
            else:
                image = Image.new(mode, rgba.size) if mode == "LAB" else rgba.convert("RGB")
                image = rgba if mode == "RGBA" else image.convert(mode)
            file = io.BytesIO()
            image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
            files.append((suffix, file.getvalue()))
    return files


def test_any_file_of_a_folder_is_read_or_skipped(tmp_path):
    rng, folder, files = np.random.default_rng(0), tmp_path / "x", valid_images()
    num_read = []

    def check():
        source = open_folder("folder:x", tmp_path, IMAGE_SIZE)
        assert_as_declared(source)
        num_read.append(sum(len(split.images) for split in source.load()))

    for start in range(0, NUM_IMAGES, 60):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for i in range(start, start + 60):
            suffix, data = files[i % len(files)]
            suffix = suffix if rng.random() < 0.9 else files[rng.integers(len(files))][0]
            (folder / f"{i}.{suffix}").write_bytes(data if i % 20 == 0 else mutate(rng, data))
        assert not is_refused(check, f"files from {start} on")
    print(f"{NUM_IMAGES} image files, {sum(num_read)} read")
    assert NUM_IMAGES * 0.05 < sum(num_read) < NUM_IMAGES * 0.95
