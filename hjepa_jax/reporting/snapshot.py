"""Masks, features, predictions and attention of a model on a few images, in one program.

`make_snapshot_fn` returns a function to jit; `image_figures.snapshot_figures` draws its result.
Neither is part of the training step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from hjepa_jax.config import Config
from hjepa_jax.config.build import build_method, build_preprocess
from hjepa_jax.data.augment import resize_and_normalize
from hjepa_jax.data.rows import spread_rows
from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.masks.masks import Masks, gather_tokens, target_union
from hjepa_jax.method import losses
from hjepa_jax.method.step import Inputs, sample_inputs
from hjepa_jax.models import hierarchy
from hjepa_jax.models.hjepa import HJEPA

# Number of images, and seeds of their masks and views: constant, so that snapshots can be compared.
NUM_IMAGES = 6
MASK_SEED, VIEW_SEED = 0, 1

# Role of a patch or cell in training.
CONTEXT, TARGET, DROPPED = 0, 1, 2


@struct.dataclass
class Snapshot:
    """Result of `make_snapshot_fn` for B images.

    Attributes:
      pixels: float32 [B, H, W, C] in [0, 1].
      states: per level int32 [B, rows, columns]: `CONTEXT`, `TARGET` or `DROPPED`.
      tokens: per level float32 [B, rows, columns, D], the target features.
      cosine: per level float32 [B, rows, columns], cosine of prediction and target; NaN = not
        predicted.
      attention: float32 [B, h, rows, columns], attention in the last block of the target encoder,
        per head, from the summary tokens (if there are none, from all patches) to the patches.
      rollout: float32 [B, rows, columns], attention through all blocks; see `_rollout`.
      view: float32 [B, H, W, C] in [0, 1], the images augmented as in training. The context encoder
        sees its `CONTEXT` patches, the target encoder all of it.
      local_views: float32 [B, V, h, w, C] in [0, 1], the further crops; None without any.
      local_seen: bool [B, V, rows, columns], patches of the crops that the encoder sees; None =
        all.
    """

    pixels: Any
    states: tuple[Any, ...]
    tokens: tuple[Any, ...]
    cosine: tuple[Any, ...]
    attention: Any
    rollout: Any
    view: Any
    local_views: Any = None
    local_seen: Any = None


def fixed_images(images: Num[np.ndarray, "n H W C"]) -> Num[np.ndarray, "B H W C"]:
    """Returns the images of a snapshot: `NUM_IMAGES`, evenly spaced."""
    return images[spread_rows(np.arange(len(images)), NUM_IMAGES)]


def make_snapshot_fn(
    model: HJEPA,
    sample: Callable[..., Inputs],
    *,
    preprocess: Callable[..., Float[Array, "B S S C"]],
    as_pixels: Callable[..., Float[Array, "B S S C"]],
) -> Callable[..., Snapshot]:
    """Returns `snapshot(params, target_params, images)`.

    Args:
      model: the networks.
      sample: `sample(images)` returns masks and views as in training, with pixels in [0, 1].
      preprocess: converts stored images to normalised pixels, without augmentation.
      as_pixels: the same, with pixels in [0, 1].
    """
    grid_size, num_levels = model.predictor.grid_size, model.predictor.num_levels
    grids = [hierarchy.level_grid(grid_size, level) for level in range(num_levels)]
    encoder = model.context_encoder
    num_summary, num_prefix = encoder.num_summary_tokens, encoder.num_prefix_tokens
    apply: Any = model.apply
    all_levels: Any = model.clone(levels=None).apply  # includes levels that are not predicted

    def snapshot(params: Any, target_params: Any, images: Num[Array, "B H W C"]) -> Snapshot:
        inputs, views = sample(images), preprocess(images)
        masks = inputs.masks
        _, intermediates = apply(
            {"params": {"context_encoder": target_params}},
            views,
            method="encode",
            mutable=["intermediates"],
        )
        parts = intermediates["intermediates"]["context_encoder"]
        weights = [parts[f"block_{i}"]["attention"]["weights"][0] for i in range(encoder.depth)]
        variables = {"params": {"context_encoder": target_params}}
        levels = tuple(all_levels(variables, views, method="targets").levels.values())
        prediction = apply({"params": params}, views, masks)
        valid = all_levels({}, masks, method="query_valid")
        cosine = _cosine(prediction, levels, masks)
        shown = [
            _seen(x, num_summary, num_prefix) for x in (weights[-1], _rollout(weights)[:, None])
        ]
        return Snapshot(
            pixels=_stretched(as_pixels(images), images.dtype),
            states=tuple(map(_as_grid, _states(valid, masks, grid_size), grids)),
            tokens=tuple(x.reshape(len(x), *g, -1) for x, g in zip(levels, grids, strict=True)),
            cosine=tuple(map(_as_grid, cosine, grids)),
            attention=_as_grid(shown[0], grids[0]),
            rollout=_as_grid(shown[1], grids[0])[:, 0],
            view=inputs.view,
            local_views=inputs.local_views,
            local_seen=_seen_patches(inputs, encoder.patch_size),
        )

    return snapshot


def _seen_patches(inputs: Inputs, patch_size: int) -> Bool[Array, "B V gh gw"] | None:
    """Returns which patches of the local views the encoder sees; None = all."""
    if inputs.local_index is None:
        return None
    grid = tuple(side // patch_size for side in inputs.local_views.shape[2:4])
    patches = jnp.arange(math.prod(grid))
    seen = jnp.any(inputs.local_index[..., None] == patches[None, None, None], axis=2)
    return seen.reshape(*seen.shape[:2], *grid)


def _like(channels: Any, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Returns one value per channel, broadcast to the shape of `x`."""
    return jnp.broadcast_to(jnp.asarray(channels, x.dtype), x.shape)


