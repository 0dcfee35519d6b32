"""Features of images in Python, equal to those of `python -m hjepa_jax.embed`.

import hjepa_jax

encoder = hjepa_jax.load("runs/cifar10_tiny")
features = encoder.embed(["cat.jpg", "dog.png"])  # {"level_0": float32 [2, D], ...}
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hjepa_jax.config import build
from hjepa_jax.data.given import GivenImages, images_of
from hjepa_jax.data.records import Decoded, Images
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import EmbedFn, Features, extract_features
from hjepa_jax.runs.load import load_encoder
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.paths import local_path


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The target encoder of a run.

    Attributes:
      params: its parameters.
      image_size: S, side of its input images, pixels.
      batch_size: images per call of the encoder.
      embed_fn: jitted `embed_fn(params, uint8 [B, S, S, 3])`.
    """

    params: Any
    image_size: int
    batch_size: int
    embed_fn: EmbedFn

    def embed(self, images: Any) -> Features:
        """Returns the features of images, one row per image, also for a single image.

        Images of another size than the encoder's are resized (bicubic, shorter side) and cropped at
        the centre.

        Args:
          images: one image [H, W, 3] (grey: [H, W, 1] or [H, W]), a batch of images [B, H, W, 3]
            (grey: [B, H, W, 1]), a path, or a list of arrays and paths of any size. Arrays are
            uint8, or floats in [0, 1].

        Returns:
          `level_{l}` [B, D] for each level and, if the encoder has summary tokens, `summary`
          [B, R * D], float32.

        Raises:
          InputError: for another type, shape or range ("images"), or a file that is not an image.
        """
        records = GivenImages(images_of(images), self.image_size)
        if not len(records):
            raise InputError("images", images, "must not be empty")
        features, _, errors = self.embed_records(records, stop_at_error=True)
        assert not errors
        return features

    def embed_records(
        self, records: Images, *, what: str = "", stop_at_error: bool = False
    ) -> tuple[Features, Int[np.ndarray, " n"], list[InputError]]:
        """Returns the features of records, decoded in batches so that memory stays constant.

        Args:
          records: uint8 images of the encoder's size.
          what: title of a progress bar; "" for none.
          stop_at_error: whether an unreadable record is an error. If not, it is skipped.

        Returns:
          Features of the readable records, their rows, and the errors of the other records.
        """
        decoded = Decoded(records, stop_at_error=stop_at_error)
        # A small batch for few images. Powers of two, so that few programs are compiled.
        batch_size = min(self.batch_size, 2 ** (len(records) - 1).bit_length())
        features = extract_features(
            self.embed_fn, self.params, decoded, batch_size=batch_size, what=what
        )
        rows = np.setdiff1d(np.arange(len(records)), [*decoded.errors])
        if decoded.errors:
            features = {name: value[rows] for name, value in features.items()}
        return features, rows, [decoded.errors[row] for row in sorted(decoded.errors)]


def load(workdir: str | pathlib.Path, step: int | str = "last") -> Encoder:
    """Returns the target encoder of a run; see `Encoder.embed`.

    Args:
      workdir: the run's directory. Its data set is not needed.
      step: which checkpoint: "last", "best" (by k-NN) or a number.

    Raises:
      InputError: if the directory holds no run or no such checkpoint.
    """
    folder = local_path("workdir", str(workdir))
    config = load_config(folder)
    model, params = load_encoder(folder, step)
    embed_fn = jax.jit(build.build_embed_fn(config, model))
    return Encoder(params, config.data.image_size, config.eval.batch_size, embed_fn)
