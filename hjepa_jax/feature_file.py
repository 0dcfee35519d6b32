"""Writes the features of images that a user names to a file; see `hjepa_jax.embed`."""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from hjepa_jax import api
from hjepa_jax.api import Encoder
from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Source, fit_pixels
from hjepa_jax.data.fingerprint import digest_arrays
from hjepa_jax.data.inputs import FLAG, Given, Inputs, check_input, open_inputs
from hjepa_jax.data.records import Images, Labelled, report_skipped
from hjepa_jax.data.sources import open_source
from hjepa_jax.data.test_split import draw_test
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.feature_cache import params_digest
from hjepa_jax.evaluation.features import progress
from hjepa_jax.evaluation.knn import largest_columns
from hjepa_jax.evaluation.quality import unit_rows
from hjepa_jax.exchange.table import SUFFIXES, Shapes, Shards, write_table
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import select_platform
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.paths import local_path

SHARD_ROWS = 1024  # smallest number of rows of a shard; an interrupted command keeps its shards
NUM_QUERIES = 24  # images in the sheet of neighbours

Piece = tuple[Labelled, range]  # rows of a part that form one shard


def write_features(
    workdir: str,
    inputs: str | Sequence[str],
    output: str,
    *,
    step: str = "last",
    tokens: bool = False,
    features: Sequence[str] = (),
    neighbours: int | None = None,
    platform: str | None = None,
) -> Shapes:
    """Embeds all images of `inputs` and writes the features to `output`.

    After an interruption, a second call continues the work.

    Args:
      workdir: the run's directory, or a file or folder from `hjepa_jax.export`.
      inputs: see `hjepa_jax.data.inputs`.
      output: the file to write, in the format of its suffix; checked before any work.
      step: which checkpoint: "last", "best" (by k-NN) or a number.
      tokens: whether to write the tokens of all patches, too.
      features: names of the features to write, such as "level_0"; empty = all.
      neighbours: K; a page with some images and their K nearest is written beside `output`. None =
        no page.
      platform: backend to use; None = the run's.

    Returns:
      The shapes of the arrays in the file, by name.

    Raises:
      InputError: if a path cannot be read or written ("--input", "--output"), or the folder holds
        no run or no such checkpoint or feature.
    """
    given = [check_input(value) for value in ([inputs] if isinstance(inputs, str) else inputs)]
    target = _output_path(output, given)
    folder = local_path("--workdir", workdir)
    config = None if api.exported_file(folder) else load_config(folder)
    select_platform(platform or (config.platform if config else "auto"))
    encoder = api.load(folder, step)
    config = config or encoder.config
    opened = open_inputs(
        given, lambda source: _open(source, config), image_size=encoder.image_size,
        num_channels=encoder.num_channels, follow_links=config.data.follow_links,
    )  # fmt: skip
    if names := [name for name in features if name not in encoder.feature_names()]:
        known = ", ".join(encoder.feature_names())
        raise InputError("--features", names[0], f"must be some of {known}")
    others = sum(len(part.images) for part in opened.parts) - 1
    if neighbours and neighbours > others:
        raise InputError("--neighbours", neighbours, f"must be at most {others}, the other images")
    try:
        return _write(target, encoder, opened, tuple(features), neighbours, tokens=tokens)
    except OSError as error:
        raise _not_writable(output, error) from error


def _output_path(value: str, given: Sequence[Given]) -> pathlib.Path:
    """Returns the path of the output, after a check that it can be written."""
    path = local_path("--output", value)
    if path.suffix.lower() not in SUFFIXES:
        rule = f"must end in {', '.join(SUFFIXES)}, the formats that are written"
        raise InputError("--output", value, rule)
    if path.is_dir():
        raise InputError("--output", value, "must be a file, this is a folder")
    if path.exists() and any(each.path.exists() and path.samefile(each.path) for each in given):
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


