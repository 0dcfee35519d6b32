"""Converts tensors of a vision transformer from the layouts of other projects, and back.

In other projects a Dense kernel is [out, in], the patch embedding is a convolution, the class token
has a position, and query, key and value may be three layers. In this package kernels are [in, out],
the class token is a summary token that includes its position, and query, key and value are one
layer.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from hjepa_jax.exchange.tensors import Tensors

_QKV = "attention/qkv"
_NORMS = ("norm_attention", "norm_mlp")
_DENSE = (_QKV, "attention/out", "mlp_in", "mlp_out")
_SCALES = ("scale_attention", "scale_mlp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of the tensors of a project's vision transformer.

    Attributes:
      name: name of the layout.
      patch, positions, class_token, registers, norm: names outside the blocks.
      block: prefix of the names of a block, with {} for its number.
      parts: names within a block, by the name in this package; query, key and value have one name
        or three.
      ignored: pattern of tensors that do not belong to the encoder: heads, mask tokens.
      antialias: whether positions are resampled to another grid with antialiasing (bicubic).
    """

    name: str
    patch: str
    positions: str
    class_token: str
    registers: tuple[str, ...]
    norm: str
    block: str
    parts: dict[str, tuple[str, ...]]
    ignored: str
    antialias: bool


_MLP = {"mlp_in": ("mlp.fc1",), "mlp_out": ("mlp.fc2",)}
_HF: dict[str, Any] = {
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "class_token": "embeddings.cls_token",
    "registers": ("embeddings.register_tokens",),
    "norm": "layernorm",
    "block": "encoder.layer.{}.",
    "ignored": r"classifier\.|pooler\.|embeddings\.mask_token$",
}
_HF_ATTENTION = {
    _QKV: tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention/out": ("attention.output.dense",),
}
_HF_DINO = {
    "norm_attention": ("norm1",), "norm_mlp": ("norm2",), **_MLP, **_HF_ATTENTION,
    "scale_attention": ("layer_scale1.lambda1",), "scale_mlp": ("layer_scale2.lambda1",),
}  # fmt: skip

# I-JEPA, DINO, DINOv2 and MAE of Meta use the tensor names of timm. A checkpoint of the PyTorch
# H-JEPA has an encoder of timm at `target_encoder.vit.`, and other networks.
TIMM = Layout(
    "timm", "patch_embed.proj", "pos_embed", "cls_token", ("reg_token", "register_tokens"), "norm",
    "blocks.{}.",
    {
        "norm_attention": ("norm1",), "norm_mlp": ("norm2",), **_MLP,
        _QKV: ("attn.qkv",), "attention/out": ("attn.proj",),
        "scale_attention": ("ls1.gamma",), "scale_mlp": ("ls2.gamma",),
    },
    ignored=r"head\.|head_drop\.|mask_token$|decoder_|projection_head\.", antialias=True,
)  # fmt: skip
VIT = Layout(
    "vit", **_HF,
    parts={
        "norm_attention": ("layernorm_before",), "norm_mlp": ("layernorm_after",),
        "mlp_in": ("intermediate.dense",), "mlp_out": ("output.dense",), **_HF_ATTENTION,
    },
    antialias=False,
)  # fmt: skip
DINOV2 = Layout("dinov2", **_HF, parts=_HF_DINO, antialias=False)
DINOV2_REGISTERS = Layout("dinov2_with_registers", **_HF, parts=_HF_DINO, antialias=True)


