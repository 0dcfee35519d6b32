"""Exports an encoder as a program from images to features that does not need this package."""

import logging
from collections.abc import Callable
from typing import Any

import jax
from jax import export as jax_export

from hjepa_jax.config import Config, build
from hjepa_jax.data.sides import pair
from hjepa_jax.models.hjepa import HJEPA

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MAX_BYTES = 2**30  # limit for the parameters, which are constants of the program


def to_stablehlo(config: Config, model: HJEPA, params: Any, dtype: str) -> bytes:
    """Returns a serialized program from `dtype` images [B, H, W, C], for any B, to features.

    The features are those of `hjepa_jax.load(workdir).embed`, and "tokens" [B, N, D].

    Raises:
      ValueError: the parameters are larger than `MAX_BYTES`.
    """
    shape = jax_export.symbolic_shape(f"b, {', '.join(map(str, _image_shape(config)))}")
    images = jax.ShapeDtypeStruct(shape, dtype)
    program = jax.jit(_program(config, model, params))
    return bytes(jax_export.export(program, platforms=PLATFORMS)(images).serialize())


def to_onnx(config: Config, model: HJEPA, params: Any, dtype: str) -> bytes:
    """Returns the same program as an ONNX model; its input is "images".

    Raises:
      ValueError: see `to_stablehlo`, or if jax2onnx is not installed.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("needs the package jax2onnx (extra onnx): pip install jax2onnx") from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of types that it infers later
    program = _program(config, model, params)
    images = jax.ShapeDtypeStruct((1, *_image_shape(config)), dtype)
    names = sorted(jax.eval_shape(program, images))

    def outputs(images: Any) -> tuple[Any, ...]:
        found = program(images)
        return tuple(found[name] for name in names)

    converted = jax2onnx.to_onnx(
        outputs, [jax.ShapeDtypeStruct(("B", *images.shape[1:]), dtype)],
        model_name="hjepa_jax", input_names=["images"], output_names=names,
    )  # fmt: skip
    return converted.SerializeToString()


PROGRAMS: dict[str, Callable[..., bytes]] = {"stablehlo": to_stablehlo, "onnx": to_onnx}


def _image_shape(config: Config) -> tuple[int, int, int]:
    return (*pair(config.data.image_size), len(config.data.mean))


def _program(config: Config, model: HJEPA, params: Any) -> Callable[[Any], dict[str, Any]]:
    if sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > MAX_BYTES:
        raise ValueError("takes at most 1 GiB of parameters; the other formats take more")
    embed = build.build_embed_fn(config, model)
    tokens = build.build_tokens_fn(config, model, dtype="float32")
    return lambda images: {**embed(params, images), **tokens(params, images)}
