"""Writes the features of an image folder or a .npz file to a file; see `hjepa_jax.embed`."""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from hjepa_jax import api
from hjepa_jax.api import Encoder
from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Source
from hjepa_jax.data.fingerprint import digest_arrays
from hjepa_jax.data.given import GivenImages
from hjepa_jax.data.records import Images, Labelled, report_skipped
from hjepa_jax.data.sources import open_source
from hjepa_jax.data.test_split import draw_test
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.feature_cache import params_digest
from hjepa_jax.evaluation.features import progress
from hjepa_jax.exchange.table import SUFFIXES, Shapes, Shards, write_table
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import select_platform
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.paths import local_path

SHARD_ROWS = 1024  # at least, of a file that an interrupted command need not make again


def write_features(
    workdir: str,
    source: str,
    output: str,
    *,
    step: str = "last",
    tokens: bool = False,
    features: Sequence[str] = (),
    platform: str | None = None,
) -> Shapes:
    """Embeds all images of `source` and writes the features to `output`.

    A second call continues after an interruption.

    Args:
      workdir: the run's directory, or a file from `hjepa_jax.export`.
      source: a folder of images or a .npz file.
      output: the file to write, in the format of its suffix; checked before any work.
      step: which checkpoint: "last", "best" (by k-NN) or a number.
      tokens: whether to write the tokens of all patches, too.
      features: names of the features to write, such as "level_0"; empty = all.
      platform: backend to use; None = the run's.

    Returns:
      The shapes of the arrays in the file, by name.

    Raises:
      InputError: if a path cannot be read or written ("--input", "--output"), or the folder holds
        no run or no such checkpoint or feature.
    """
    path, kind = _input_path(source)
    target = _output_path(output, path)
    folder = local_path("--workdir", workdir)
    config = None if folder.is_file() else load_config(folder)
    select_platform(platform or (config.platform if config else "auto"))
    encoder = api.load(folder, step)
    images = _open(f"{kind}:{path}", config or encoder.config, source)
    if names := [name for name in features if name not in encoder.feature_names()]:
        known = ", ".join(encoder.feature_names())
        raise InputError("--features", names[0], f"must be some of {known}")
    try:
        return _write(target, encoder, images, tuple(features), tokens=tokens)
    except OSError as error:
        raise _not_writable(output, error) from error


def _input_path(value: str) -> tuple[pathlib.Path, str]:
    """Returns the input and its kind: "folder", "images" or "npz"."""
    kind, _, rest = value.partition(":")
    if kind in ("folder", "images") and rest and local_path("--input", rest).is_dir():
        return local_path("--input", rest), kind
    path = local_path("--input", value)
    if path.is_dir():
        return path, "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return path, "npz"
    found = "this is another file" if path.exists() else "there is no such file"
    raise InputError("--input", value, f"must be a folder of images or a .npz file; {found}")


def _output_path(value: str, source: pathlib.Path) -> pathlib.Path:
    """Returns the path of the output, after a check that it can be written."""
    path = local_path("--output", value)
    if path.suffix.lower() not in SUFFIXES:
        rule = f"must end in {', '.join(SUFFIXES)}, the formats that are written"
        raise InputError("--output", value, rule)
    if path.is_dir():
        raise InputError("--output", value, "must be a file, this is a folder")
    if path.exists() and path.samefile(source):
        raise InputError("--output", value, "must be another file than --input")
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # access rights alone are not enough
            pass
    except OSError as error:
        raise _not_writable(value, error) from error
    return path


def _not_writable(value: str, error: OSError) -> InputError:
    rule = f"must be a file that can be written ({error.strerror})"
    return InputError("--output", value, rule)


