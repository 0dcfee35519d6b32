"""Features of images in Python, equal to those of `python -m hjepa_jax.embed`.

import hjepa_jax

encoder = hjepa_jax.load("cifar10_tiny")  # ships with the package
encoder = hjepa_jax.load("runs/cifar10_tiny")  # a run, or a file that `export` has made
features = encoder.embed(["cat.jpg", "dog.png"])  # {"level_0": float32 [2, D], ...}
tokens = encoder.tokens("cat.jpg")  # float32 [1, G, G, D], a row and a column per patch
names, probabilities = encoder.predict("cat.jpg")  # if the run was fine-tuned
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from hjepa_jax.config import Config, build
from hjepa_jax.config.sizes import grid_of
from hjepa_jax.data.given import GivenImages, images_of
from hjepa_jax.data.records import Decoded, Images
from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.classifier_file import read_classifier
from hjepa_jax.evaluation.features import EmbedFn, Features, extract_features
from hjepa_jax.evaluation.finetune import Classifier, make_classify_fn
from hjepa_jax.exchange.encoder_file import read_encoder
from hjepa_jax.exchange.export import describe
from hjepa_jax.runs.load import load_target
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.paths import local_path

PRETRAINED = pathlib.Path(__file__).parent / "pretrained"  # a folder of `export` for each encoder


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The target encoder of a run.

    Attributes:
      params: its parameters.
      image_size: side of its input images in pixels, or (height, width).
      batch_size: images per call of the encoder.
      embed_fn: jitted `embed_fn(params, images)`, for stored images [B, H, W, C].
      tokens_fn: the same for the tokens of the patches, {"tokens": [B, N, D]}.
      config: config of the run.
      describe: returns the value of `info`.
      read_classifier: returns the fine-tuned parameters, the names of the classes, and a jitted
        function for {"logits": [B, classes]}; None if the encoder comes from a file.
      num_channels: C, channels of its input images.
    """

    params: Any
    image_size: Sides
    batch_size: int
    embed_fn: EmbedFn
    tokens_fn: EmbedFn | None = None
    config: Config = None
    describe: Callable[[], dict[str, Any]] = dict
    read_classifier: Callable[[], tuple[Any, list[str], EmbedFn]] | None = None
    num_channels: int = 3

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its input images."""
        return (*pair(self.image_size), self.num_channels)

    @property
    def info(self) -> dict[str, Any]:
        """Sizes, origin and scores of the encoder."""
        return self.describe()

    def feature_names(self) -> list[str]:
        """Names of the features that `embed` returns."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), np.uint8)
        return [*jax.eval_shape(self.embed_fn, self.params, images)]

    def embed(self, images: Any) -> Features:
        """Returns the features of images, one row per image, also for a single image.

        Images of another size are resized (bicubic) to cover `image_size`, and cropped at the
        centre.

        Args:
          images: one image [H, W, C] (grey: [H, W, 1] or [H, W]), a batch of images [B, H, W, C]
            (grey: [B, H, W, 1]), a path, or a list of arrays and paths of any size. Arrays are
            uint8, uint16 or float; floats must lie in [0, 1] if C is 3.

        Returns:
          `level_{l}` [B, D] for each level and, if the encoder has summary tokens, `summary`
          [B, R * D], float32.

        Raises:
          InputError: for another type, shape or range ("images"), or a file that is not an image.
        """
        return self.embed_records(self._given(images), stop_at_error=True)[0]

    def tokens(self, images: Any) -> Float[np.ndarray, "B gh gw D"]:
        """Returns the tokens of all patches of images, after the last LayerNorm.

        Args:
          images: see `embed`.

        Returns:
          A token for each row and column of the grid of patches.

        Raises:
          InputError: see `embed`.
        """
        return self.token_records(self._given(images), stop_at_error=True)[0]

    def predict(self, images: Any) -> tuple[list[str], Float[np.ndarray, "B classes"]]:
        """Classifies images with the encoder and head of the newest fine-tuning.

        `hjepa probe --protocols=finetune` trains both and stores them in the work directory.

        Args:
          images: see `embed`.

        Returns:
          The name of the most likely class of each image, and the probabilities of all classes in
          the order of the labels.

        Raises:
          InputError: see `embed`, or if the run was not fine-tuned ("workdir").
        """
        if self.read_classifier is None:
            rule = "is an encoder without a classifier; give the work directory of its fine-tuning"
            raise InputError("workdir", "", rule)
        params, names, classify = self.read_classifier()
        found, _, _ = self._extract(classify, self._given(images), True, params)
        probabilities = softmax(found["logits"], axis=1)
        return [names[i] for i in probabilities.argmax(axis=1)], probabilities

    def _given(self, images: Any) -> GivenImages:
        given = images_of(images, self.num_channels)
        records = GivenImages(given, self.image_size, self.num_channels)
        if not len(records):
            raise InputError("images", images, "must not be empty")
        return records

    def token_records(
        self, records: Images, *, stop_at_error: bool = False
    ) -> tuple[Float[np.ndarray, "n gh gw D"], Int[np.ndarray, " n"], list[InputError]]:
        """Returns the same as `tokens`, for records; see `embed_records`."""
        assert self.tokens_fn is not None
        found, rows, errors = self._extract(self.tokens_fn, records, stop_at_error)
        tokens = found["tokens"]
        return tokens.reshape(len(tokens), *grid_of(self.config), -1), rows, errors

    def embed_records(
        self, records: Images, *, stop_at_error: bool = False
    ) -> tuple[Features, Int[np.ndarray, " n"], list[InputError]]:
        """Returns the features of records, decoded in batches so that memory stays constant.

        Args:
          records: images of the encoder's size, with the pixels of the run.
          stop_at_error: whether an unreadable record is an error. If not, it is skipped.

        Returns:
          Features of the readable records, their rows, and the errors of the other records.
        """
        return self._extract(self.embed_fn, records, stop_at_error)

    def _extract(
        self, fn: EmbedFn, records: Images, stop_at_error: bool, params: Any = None
    ) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " n"], list[InputError]]:
        decoded = Decoded(records, stop_at_error=stop_at_error)
        # Few images need only a small batch. Powers of two limit the number of compiled programs.
        batch_size = min(self.batch_size, 2 ** (len(records) - 1).bit_length())
        params = self.params if params is None else params
        features = extract_features(fn, params, decoded, batch_size=batch_size)
        rows = np.setdiff1d(np.arange(len(records)), [*decoded.errors])
        if decoded.errors:
            features = {name: value[rows] for name, value in features.items()}
        return features, rows, [decoded.errors[row] for row in sorted(decoded.errors)]


