"""Writes the features of images, from the target encoder of a run, into a file.

  python -m hjepa_jax.embed --workdir=DIR --input=FOLDER|FILE.npz --output=FILE.npz
    [--step=last|best|N]

The input is read like `data.source` folder:<path> or npz:<path>, but batch by batch: memory does
not grow with the number of files. The output holds, for the train and the test split,
`<split>_level_<l>` [n, D], `<split>_summary` [n, R * D], `<split>_labels` and, for a folder,
`<split>_files`: the name, within the folder, of the file of each row. A file that is no image is
named on stderr and has no row.

If the input has no test split of its own, the run's rule and seed choose one. So if a run was
trained on the input, `test_files` are the files that it never saw.

`hjepa_jax.load(DIR).embed(images)` gives the same features in Python. Both bring an image of
another size to that of the encoder in one way: shorter side resized (bicubic), centre cut out.
"""

import dataclasses
import pathlib
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any

from absl import flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from hjepa_jax.api import Encoder
    from hjepa_jax.config import Config
    from hjepa_jax.data.sources import Source

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Image folder or .npz file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.", required=True)
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to use: last, best (by k-NN) or a step.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    path, kind = _input_path(_INPUT.value)
    output = _output_path(_OUTPUT.value, path)
    if kind == "npz":
        _check_memory(_INPUT.value, path)

    from hjepa_jax import api, run_dir
    from hjepa_jax.platform import select_platform

    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    config = run_dir.load_config(workdir)
    select_platform(_PLATFORM.value or config.platform)
    source = _open(f"{kind}:{path}", config)
    encoder = api.load(workdir, _STEP.value)
    arrays = _embed(encoder, source, config.seed)
    _write(output, arrays)
    print(f"{_OUTPUT.value}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def _input_path(value: str) -> tuple[pathlib.Path, str]:
    """The input and its kind, "folder" or "npz"."""
    path = pathlib.Path(value).expanduser()
    if path.is_dir():
        return path, "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return path, "npz"
    found = "this is another file" if path.exists() else "there is no such file"
    raise InputError("--input", value, f"must be a folder of images or a .npz file; {found}")


def _output_path(value: str, source: pathlib.Path) -> pathlib.Path:
    """The output, which can be written; checked before hours of work."""
    path = pathlib.Path(value).expanduser()
    if path.suffix.lower() != ".npz":
        raise InputError("--output", value, "must end in .npz, the format that is written")
    if path.is_dir():
        raise InputError("--output", value, "must be a file, this is a folder")
    if path.exists() and path.samefile(source):
        raise InputError("--output", value, "must be another file than --input")
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # access rights alone do not tell
            pass
    except OSError as error:
        raise _not_writable(error) from error
    return path


def _not_writable(error: OSError) -> InputError:
    rule = f"must be a file that can be written ({error.strerror})"
    return InputError("--output", _OUTPUT.value, rule)


def _check_memory(value: str, path: pathlib.Path) -> None:
    """Refuses a .npz file whose arrays do not fit in memory: they are read as a whole."""
    from hjepa_jax.host_memory import available_bytes

    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        return  # the source says what is wrong with it
    available = available_bytes()
    if needed > available:
        rule = (
            f"its arrays need {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB "
            "are available; put the images into a folder, which is read file by file"
        )
        raise InputError("--input", value, rule)


def _open(source: str, config: "Config") -> "Source":
    """Opens the input as a run of this config would, so that it holds out the same test images."""
    from hjepa_jax import build
    from hjepa_jax.data.sources import open_source

    when = (
        "always" if config.data.streaming == "always" and source.startswith("folder:") else "auto"
    )
    streaming = dataclasses.replace(
        build.build_streaming(config), when=when, train_split=None, class_list=None
    )
    try:
        return open_source(
            source,
            data_dir=None,
            image_size=config.data.image_size,
            seed=config.seed,
            streaming=streaming,
        )
    except InputError as error:
        where = "" if error.value == source else f"{error.value} "
        raise InputError("--input", _INPUT.value, where + error.rule) from error


def _embed(encoder: "Encoder", source: "Source", seed: int) -> "dict[str, np.ndarray]":
    """The arrays of the output, by name."""
    import numpy as np

    from hjepa_jax.data.given import GivenImages
    from hjepa_jax.data.records import Labelled, report_skipped

    parts = source.parts or tuple(
        Labelled(GivenImages(split.images, encoder.image_size), split.labels, split.names)
        for split in source.load()
    )
    found, skipped = [], []
    for part in parts:
        features, rows, errors = encoder.embed_records(part.images, what="features")
        skipped += errors
        found.append(features | {"labels": part.labels[rows]})
        if part.names:
            found[-1]["files"] = np.array(part.names)[rows]
    report_skipped(source.name, skipped, f"{sum(len(part.labels) for part in parts)} files")
    if len(found) == 1:
        found = _hold_out(source.name, found[0], seed)
    return {
        f"{split}_{name}": array
        for split, arrays in zip(("train", "test"), found, strict=True)
        for name, array in arrays.items()
    }


def _hold_out(source: str, arrays: "dict[str, Any]", seed: int) -> "list[dict[str, Any]]":
    """Splits rows of files into train and test, as the run does with their images."""
    import numpy as np

    from hjepa_jax.data.sources import Split, hold_out_test

    files = arrays["files"].tolist()
    blank = np.zeros((len(files), 1, 1, 3), np.uint8)  # no image decides where it belongs
    splits = hold_out_test(source, Split(blank, arrays["labels"], tuple(files)), seed)
    row = {name: i for i, name in enumerate(files)}
    rows = [[row[name] for name in split.names] for split in splits]
    return [{name: array[part] for name, array in arrays.items()} for part in rows]


def _write(path: pathlib.Path, arrays: "dict[str, Any]") -> None:
    import numpy as np

    from hjepa_jax.whole_files import replacing

    try:
        with replacing(path) as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise _not_writable(error) from error


if __name__ == "__main__":
    cli.run(main)
