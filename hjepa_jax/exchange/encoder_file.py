"""Reads and writes an encoder in one safetensors file: parameters, config and origin."""

import dataclasses
import json
import pathlib
from typing import IO, Any

import jax
import numpy as np
import optax
from flax import traverse_util

from hjepa_jax.config import Config, build
from hjepa_jax.errors import first_line
from hjepa_jax.exchange.tensors import Tensors, read_safetensors, write_safetensors
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.runs.workdir import parse_config

FORMAT = "hjepa_jax"


@dataclasses.dataclass(frozen=True)
class EncoderFile:
    """The content of an encoder file.

    Attributes:
      config: config of the run.
      model: networks of the run.
      params: parameters of the encoder, as `model` takes them, float32.
      info: sizes, origin and scores of the encoder.
    """

    config: Config
    model: HJEPA
    params: Any
    info: dict[str, Any]


def flat(params: Any) -> Tensors:
    """Returns the parameters by path ("block_0/attention/qkv/kernel"), on the host."""
    found = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    return {name: np.asarray(value) for name, value in found.items()}


def write_encoder(
    file: IO[bytes], config: Config, params: Any, info: dict[str, Any], *, dtype: str
) -> None:
    """Writes an encoder; `dtype` is the type of the tensors in the file."""
    metadata = {"format": FORMAT, "config": config.to_json(), "info": json.dumps(info)}
    tensors = {name: value.astype(dtype) for name, value in flat(params).items()}
    write_safetensors(file, tensors, metadata)


def read_encoder(path: pathlib.Path) -> EncoderFile:
    """Reads an encoder.

    Raises:
      ValueError: the file is damaged, or no encoder file of hjepa_jax.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        rule = "is no encoder of hjepa_jax; python -m hjepa_jax.convert makes a work directory"
        raise ValueError(f"{rule} of a published one")
    try:
        config = parse_config(json.loads(metadata["config"]))
        info = json.loads(metadata["info"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"its config is none of this version: {first_line(error)}") from error
    model = build.build_model(config)
    params = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    check_fits(params, config, model)
    return EncoderFile(config, model, traverse_util.unflatten_dict(params, sep="/"), info)


def check_fits(params: Tensors, config: Config, model: HJEPA) -> None:
    """Compares parameters, by path, with the parameters of the model.

    Raises:
      ValueError: naming parameters of another shape, or with numbers that are not finite.
    """
    create = build.build_create_state(config, model, optax.identity())
    like: dict[str, Any] = traverse_util.flatten_dict(jax.eval_shape(create).target_params, sep="/")
    needed = {name: leaf.shape for name, leaf in like.items()}
    found = {name: value.shape for name, value in params.items()}
    names = sorted(needed.keys() | found.keys())
    differing = [name for name in names if needed.get(name) != found.get(name)]
    if differing:
        told = ", ".join(f"{n} is {found.get(n)}, not {needed.get(n)}" for n in differing[:3])
        raise ValueError(f"its tensors are of another architecture: {told}")
    if bad := [name for name, value in params.items() if not np.isfinite(value).all()]:
        raise ValueError(f"its tensor {min(bad)} has numbers that are not finite")
