"""Extracted features on disk: one file per encoder, split and data set."""

import hashlib
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from hjepa_jax.data.fingerprint import digest_arrays
from hjepa_jax.evaluation.features import EmbedFn, Features
from hjepa_jax.runtime.backend import version
from hjepa_jax.runtime.files import replacing


class FeatureCache:
    """Extracted features in a directory.

    A file stores digests of the program, the parameters and the images. If one of them changes, the
    features are extracted again. Each set of images has its own file.

    Args:
      directory: created when the first features are stored.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def get(
        self,
        name: str,
        make: Callable[[], Features],
        embed: EmbedFn,
        encoder_params: Any,
        *arrays: Shaped[np.ndarray, "n ..."],
    ) -> Features:
        """Returns stored features, or extracts and stores them.

        `name` names encoder and split; the file name also contains a digest of the arrays. `make`
        extracts the features by calling the jitted `embed(encoder_params, *arrays)`.
        """
        images = digest_arrays(*arrays)
        program = program_digest(embed, encoder_params, *arrays)
        made_from = f"{program} {params_digest(encoder_params)} {images}"
        path = self._directory / f"{name}_{images}.npz"
        if path.exists():
            try:
                with path.open("rb") as file, np.load(file) as stored:
                    if str(stored["made_from"]) == made_from:
                        return {key: stored[key] for key in stored.files if key != "made_from"}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # damaged on disk: extracted again
        features = make()
        self._directory.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, made_from=np.array(made_from), **features)  # pyright: ignore[reportArgumentType]
        return features


def params_digest(params: Any) -> str:
    """Returns 16 hexadecimal digits over the names, shapes and values of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def program_digest(
    embed: EmbedFn, encoder_params: Any, *arrays: Shaped[np.ndarray, "n ..."]
) -> str:
    """Returns 16 hexadecimal digits over the program of `embed`, as the compiler receives it.

    The program contains the preprocessing, the networks and all constants. So the digest changes if
    and only if a change of config or code changes the computation. It also covers compiler version
    and backend, because they affect rounding. Only types and shapes of `encoder_params` and of the
    rows of `arrays` enter.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), encoder_params)
    rows = [jax.ShapeDtypeStruct((2, *array.shape[1:]), array.dtype) for array in arrays]
    program = embed.lower(params, *rows).as_text()  # pyright: ignore[reportFunctionMemberAccess]
    about = f"{jax.default_backend()} {version('jaxlib')} {program}"
    return hashlib.sha256(about.encode()).hexdigest()[:16]
