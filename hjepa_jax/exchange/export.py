"""Writes the encoder of a run for other programs: tensors, a config and a model card."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from hjepa_jax.config import Config
from hjepa_jax.config.defaults import encoder_size
from hjepa_jax.config.sizes import grid_of
from hjepa_jax.data.sides import pair
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.results import best_row, format_best
from hjepa_jax.exchange.encoder_file import flat, write_encoder
from hjepa_jax.exchange.layouts import DINOV2, DINOV2_REGISTERS, TIMM, VIT, to_there
from hjepa_jax.exchange.programs import PROGRAMS
from hjepa_jax.exchange.tensors import Tensors, write_safetensors
from hjepa_jax.models.positions import sincos2d_positions
from hjepa_jax.runs.checkpoint_meta import read_newest_meta
from hjepa_jax.runs.load import load_target
from hjepa_jax.runs.record import read_record
from hjepa_jax.runs.scores import read_probe_json, rows_on
from hjepa_jax.runs.workdir import load_config, writing
from hjepa_jax.runtime.files import new_folder
from hjepa_jax.runtime.paths import local_path

FORMATS = ("hjepa_jax", "timm", "transformers", "stablehlo", "onnx")
DTYPES = ("float32", "float16")

LOADING = {
    "hjepa_jax": """import hjepa_jax

encoder = hjepa_jax.load("model.safetensors")
features = encoder.embed(["cat.jpg"])  # {"level_0": [1, D], ...}
tokens = encoder.tokens(["cat.jpg"])  # [1, G, G, D]""",
    "timm": """import timm

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)
tokens = model.forward_features(images)""",
    "transformers": """from transformers import AutoModel

model = AutoModel.from_pretrained("THIS_FOLDER")
tokens = model(images).last_hidden_state""",
    "stablehlo": """from jax import export

program = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
features = program.call(images)  # {dtype} [B, {size}]; level_0 ..., summary, tokens""",
    "onnx": """import onnxruntime

program = onnxruntime.InferenceSession("model.onnx")
names = [output.name for output in program.get_outputs()]  # level_0 ..., summary, tokens
features = program.run(names, {"images": images})  # {dtype} [B, {size}]""",
}