def _stretched(pixels: Float[Array, "*B C"], stored: Any) -> Float[Array, "*B C"]:
    """Returns pixels with every channel stretched to [0, 1], unless the images have 8 bits."""
    if stored == jnp.uint8:
        return pixels
    axes = tuple(range(pixels.ndim - 1))
    low, high = (f(pixels, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
    return (pixels - low) / jnp.maximum(high - low, 1e-12)


def _states(valid: dict[int, Array], masks: Masks, grid_size: Sides) -> list[Int[Array, "B _"]]:
    """Returns the state of each cell by level: target, else context (in part), else dropped."""
    num_patches = math.prod(pair(grid_size))
    patches = jnp.arange(num_patches)
    seen = (masks.context_index[..., None] == patches[None, None]) & masks.context_valid[..., None]
    seen = jnp.any(seen, axis=1)
    found = []
    for level, hidden in valid.items():
        target = hidden if level else target_union(masks, num_patches)
        share = hierarchy.pool(seen[..., None].astype(jnp.float32), grid_size, level)[..., 0]
        found.append(jnp.where(target, TARGET, jnp.where(share > 0, CONTEXT, DROPPED)))
    return found


def _cosine(
    prediction: Any, levels: tuple[Float[Array, "B _ D"], ...], masks: Masks
) -> list[Float[Array, "B _"]]:
    """Returns the cosine of prediction and target by level and cell; NaN if not predicted.

    For a patch in several target blocks it is the mean over the blocks.
    """
    found = []
    for level, target in enumerate(levels):
        b, n, _ = target.shape
        if level not in prediction.levels:
            found.append(jnp.full((b, n), jnp.nan))
            continue
        predicted, valid = prediction.levels[level], prediction.query_valid[level]
        if level:
            values = losses.cosine_similarity(predicted, target)
            found.append(jnp.where(valid, values, jnp.nan))
            continue
        index = masks.target_index.reshape(b, -1)
        values = losses.cosine_similarity(predicted, gather_tokens(target, index))
        hits = (index[..., None] == jnp.arange(n)[None, None]) & valid[..., None]
        counts = jnp.sum(hits, axis=1)
        mean = jnp.sum(hits * values[..., None], axis=1) / jnp.maximum(counts, 1)
        found.append(jnp.where(counts > 0, mean, jnp.nan))
    return found


def _rollout(weights: list[Float[Array, "B h T T"]]) -> Float[Array, "B T T"]:
    """Returns attention through all blocks: the product of (A + I) / 2, A the mean over heads.

    References:
      Abnar and Zuidema 2020, arXiv 2005.00928, section 3 (attention rollout).
    """
    identity = jnp.eye(weights[0].shape[-1])[None]
    product = identity
    for layer in weights:
        product = jnp.matmul((jnp.mean(layer.astype(jnp.float32), axis=1) + identity) / 2, product)
    return product


def _seen(
    attention: Float[Array, "B h T T"], num_summary: int, num_prefix: int
) -> Float[Array, "B h N"]:
    """Returns attention to the patches, from the summary tokens or else from all patches."""
    rows = attention[:, :, :num_summary] if num_summary else attention[:, :, num_prefix:]
    return jnp.mean(rows.astype(jnp.float32), axis=2)[..., num_prefix:]


def _as_grid(x: Shaped[Array, "*B n"], grid: tuple[int, int]) -> Shaped[Array, "*B gh gw"]:
    return x.reshape(*x.shape[:-1], *grid)


def build_snapshot_fn(config: Config, model: HJEPA) -> Any:
    """Returns `snapshot(params, target_params, uint8 images)`, see `Snapshot`."""
    c, n = config.data, len(config.data.mean)
    as_pixels = functools.partial(
        resize_and_normalize, image_size=c.image_size, mean=(0.0,) * n, std=(1.0,) * n
    )
    method = build_method(config, model, optax.identity(), None)

    def sample(images: Num[Array, "B H W C"]) -> Inputs:
        augment_rngs, mask_rngs = (
            jax.random.split(jax.random.PRNGKey(seed), len(images))
            for seed in (VIEW_SEED, MASK_SEED)
        )
        inputs = sample_inputs(method, images, augment_rngs, mask_rngs)
        shown = {
            name: _stretched(jnp.clip(x * _like(c.std, x) + _like(c.mean, x), 0, 1), images.dtype)
            for name in ("view", "local_views")
            if (x := getattr(inputs, name)) is not None
        }
        return dataclasses.replace(inputs, **shown)

    return make_snapshot_fn(model, sample, preprocess=build_preprocess(config), as_pixels=as_pixels)