def pretrained_names() -> list[str]:
    """Returns the names of the trained encoders that ship with the package."""
    return sorted(file.parent.name for file in PRETRAINED.glob("*/model.safetensors"))


def pretrained(name: str) -> pathlib.Path:
    """Returns the folder of a trained encoder that ships with the package.

    Raises:
      InputError: there is no such encoder ("--model").
    """
    if name not in pretrained_names():
        raise InputError("--model", name, f"must be one of {', '.join(pretrained_names())}")
    return PRETRAINED / name


def exported_file(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the exported encoder file at `path`, a file or folder; None if there is none."""
    inside = path / "model.safetensors"
    return inside if inside.is_file() else path if path.is_file() else None


def load(workdir: str | pathlib.Path, step: int | str = "last") -> Encoder:
    """Returns the target encoder of a run; see `Encoder.embed`.

    Args:
      workdir: the run's directory, or a file or folder from `hjepa_jax.export`. The data set is not
        needed. If no such path exists, the name of an encoder that ships with the package.
      step: which checkpoint of a run: "last", "best" (by k-NN) or a number.

    Raises:
      InputError: the directory holds no run or no such checkpoint, or the file is no encoder.
    """
    path = local_path("workdir", str(workdir))
    if not path.exists() and str(workdir) in pretrained_names():
        path = PRETRAINED / str(workdir)
    if exported := exported_file(path):
        try:
            found = read_encoder(exported)
        except (ValueError, OSError) as error:
            raise InputError("workdir", str(workdir), str(error)) from error
        return _encoder(found.config, found.model, found.params, lambda: found.info)
    config = load_config(path)
    model, params, at = load_target(path, step)

    @functools.cache
    def classifier() -> tuple[Any, list[str], EmbedFn]:
        fine_tuned, names = read_classifier(path)
        network = Classifier(model.context_encoder, len(names))
        return fine_tuned, names, make_classify_fn(network, build.build_preprocess(config))

    found = _encoder(config, model, params, lambda: describe(path, config, params, at))
    return dataclasses.replace(found, read_classifier=classifier)


def _encoder(
    config: Config, model: Any, params: Any, info: Callable[[], dict[str, Any]]
) -> Encoder:
    return Encoder(
        params,
        config.data.image_size,
        config.eval.batch_size,
        jax.jit(build.build_embed_fn(config, model)),
        jax.jit(build.build_tokens_fn(config, model, dtype="float32")),
        config,
        info,
        num_channels=len(config.data.mean),
    )