_TARGETS = frozenset(("target_encoder", "teacher"))  # names of EMA encoders


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of an encoder, as its tensors have them."""

    patch_size: int
    width: int
    depth: int
    hidden: int
    grid_size: int
    num_summary_tokens: int
    num_registers: int
    layer_scale: bool


def choose_layout(names: set[str]) -> Layout:
    """Returns the layout of tensors with these names.

    Raises:
      ValueError: no known layout has these names.
    """
    if any(name.endswith(f"{TIMM.patch}.weight") for name in names):
        return TIMM
    if any(name.endswith(f"{VIT.patch}.weight") for name in names):
        if any("intermediate.dense" in name for name in names):
            return VIT
        has_registers = any(name.endswith(_HF["registers"][0]) for name in names)
        return DINOV2_REGISTERS if has_registers else DINOV2
    shown = ", ".join(sorted(names)[:3]) or "none"
    rule = "it is no vision transformer in the layout of timm, Meta or Hugging Face"
    raise ValueError(f"{rule}; its tensors are {shown} ...")


def to_here(
    tensors: Tensors, layout: Layout, num_summary_tokens: int | None = None
) -> tuple[Tensors, Sizes]:
    """Returns parameters of the encoder by their paths in this package, float32, and its sizes.

    Args:
      tensors: tensors of the file.
      layout: layout of the tensors.
      num_summary_tokens: number of tokens, counted from the class token, that become summary
        tokens; the other tokens become registers. None = the class token only.

    Raises:
      ValueError: naming tensors that are missing, unknown, or of another shape.
    """
    left = _without_prefix(tensors, layout)

    def take(name: str) -> np.ndarray:
        return np.asarray(left.pop(name), np.float32)

    depth = len({m[1] for name in left if (m := _block_pattern(layout).match(name))})
    _check_names(left, layout, depth)
    kernel = take(f"{layout.patch}.weight")
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"{layout.patch}.weight is {kernel.shape}, not [width, 3, P, P]")
    width, _, patch_size, _ = kernel.shape
    found = {
        "patch_embedding/kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, width),
        "patch_embedding/bias": take(f"{layout.patch}.bias"),
        **_norm("norm", layout.norm, take),
    }
    for i in range(depth):
        found |= _block_to_here(i, layout, left, take)
    class_token = take(layout.class_token) if layout.class_token in left else None
    registers = next((take(name) for name in layout.registers if name in left), None)
    found |= _tokens(take(layout.positions), class_token, registers)
    before = [found.pop(n) for n in ("summary_tokens", "register_tokens") if n in found]
    before = np.concatenate([np.zeros((1, 0, width), np.float32), *before], axis=1)
    default = 0 if class_token is None else 1
    num_summaries = default if num_summary_tokens is None else num_summary_tokens
    summary, registers = before[:, :num_summaries], before[:, num_summaries:]
    found |= {"summary_tokens": summary} if summary.size else {}
    found |= {"register_tokens": registers} if registers.size else {}
    hidden = found["block_0/mlp_in/bias"].size
    sizes = Sizes(
        patch_size,
        width,
        depth,
        hidden,
        math.isqrt(len(found["positions/embedding"])),
        summary.shape[1],
        registers.shape[1],
        "block_0/scale_mlp/scale" in found,
    )
    return found, sizes


def _block_to_here(number: int, layout: Layout, left: Tensors, take: Any) -> Tensors:
    """Returns the parameters of a block; layers without a bias get a bias of zero."""
    found: Tensors = {}
    for here, theirs in layout.parts.items():
        names = [layout.block.format(number) + name for name in theirs]
        path = f"block_{number}/{here}"
        if here in _NORMS:
            found |= _norm(path, names[0], take)
        elif here in _SCALES:
            if names[0] in left:
                found[f"{path}/scale"] = take(names[0])
        else:
            weights = [take(f"{name}.weight") for name in names]
            found[f"{path}/kernel"] = np.concatenate(weights).T
            biases = [
                take(f"{name}.bias") if f"{name}.bias" in left else np.zeros(len(weight), "f4")
                for name, weight in zip(names, weights, strict=True)
            ]
            found[f"{path}/bias"] = np.concatenate(biases)
    return found


def to_there(
    params: dict[str, np.ndarray], layout: Layout, depth: int, *, num_channels: int = 3
) -> Tensors:
    """Returns the tensors of an encoder in a layout: the inverse of `to_here`.

    The first summary token becomes the class token, the others become registers. The positions of
    these tokens are zero, because the tokens include them already.

    Raises:
      ValueError: the layout cannot store a parameter.
    """
    left = dict(params)
    kernel = left.pop("patch_embedding/kernel")
    patch_size = math.isqrt(len(kernel) // num_channels)
    conv = kernel.reshape(patch_size, patch_size, num_channels, -1).transpose(3, 2, 0, 1)
    found = {
        f"{layout.patch}.weight": conv,
        f"{layout.patch}.bias": left.pop("patch_embedding/bias"),
        f"{layout.norm}.weight": left.pop("norm/scale"),
        f"{layout.norm}.bias": left.pop("norm/bias"),
    }
    for i in range(depth):
        for here, theirs in layout.parts.items():
            names = [layout.block.format(i) + name for name in theirs]
            path = f"block_{i}/{here}"
            if here in _SCALES:
                if f"{path}/scale" in left:
                    found[names[0]] = left.pop(f"{path}/scale")
                continue
            weight = left.pop(f"{path}/{'scale' if here in _NORMS else 'kernel'}").T
            bias = left.pop(f"{path}/bias")
            for name, rows, part in zip(
                names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True
            ):
                found |= {f"{name}.weight": rows, f"{name}.bias": part}
    positions = left.pop("positions/embedding")
    has_class_token = "summary_tokens" in left
    # All tokens before the patches are treated alike: summary tokens and registers differ only in
    # which of them are read.
    before = [left.pop(name) for name in ("summary_tokens", "register_tokens") if name in left]
    before = np.concatenate([np.zeros((1, 0, len(positions[0])), np.float32), *before], axis=1)
    if has_class_token:
        found[layout.class_token] = before[:, :1]
    if registers := before.shape[1] - has_class_token:
        if layout in (VIT, DINOV2):
            raise ValueError("it has no place for registers, or for several summary tokens")
        found[layout.registers[0]] = before[:, -registers:]
    # In timm all these tokens have a position, in the other layouts only the class token.
    rows = before.shape[1] if layout is TIMM else int(has_class_token)
    found[layout.positions] = np.pad(positions, ((rows, 0), (0, 0)))[None]
    if left:
        raise ValueError(f"it has no place for {', '.join(sorted(left)[:3])}")
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}


def _without_prefix(tensors: Tensors, layout: Layout) -> Tensors:
    """Returns the tensors of the encoder, without the prefix of their names ("module.", "vit.").

    If a prefix names a target encoder, tensors with other prefixes are ignored.
    """
    patch = f"{layout.patch}.weight"
    prefixes = {name.removesuffix(patch) for name in tensors if name.endswith(patch)}
    targets = {prefix for prefix in prefixes if not _TARGETS.isdisjoint(prefix.split("."))}
    if len(targets or prefixes) != 1:
        raise ValueError(f"it holds several encoders: {', '.join(sorted(prefixes))}")
    (prefix,) = targets or prefixes
    heads = re.compile(layout.ignored)
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if not heads.match(name.removeprefix(prefix)) and (name.startswith(prefix) or not targets)
    }


def _block_pattern(layout: Layout) -> re.Pattern[str]:
    return re.compile(re.escape(layout.block).replace(r"\{\}", r"(\d+)"))


def _check_names(tensors: Tensors, layout: Layout, depth: int) -> None:
    """Checks the names of tensors.

    Raises:
      ValueError: naming tensors that are missing, or that the encoder does not have.
    """
    dense = [n for part in _DENSE for n in layout.parts[part]]
    norms = [n for part in _NORMS for n in layout.parts[part]]
    scales = [n for part in _SCALES for n in layout.parts.get(part, ())]
    needed = {layout.positions}
    needed |= {f"{name}.{kind}" for name in (layout.patch, layout.norm) for kind in _KINDS}
    optional = {layout.class_token, *layout.registers}
    for i in range(depth):
        block = layout.block.format(i)
        needed |= {f"{block}{name}.weight" for name in (*dense, *norms)}
        needed |= {f"{block}{name}.bias" for name in norms}
        optional |= {f"{block}{name}.bias" for name in dense} | {block + name for name in scales}
    missing, other = needed - tensors.keys(), tensors.keys() - needed - optional
    if any(re.match(r"blocks\.\d+\.attn\.attn\.", name) for name in other):
        raise ValueError("it has rotary positions beside its learned ones (blocks.*.attn.attn)")
    if depth == 0:
        missing.add(layout.block.format(0))
    told = [
        f"{what} {', '.join(sorted(names)[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for what, names in (("lacks", missing), ("also has", other))
        if names
    ]
    if told:
        rule = f"it is another architecture than a vision transformer in the layout {layout.name}"
        raise ValueError(f"{rule}: it {' and '.join(told)}")


_KINDS = ("weight", "bias")


def _norm(here: str, there: str, take: Any) -> dict[str, np.ndarray]:
    return {f"{here}/scale": take(f"{there}.weight"), f"{here}/bias": take(f"{there}.bias")}


def _tokens(
    positions: np.ndarray, class_token: np.ndarray | None, registers: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Returns the positions of the patches, and the other tokens with their positions added."""
    before = {
        name: token
        for name, token in (("summary_tokens", class_token), ("register_tokens", registers))
        if token is not None
    }
    if positions.ndim != 3 or any(token.ndim != 3 for token in before.values()):
        raise ValueError("its positions and tokens must be [1, N, width]")
    counts = [token.shape[1] for token in before.values()]
    # The table has positions of the patches only, or also of the class token, or of all tokens.
    for num_with_position in range(len(counts) + 1):
        num_patches = positions.shape[1] - sum(counts[:num_with_position])
        if num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches:
            break
    else:
        raise ValueError(f"its {positions.shape[1]} positions are no square grid of patches")
    found, start = {}, 0
    for i, (name, token) in enumerate(before.items()):
        if i < num_with_position:
            token = token + positions[:, start : start + token.shape[1]]
            start += token.shape[1]
        found[name] = token
    return {**found, "positions/embedding": positions[0, start:]}