def export(
    workdir: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    layout: str = "hjepa_jax",
    step: int | str = "last",
    dtype: str = "float32",
) -> list[str]:
    """Writes the target encoder of a run into a new folder.

    Args:
      workdir: the run's directory.
      output: the folder to make; it must not exist or be empty.
      layout: one of `FORMATS`.
      step: which checkpoint: "last", "best" (by k-NN) or a number.
      dtype: type of the tensors in the file, "float32" or "float16"; the latter only with the
        layout "hjepa_jax".

    Returns:
      Names of the files.

    Raises:
      InputError: the folder holds no run, or the layout cannot represent the encoder.
    """
    for flag, value, options in (("--format", layout, FORMATS), ("--dtype", dtype, DTYPES)):
        if value not in options:
            raise InputError(flag, value, f"must be one of {', '.join(options)}")
    if dtype != "float32" and layout != "hjepa_jax":
        raise InputError("--dtype", dtype, f"must be float32 with --format={layout}")
    source, target = local_path("--workdir", str(workdir)), local_path("--output", str(output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("--output", str(output), "must be a new or empty folder")
    config = load_config(source)
    model, params, at = load_target(source, step)
    info = describe(source, config, params, at)
    try:
        with writing(target, "--output"), new_folder(target) as folder:
            if layout == "hjepa_jax":
                with (folder / "model.safetensors").open("wb") as file:
                    write_encoder(file, config, params, info, dtype=dtype)
                files = {"config.json": {"hjepa_jax": info, "config": config.to_dict()}}
            elif layout in PROGRAMS:
                program = PROGRAMS[layout](config, model, params, info["dtype"])
                (folder / f"model.{layout}").write_bytes(program)
                files = {"config.json": {"hjepa_jax": info}}
            else:
                tensors, files = (_timm if layout == "timm" else _transformers)(config, params)
                files["config.json"]["hjepa_jax"] = info
                with (folder / "model.safetensors").open("wb") as file:
                    write_safetensors(file, tensors, {"format": "pt"})
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
            (folder / "README.md").write_text(model_card(info, layout), encoding="utf-8")
            return sorted(path.name for path in folder.iterdir())
    except ValueError as error:
        raise InputError("--format", layout, str(error)) from error


def describe(workdir: pathlib.Path, config: Config, params: Any, step: int) -> dict[str, Any]:
    """Returns sizes, origin and scores of the encoder at a checkpoint; see `export`."""
    width, depth, num_heads = encoder_size(config)
    meta = read_newest_meta(workdir)
    converted, record = workdir / "converted.json", read_record(workdir)
    rows = rows_on(config.eval.data or config.data.source, read_probe_json(workdir / "probe.json"))
    rows = [row for row in rows if row["encoder"] != "target" or row["step"] == step]
    scored = [p for p in ("linear", "knn") if best_row(rows, p, "target")]
    return {
        "name": workdir.resolve().name,
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": config.model.patch_size,
        "image_size": config.data.image_size,
        # Runs of older versions did not record the type.
        "dtype": record.data.get("dtype", "uint8") if record else "uint8",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "num_levels": config.model.num_levels,
        "num_summary_tokens": config.model.num_summary_tokens,
        "step": step,
        "data": None if converted.exists() else config.data.source,
        "converted_from": json.loads(converted.read_text()) if converted.exists() else None,
        "commit": meta.get("commit"),
        "scores": {protocol: format_best(rows, protocol) for protocol in scored},
    }


def model_card(info: dict[str, Any], layout: str) -> str:
    """Returns the text of README.md in the folder of an exported encoder."""
    origin = f"pre-trained without labels on `{info['data']}` by hjepa_jax"
    if made := info["converted_from"]:
        origin = f"converted from `{made['file']}` (SHA-256 `{made['sha256']}`)"
    scores = [f"* {protocol}: {told}" for protocol, told in info["scores"].items()]
    (height, width), patch = pair(info["image_size"]), info["patch_size"]
    loading = LOADING[layout].replace("{size}", f"{height}, {width}, {len(info['mean'])}")
    loading = loading.replace("{dtype}", info["dtype"])
    return f"""---
library_name: {"jax" if layout == "stablehlo" else layout}
tags: [self-supervised-learning, vision-transformer, jepa]
---

# {info["name"]}

A vision transformer, {origin}.

| | |
|---|---|
| parameters | {info["parameters"]:,} |
| width, blocks, heads | {info["width"]}, {info["depth"]}, {info["num_heads"]} |
| images | {height}x{width} pixels, patches of {patch}x{patch} |
| pixels in [0, 1], per channel | mean {info["mean"]}, standard deviation {info["std"]} |
| checkpoint | step {info["step"]} |
| commit of hjepa_jax | {info["commit"] or "unknown"} |

## Use

```python
{loading}
```

## Scores

{chr(10).join(scores) or "None recorded."}
"""


def _tensors_of(config: Config, params: Any) -> Tensors:
    """Returns the parameters by path, including fixed position tables."""
    kind = config.model.positions
    if kind == "rope2d":
        raise ValueError("has no rotary positions (model.positions='rope2d')")
    if config.model.stem != "linear":
        raise ValueError(f"has only linear patch embeddings (model.stem={config.model.stem!r})")
    if not isinstance(config.data.image_size, int):
        raise ValueError(f"has only square images (data.image_size={config.data.image_size})")
    found = flat(params)
    if kind == "sincos2d":
        table = sincos2d_positions(grid_of(config), encoder_size(config)[0])
        found["positions/embedding"] = table
    return found


def _timm(config: Config, params: Any) -> tuple[Tensors, dict[str, Any]]:
    """Returns tensors and JSON files in the format of timm."""
    c, (width, depth, num_heads) = config.model, encoder_size(config)
    if c.layer_norm_epsilon != 1e-6:
        raise ValueError(f"needs model.layer_norm_epsilon=1e-6, not {c.layer_norm_epsilon}")
    num_channels = len(config.data.mean)
    tensors = to_there(_tensors_of(config, params), TIMM, depth, num_channels=num_channels)
    size, has_class_token = config.data.image_size, c.num_summary_tokens > 0
    model = {
        "img_size": size,
        "patch_size": c.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": c.mlp_ratio,
        "class_token": has_class_token,
        "reg_tokens": c.num_summary_tokens + c.num_registers - has_class_token,
        "in_chans": None if num_channels == 3 else num_channels,
        "init_values": c.layer_scale or None,
        "act_layer": "gelu" if c.gelu == "erf" else "gelu_tanh",
        "global_pool": "token" if has_class_token else "avg",
        "fc_norm": False,
    }
    trained = {
        "input_size": [num_channels, size, size],
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 0,
        "first_conv": TIMM.patch,
        "classifier": "head",
    }
    architecture = {
        "architecture": "vit_base_patch16_224",  # model_args replaces its sizes
        "num_classes": 0,
        "num_features": width,
        "num_attention_heads": num_heads,
        "model_args": {name: value for name, value in model.items() if value is not None},
        "pretrained_cfg": trained,
    }
    return tensors, {"config.json": architecture}


def _transformers(config: Config, params: Any) -> tuple[Tensors, dict[str, Any]]:
    """Returns tensors and JSON files in the format of Hugging Face's transformers."""
    c, (width, depth, num_heads) = config.model, encoder_size(config)
    found, num_channels = _tensors_of(config, params), len(config.data.mean)
    size, hidden = config.data.image_size, int(width * c.mlp_ratio)
    architecture = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "image_size": size,
        "patch_size": c.patch_size,
        "num_channels": num_channels,
        "qkv_bias": True,
        "hidden_act": "gelu" if c.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": c.layer_norm_epsilon,
    }
    if not c.num_summary_tokens:
        tensors = to_there(found, VIT, depth, num_channels=num_channels)
        kind = {"model_type": "ijepa", "intermediate_size": hidden}
        kind["architectures"] = ["IJepaModel"]
    else:
        ratio, rest = divmod(hidden, width)
        if rest:
            raise ValueError(f"needs a whole model.mlp_ratio, not {c.mlp_ratio}")
        for i in range(depth):  # DINOv2 always has a LayerScale
            for part in ("scale_attention", "scale_mlp"):
                found.setdefault(f"block_{i}/{part}/scale", np.ones(width, np.float32))
        registers = c.num_summary_tokens + c.num_registers - 1
        layout = DINOV2_REGISTERS if registers else DINOV2
        tensors = to_there(found, layout, depth, num_channels=num_channels)
        tensors["embeddings.mask_token"] = np.zeros((1, width), np.float32)
        kind = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "mlp_ratio": ratio}
        if registers:
            kind |= {"model_type": "dinov2_with_registers", "num_register_tokens": registers}
            kind["architectures"] = ["Dinov2WithRegistersModel"]
    images = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": list(config.data.mean),
        "image_std": list(config.data.std),
    }
    return tensors, {"config.json": architecture | kind, "preprocessor_config.json": images}