def _open(source: str, config: Config, value: str) -> Source:
    """Opens the input like a run of this config, so that the test images are the same."""
    when = (
        "always"
        if config.data.streaming == "always" and source.startswith(("folder:", "images:"))
        else "auto"
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
            follow_links=config.data.follow_links,
            num_channels=len(config.data.mean),
            stored_area=config.data.stored_area,
        )
    except InputError as error:
        where = "" if error.value == source else f"{error.value} "
        raise InputError("--input", value, where + error.rule) from error


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some of the rows of images."""

    images: Images
    rows: range

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.image_shape

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Num[np.ndarray, "H W C"]:
        return self.images.read(self.rows[row])


def _write(
    output: pathlib.Path,
    encoder: Encoder,
    source: Source,
    features: tuple[str, ...],
    *,
    tokens: bool,
) -> Shapes:
    """Makes the shards that are not there, then the file."""
    parts = source.parts or tuple(
        Labelled(
            GivenImages(split.images, encoder.image_size, encoder.num_channels, source.info.dtype),
            split.labels,
            split.names,
        )
        for split in source.load()
    )
    shards = Shards(output, _made_from(encoder, parts, features, tokens))
    size = -(-SHARD_ROWS // encoder.batch_size) * encoder.batch_size
    pieces = [
        (part, range(start, min(start + size, len(part.images))))
        for part in parts
        for start in range(0, len(part.images), size)
    ]
    total = sum(len(part.images) for part in parts)
    with progress("features", total, unit=" images") as bar:
        for number, (part, rows) in enumerate(pieces):
            path = shards.add(number)
            if not path.exists():
                arrays = _embed(encoder, part, rows, features, tokens)
                with replacing(path) as file:
                    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            bar.update(len(rows))
    skipped = [InputError("--input", *told) for told in shards.whole("errors")]
    report_skipped(source.name, skipped, f"{total} files")
    counts = [len(rows) for rows in shards.column("rows")]
    is_test = np.repeat([part is not parts[0] for part, _ in pieces], counts)
    if len({*is_test}) < len(parts):
        raise InputError("--input", source.name, f"no image can be read: {skipped[0]}")
    if len(parts) == 1:
        columns = shards.columns()
        labels = shards.whole("labels") if "labels" in columns else None
        names = shards.whole("files").tolist() if "files" in columns else ()
        is_test[draw_test(source.name, len(is_test), labels, names).held] = True
    shapes = write_table(output, shards, is_test)
    shards.remove()
    return shapes


def _made_from(
    encoder: Encoder, parts: Sequence[Labelled], features: tuple[str, ...], tokens: bool
) -> dict[str, Any]:
    """What the rows of a shard depend on."""
    images = []
    for part in parts:
        stamps = getattr(part.images, "stamps", None)  # not of arrays, whose content is at hand
        items = getattr(part.images, "items", None)
        of_arrays = digest_arrays(items) if isinstance(items, np.ndarray) else ""
        of_files = hashlib.sha256(json.dumps(stamps()).encode()).hexdigest() if stamps else ""
        images.append([len(part.images), part.labels is not None, of_files or of_arrays])
    encoder_digest = [params_digest(encoder.params), str(encoder.config)]
    return {"encoder": encoder_digest, "images": images, "features": features, "tokens": tokens}


def _embed(
    encoder: Encoder, part: Labelled, rows: range, features: tuple[str, ...], tokens: bool
) -> dict[str, np.ndarray]:
    """The columns of a shard."""
    images = _Rows(part.images, rows)
    found, kept, errors = encoder.embed_records(images)
    arrays: dict[str, Any] = {name: found[name] for name in features or found}
    if tokens:
        arrays["tokens"], _, _ = encoder.token_records(images)
    kept = np.asarray(rows)[kept]
    arrays["rows"] = kept
    if part.labels is not None:
        arrays["labels"] = part.labels[kept]
    if part.names:
        arrays["files"] = np.array(part.names)[kept]
    told = [[str(error.value), error.rule] for error in errors]
    return {**arrays, "errors": np.array(told, str).reshape(-1, 2)}
