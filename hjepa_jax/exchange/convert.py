"""Makes a work directory from a published encoder."""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from hjepa_jax.config import Config, base_config, build
from hjepa_jax.config.fields import is_a
from hjepa_jax.config.validation import validate
from hjepa_jax.errors import InputError
from hjepa_jax.exchange.encoder_file import FORMAT, check_fits, flat, read_encoder
from hjepa_jax.exchange.layouts import TIMM, Layout, Sizes, choose_layout, to_here
from hjepa_jax.exchange.resample import resample
from hjepa_jax.exchange.tensors import Tensors, read_safetensors, read_torch
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import empty_window, make_averages
from hjepa_jax.runs.checkpoint import Checkpoints
from hjepa_jax.runs.workdir import writing
from hjepa_jax.runtime.backend import initialise
from hjepa_jax.runtime.files import new_folder
from hjepa_jax.runtime.paths import local_path

FIELD = "--input"
RECORD = "converted.json"
# Attention heads of published vision transformers by width, because tensors do not reveal them.
NUM_HEADS = {
    192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16,
}  # fmt: skip
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GELU_NAMES = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
# Keys of dictionaries in a PyTorch checkpoint that may hold the encoder, preferred ones first.
CHECKPOINT_KEYS = ("target_encoder", "teacher", "model", "state_dict", "model_state_dict")


@dataclasses.dataclass(frozen=True)
class Described:
    """Content of the JSON files beside the tensors; empty if there are none.

    Attributes:
      config: config.json of Hugging Face or timm.
      mean, std: statistics of pixels in [0, 1], per channel; None = unknown.
      num_summary_tokens: number of the tokens before the patches that are summary tokens; None =
        the class token only.
    """

    config: dict[str, Any]
    mean: Any = None
    std: Any = None
    num_summary_tokens: int | None = None


def convert(
    source: str | pathlib.Path,
    workdir: str | pathlib.Path,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    data: str | None = None,
) -> Config:
    """Writes a work directory that the other commands (probe, embed, export) accept.

    Args:
      source: a .safetensors file, a file of `torch.save`, or a folder with .safetensors files and a
        config.json, as Hugging Face and timm write it; or a file that `export` has written.
      workdir: directory to make; it must not exist or be empty.
      image_size: side of the images, pixels; None = the size of the encoder. For another size the
        position embeddings are resampled.
      num_heads: attention heads, if neither config.json nor the width determines them.
      data: `data.source` of the work directory; None = the default.

    Returns:
      The config of the work directory.

    Raises:
      InputError: the file is damaged, or no vision transformer of a known layout. In that case
        nothing is written.
    """
    path, target = local_path(FIELD, str(source)), local_path("--workdir", str(workdir))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("--workdir", str(workdir), "must be a new or empty directory")
    try:
        tensors, metadata, digest = _read(path)
        if metadata.get("format") == FORMAT:
            if image_size or num_heads:
                raise ValueError("it is an encoder of hjepa_jax: its sizes are given")
            found = read_encoder(path)
            layout, config, params = FORMAT, found.config.unlock(), flat(found.params)
        else:
            described = _describe(path if path.is_dir() else path.parent)
            names = choose_layout(set(tensors))
            params, sizes = to_here(tensors, names, described.num_summary_tokens)
            config = _config(sizes, names, described, image_size=image_size, num_heads=num_heads)
            grid_size = config.data.image_size // sizes.patch_size
            table = params["positions/embedding"]
            params["positions/embedding"] = resample(table, grid_size, antialias=names.antialias)
            layout = names.name
        if data is not None:
            config.data.source = data
        validate(config)
        state = _state(config.lock(), params)
    except (ValueError, OSError) as error:
        raise InputError(FIELD, str(source), str(error)) from error
    _write(target, config, state, {"file": path.name, "sha256": digest, "layout": layout})
    return config


