"""Vision transformer over any subset of the patches of an image.

`index` selects the visible patches before the patch embedding, so hidden pixels cannot leak and
cost next to nothing. The patch embedding is a Dense layer on flattened patches, the same function
as the usual strided convolution.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.models.matmul import Dense, Precision
from hjepa_jax.models.positions import PositionTable, interpolate_positions, rope2d_angles, turns_of
from hjepa_jax.models.pyramid import FeaturePyramid
from hjepa_jax.models.stem import PatchMLP
from hjepa_jax.models.transformer import (
    LAYER_NORM_EPSILON,
    block_type,
    drop_path_rates,
    layer_norm,
    residual_scale,
    token_init,
)


def patchify(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B N P2C"]:
    """Flattened patches, in row-major order of the grid; within a patch row, column, channel."""
    b, h, w, c = images.shape
    rows, cols = h // patch_size, w // patch_size
    x = images.reshape(b, rows, patch_size, cols, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * cols, patch_size**2 * c)


class VisionTransformer(nn.Module):
    """ViT encoder over all patches or a chosen subset, with R summary (CLS) tokens.

    Attributes:
      grid_size: patches per side, G, or rows and columns.
      patch_size: pixels per side of a patch, P.
      width, depth, num_heads, mlp_ratio: size of the transformer.
      num_summary_tokens: R learned tokens that attend to the patches and to each other.
      num_registers: further learned tokens; their outputs are not used.
      positions: "learned", "sincos2d" or "rope2d".
      precision: precision of the matrix products; parameters are float32.
      drop_path: probability to skip a branch of the last block, see `Block` and
        `drop_path_rates`.
      layer_scale: see `Block`; 0 for none.
      stem: patch embedding: "linear" or "hmlp" (`PatchMLP`).
      gelu: "tanh" or "erf".
      epsilon: epsilon of all LayerNorms, the final one included.
      remat: see `block_type`.
      pyramid: feature pyramid over the levels. It is part of the encoder so that the EMA covers its
        parameters. `HJEPA` applies it.

    References:
      Darcet et al. 2023, arXiv 2309.16588, section 2.3 (registers).
    """

    grid_size: Sides
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_summary_tokens: int = 1
    num_registers: int = 0
    positions: str = "learned"
    precision: Precision = Precision()
    drop_path: float = 0.0
    layer_scale: float = 0.0
    stem: str = "linear"
    gelu: str = "tanh"
    epsilon: float = LAYER_NORM_EPSILON
    remat: bool = False
    pyramid: FeaturePyramid | None = None

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patch tokens: summary tokens, then registers."""
        return self.num_summary_tokens + self.num_registers

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        index: Int[Array, "B K"] | None = None,
        valid: Bool[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B R D"]]:
        """Encodes the patches that `index` selects, or all patches.

        For images of another size, the table of positions is interpolated, as if the images showed
        the same field of view. Rotary positions count patches instead.

        Args:
          images: normalised pixels.
          index: patches to encode; None = all N.
          valid: False where `index` is padding; no other token attends to it.

        Returns:
          Patch tokens and summary tokens, float32, after the final LayerNorm.
        """
        patches = patchify(images, self.patch_size)
        grid_size = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        if self.positions == "rope2d":
            angles = rope2d_angles(grid_size, self.width // self.num_heads)
            positions = jnp.asarray(angles)
        else:
            positions = PositionTable(
                self.positions, self.grid_size, self.width, name="positions"
            )()
            if grid_size != pair(self.grid_size):
                positions = interpolate_positions(positions, self.grid_size, grid_size)
        if index is None:
            positions = positions[None]
        else:
            patches = gather_tokens(patches, index)
            positions = gather_tokens(positions, index)
        if self.stem == "linear":
            x = Dense(self.width, self.precision, name="patch_embedding")(patches)
        else:
            stem = PatchMLP(self.width, self.patch_size, self.precision, name="patch_embedding")
            x = stem(patches)
        if self.positions != "rope2d":
            x = x + positions.astype(x.dtype)

        prefix = self.num_prefix_tokens
        for name, count in (
            ("register_tokens", self.num_registers),
            ("summary_tokens", self.num_summary_tokens),
        ):
            if count:
                tokens = self.param(name, token_init, (1, count, self.width))
                tokens = jnp.broadcast_to(tokens, (x.shape[0], count, self.width)).astype(x.dtype)
                x = jnp.concatenate([tokens, x], axis=1)
        turns = None
        if self.positions == "rope2d":  # the prefix tokens have angle 0
            turns = turns_of(jnp.pad(positions, ((0, 0), (prefix, 0), (0, 0))))
        allowed = None
        if valid is not None:
            allowed = jnp.concatenate([jnp.ones((x.shape[0], prefix), bool), valid], axis=1)[
                :, None
            ]

        block_class = block_type(remat=self.remat)
        for i, drop_path in enumerate(drop_path_rates(self.depth, self.drop_path)):
            block = block_class(
                self.num_heads,
                self.mlp_ratio,
                self.precision,
                drop_path=drop_path,
                out_scale=residual_scale(self.depth),
                layer_scale=self.layer_scale,
                gelu=self.gelu,
                epsilon=self.epsilon,
                name=f"block_{i}",
            )
            x = block(x, allowed=allowed, turns=turns)
            self.sow("intermediates", f"tokens_{i}", x)  # read by attention maps and probes
        x = layer_norm("norm", self.epsilon)(x).astype(jnp.float32)
        parts = (self.num_summary_tokens, self.num_registers, x.shape[1] - prefix)
        summary, _, patches = jax.lax.split(x, parts, axis=1)
        return patches, summary