def _open(source: str, config: Config) -> Source:
    """Opens a source as a run of this config does, so that the test images are the same."""
    is_folder = source.startswith(("folder:", "images:"))
    when = "always" if config.data.streaming == "always" and is_folder else "auto"
    streaming = dataclasses.replace(
        build.build_streaming(config), when=when, train_split=None, class_list=None
    )
    return open_source(
        source,
        data_dir=config.data.dir,
        image_size=config.data.image_size,
        seed=config.seed,
        streaming=streaming,
        follow_links=config.data.follow_links,
        num_channels=len(config.data.mean),
        stored_area=config.data.stored_area if is_folder else 1.0,
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A range of rows of images, in the shape that the encoder takes."""

    images: Images
    rows: range
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Num[np.ndarray, "H W C"]:
        return fit_pixels(self.images.read(self.rows[row]), self.image_shape)


def _write(
    output: pathlib.Path,
    encoder: Encoder,
    inputs: Inputs,
    features: tuple[str, ...],
    neighbours: int | None,
    *,
    tokens: bool,
) -> Shapes:
    """Makes the missing shards, then the output file and the page of neighbours."""
    parts = inputs.parts
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
    skipped = [InputError(FLAG, *told) for told in shards.whole("errors")]
    report_skipped(inputs.name, skipped, f"{total} files")
    piece_of = np.repeat(np.arange(len(pieces)), [len(rows) for rows in shards.column("rows")])
    is_test = np.array([pieces[i][0] is not parts[0] for i in piece_of], bool)
    if len({*is_test}) < (len(parts) if inputs.has_split else 1):
        raise InputError(FLAG, inputs.name, f"no image can be read: {skipped[0]}")
    if inputs.has_split and len(parts) == 1:
        columns = shards.columns()
        labels = shards.whole("labels") if "labels" in columns else None
        names = shards.whole("files").tolist() if "files" in columns else ()
        is_test[draw_test(inputs.name, len(is_test), labels, names).held] = True
    shapes = write_table(output, shards, is_test if inputs.has_split else None)
    if neighbours:
        sheet = output.with_suffix(".html")
        _write_sheet(sheet, encoder, shards, pieces, piece_of, features, neighbours)
    shards.remove()
    return shapes


def _write_sheet(
    path: pathlib.Path,
    encoder: Encoder,
    shards: Shards,
    pieces: list[Piece],
    piece_of: Int[np.ndarray, " n"],
    features: Sequence[str] | None,
    k: int,
) -> None:
    """Writes a page with some images and their k nearest by the cosine of the first feature."""
    from hjepa_jax.reporting.neighbour_sheet import Shown, neighbour_sheet  # imports matplotlib

    n, names = len(piece_of), shards.columns()
    column = features[0] if features else "summary" if "summary" in names else "level_0"
    queries = np.unique(np.linspace(0, n - 1, NUM_QUERIES).astype(int))
    wanted = np.isin(np.arange(n), queries)
    of_queries = unit_rows(np.concatenate([*shards.column(column, wanted)]))
    blocks = [of_queries @ unit_rows(part).T for part in shards.column(column)]
    similarity = np.concatenate(blocks, axis=1)
    similarity[np.arange(len(queries)), queries] = -2.0  # an image is no neighbour of itself
    nearest = largest_columns(similarity, min(k, n - 1))
    rows, files = shards.whole("rows"), shards.whole("files") if "files" in names else None

    def shown(row: int, cosine: float | None = None) -> Shown:
        images = pieces[piece_of[row]][0].images
        image = fit_pixels(images.read(int(rows[row])), encoder.image_shape)
        return Shown(f"image {row}" if files is None else str(files[row]), image, cosine)

    groups = [
        [shown(query), *(shown(row, float(similarity[i, row])) for row in nearest[i].tolist())]
        for i, query in enumerate(queries.tolist())
    ]
    with replacing(path) as file:
        file.write(neighbour_sheet(groups, column=column, count=n).encode())


def _made_from(
    encoder: Encoder, parts: Sequence[Labelled], features: tuple[str, ...], tokens: bool
) -> dict[str, Any]:
    """Returns a description of everything that the rows of a shard depend on."""
    images = []
    for part in parts:
        stamps = getattr(part.images, "stamps", None)  # None for arrays, whose content is hashed
        items = getattr(part.images, "items", None)
        of_arrays = digest_arrays(items) if isinstance(items, np.ndarray) else ""
        of_files = hashlib.sha256(json.dumps(stamps()).encode()).hexdigest() if stamps else ""
        labels = None if part.labels is None else digest_arrays(part.labels)
        images.append([len(part.images), labels, of_files or of_arrays])
    encoder_digest = [params_digest(encoder.params), str(encoder.config)]
    return {"encoder": encoder_digest, "images": images, "features": features, "tokens": tokens}


def _embed(
    encoder: Encoder, part: Labelled, rows: range, features: tuple[str, ...], tokens: bool
) -> dict[str, np.ndarray]:
    """Returns the arrays of a shard by name."""
    images = _Rows(part.images, rows, encoder.image_shape)
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