def _read(path: pathlib.Path) -> tuple[Tensors, dict[str, str], str]:
    """Returns tensors and metadata of a file or folder, and the SHA-256 of its content."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError("the folder has no .safetensors file")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError("there is no such file or folder")
    digest, tensors, metadata = hashlib.sha256(), {}, {}
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
        if file.suffix == ".safetensors":
            found, metadata = read_safetensors(file)
            tensors |= found
        else:
            tensors |= _torch(file)
    return tensors, {} if path.is_dir() else metadata, digest.hexdigest()


def _torch(path: pathlib.Path) -> Tensors:
    """Returns the tensors of the encoder in a PyTorch checkpoint."""
    file = read_torch(path)
    content = file.content
    while isinstance(content, dict):
        inner = next((k for k in CHECKPOINT_KEYS if isinstance(content.get(k), dict)), None)
        if inner is None:
            return file.tensors(content)
        content = content[inner]
    raise ValueError("it holds no dictionary of tensors")


def _describe(folder: pathlib.Path) -> Described:
    found = {}
    for name in ("config.json", "preprocessor_config.json"):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found[name] = {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its {name} is no JSON ({error})") from error
        if not isinstance(found[name], dict):
            raise ValueError(f"its {name} is no JSON object")
    config, images = found["config.json"], found["preprocessor_config.json"]
    trained = config.get("pretrained_cfg") or {}  # a field of timm
    mean, std = images.get("image_mean"), images.get("image_std")
    ours = config.get("hjepa_jax")  # written by `export`
    num_summaries = ours.get("num_summary_tokens") if isinstance(ours, dict) else None
    mean, std = mean or trained.get("mean"), std or trained.get("std")
    return Described(config, mean, std, num_summaries if is_a(int, num_summaries) else None)


def _config(
    sizes: Sizes,
    layout: Layout,
    described: Described,
    *,
    image_size: int | None,
    num_heads: int | None,
) -> Config:
    """Returns the config of the work directory, unlocked and not validated."""
    c, theirs = base_config(), described.config
    for name, value in (
        ("hidden_size", sizes.width),
        ("num_features", sizes.width),
        ("num_hidden_layers", sizes.depth),
        ("patch_size", sizes.patch_size),
    ):
        if theirs.get(name, value) != value:
            raise ValueError(f"its config.json has {name} {theirs[name]!r}, its tensors {value}")
    heads = num_heads or theirs.get("num_attention_heads") or NUM_HEADS.get(sizes.width)
    if heads is None:
        raise ValueError(f"the number of heads at width {sizes.width} is not known: --num_heads")
    arguments = theirs.get("model_args") or {}  # a field of timm
    gelu = theirs.get("hidden_act") or arguments.get("act_layer") or "gelu"
    if gelu not in GELU_NAMES:
        raise ValueError(f"its activation is {gelu!r}, and must be one of {', '.join(GELU_NAMES)}")
    c.data.image_size = image_size or sizes.grid_size * sizes.patch_size
    c.data.mean = tuple(map(float, described.mean or IMAGENET["mean"]))
    c.data.std = tuple(map(float, described.std or IMAGENET["std"]))
    c.model.width, c.model.depth, c.model.num_heads = sizes.width, sizes.depth, int(heads)
    c.model.mlp_ratio = _mlp_ratio(sizes)
    c.model.patch_size = sizes.patch_size
    c.model.num_levels = min(2, 1 + int(math.log2(c.data.image_size // sizes.patch_size)))
    c.model.num_summary_tokens = sizes.num_summary_tokens
    c.model.num_registers = sizes.num_registers
    c.model.layer_scale = 1.0 if sizes.layer_scale else 0.0
    c.model.gelu = GELU_NAMES[gelu]
    default_epsilon = 1e-6 if layout is TIMM else 1e-12
    c.model.layer_norm_epsilon = float(theirs.get("layer_norm_eps", default_epsilon))
    if c.data.image_size // sizes.patch_size < 8:  # blocks of whole cells may not fit this grid
        c.mask.kind, c.mask.align_level = "random", 0
    c.loss.regularizer, c.loss.regularizer_weight = "none", 0.0
    c.loss.summary_weight = float(sizes.num_summary_tokens > 0)
    return c


def _mlp_ratio(sizes: Sizes) -> float:
    """Returns a ratio r with int(width * r) equal to the hidden width, despite rounding."""
    ratio = sizes.hidden / sizes.width
    return ratio if int(sizes.width * ratio) == sizes.hidden else math.nextafter(ratio, math.inf)


def _state(config: Config, params: Tensors) -> TrainState:
    """Returns a state at step 0 with the published encoder as context and target encoder.

    It has no optimizer state and no key, which only training needs.

    Raises:
      ValueError: the tensors do not fit the model of the config.
    """
    model = build.build_model(config)
    check_fits(params, config, model)
    create = build.build_create_state(config, model, optax.identity())
    encoder = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))
    others = initialise(lambda: {**create().params, "context_encoder": None})
    both = {**others, "context_encoder": encoder}
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, both, jax.tree.map(jnp.copy, encoder), None, None)


def _write(
    workdir: pathlib.Path, config: Config, state: TrainState, record: dict[str, Any]
) -> None:
    """Writes the work directory atomically."""
    with writing(workdir), new_folder(workdir) as partial:
        for name, content in (("config.json", config.to_dict()), (RECORD, record)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        with Checkpoints(partial, config=config, owner=True) as checkpoints:
            window = empty_window(make_averages(["loss"]), batch_size=1, width=1)
            checkpoints.save(state, window, scores={})
