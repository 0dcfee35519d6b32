"""Pre-norm vision transformer over any subset of the patches of an image.

The encoder never computes on patches it is not shown: `index` chooses them before the patch
embedding, so hidden pixels cannot leak and cost nothing.

References:
  Dosovitskiy et al. 2021, arXiv 2010.11929 (ViT). The GELU is the tanh form (fast on every
  backend), the patch embedding a Dense layer on flattened patches (the same function as the
  strided convolution), and softmax and LayerNorm are computed in float32 whatever the precision is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.masking import gather_tokens
from hjepa_jax.models.products import Dense, Precision, product

# name -> width, depth, heads
SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
POSITIONS = ("learned", "sincos2d")
LAYER_NORM_EPSILON = 1e-6

token_init = nn.initializers.truncated_normal(0.02)


def patchify(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B N P2C"]:
    """Flattened patches, in row-major order of the grid; within a patch row, column, channel."""
    b, h, w, c = images.shape
    rows, cols = h // patch_size, w // patch_size
    x = images.reshape(b, rows, patch_size, cols, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * cols, patch_size**2 * c)


def sincos2d_positions(grid_size: int, width: int) -> Float[np.ndarray, "N D"]:
    """Fixed 2-D sine-cosine position embeddings: half of the width for rows, half for columns.

    References:
      Chen et al. 2021, arXiv 2104.02057 (MoCo v3), section 4.1. Frequencies 10000^(-4i/D).
    """
    frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angle = np.arange(grid_size)[:, None] * frequency
    side = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [G, D/2]
    rows = np.repeat(side, grid_size, axis=0)
    cols = np.tile(side, (grid_size, 1))
    return np.concatenate([rows, cols], axis=1).astype(np.float32)


class PositionTable(nn.Module):
    """Position embeddings of all patches of the grid, [N, D], learned or fixed.

    Learned ones start from the sine-cosine table, not from small noise: beside patch embeddings of
    full size, small positions stay invisible for most of a short run (experiments/recipes).
    """

    kind: str
    grid_size: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "N D"]:
        table = jnp.asarray(sincos2d_positions(self.grid_size, self.width))
        if self.kind == "sincos2d":
            return table
        return self.param("embedding", lambda _: table)


class Attention(nn.Module):
    """Multi-head self-attention, explicit in [B, h, N, d], the layout every backend likes."""

    num_heads: int
    precision: Precision = Precision()
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], key_valid: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B N D"]:
        b, n, d = x.shape
        qkv = Dense(3 * d, self.precision, name="qkv")(x)
        qkv = qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        scale = (d // self.num_heads) ** -0.5
        logits = product("bhqd,bhkd->bhqk", query * scale, key, self.precision)
        logits = logits.astype(jnp.float32)
        if key_valid is not None:
            # Finite, so that a row without one valid key gives a mean and not NaN.
            logits = jnp.where(key_valid[:, None, None, :], logits, -1e9)
        # The softmax's division comes after the product: over d numbers a row instead of N.
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        self.sow("intermediates", "weights", weights / total)  # for who asks; nothing in training
        out = product("bhqk,bhkd->bhqd", weights, value, self.precision)
        out = out / total.astype(out.dtype)
        out = out.transpose(0, 2, 1, 3).reshape(b, n, d)
        return Dense(d, self.precision, self.out_scale, name="out")(out)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    `out_scale` scales what either branch adds at initialisation. With 1 / sqrt(2 depth) the 2 depth
    branches of a network together add about as much as one, however deep it is.

    Where it is applied with a key of the name "drop_path", either branch is left out with
    probability `drop_path`, per image, and scaled up by 1 / (1 - drop_path) where it stays.

    References:
      Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
      (`out_scale`); Huang et al. 2016, arXiv 1603.09382, section 3 (stochastic depth).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    precision: Precision = Precision()
    drop_path: float = 0.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], key_valid: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B N D"]:
        d = x.shape[-1]
        y = layer_norm("norm_attention")(x)
        attention = Attention(self.num_heads, self.precision, self.out_scale, name="attention")
        x = x + self._keep(attention(y, key_valid))
        y = layer_norm("norm_mlp")(x)
        y = Dense(int(d * self.mlp_ratio), self.precision, name="mlp_in")(y)
        y = nn.gelu(y, approximate=True)
        return x + self._keep(Dense(d, self.precision, self.out_scale, name="mlp_out")(y))

    def _keep(self, branch: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        if not self.drop_path or not self.has_rng("drop_path"):
            return branch
        keep = jax.random.bernoulli(
            self.make_rng("drop_path"), 1.0 - self.drop_path, (len(branch), 1, 1)
        )
        return branch * keep.astype(branch.dtype) / (1.0 - self.drop_path)


class VisionTransformer(nn.Module):
    """ViT encoder over all patches or a chosen subset, with R summary (CLS) tokens.

    Attributes:
      grid_size: patches per side, G.
      patch_size: pixels per side of a patch, P.
      width, depth, num_heads, mlp_ratio: size of the transformer.
      num_summary_tokens: R learned tokens that attend to the patches and to each other.
      positions: "learned" or "sincos2d".
      precision: of the matrix products; parameters are float32.
      drop_path: probability to leave out a branch of the last block, see `Block`; it grows linearly
        from 0 at the first.
    """

    grid_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_summary_tokens: int = 1
    positions: str = "learned"
    precision: Precision = Precision()
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        index: Int[Array, "B K"] | None = None,
        valid: Bool[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B R D"]]:
        """Encodes the patches that `index` names, or all of them.

        Args:
          images: normalised pixels.
          index: patches to look at; None for all N.
          valid: False where `index` is padding, which no other token then attends to.

        Returns:
          Patch tokens and summary tokens, float32, after the final LayerNorm.
        """
        patches = patchify(images, self.patch_size)
        positions = PositionTable(self.positions, self.grid_size, self.width, name="positions")()
        if index is None:
            positions = positions[None]
        else:
            patches = gather_tokens(patches, index)
            positions = gather_tokens(positions, index)
        x = Dense(self.width, self.precision, name="patch_embedding")(patches)
        x = x + positions.astype(x.dtype)

        r = self.num_summary_tokens
        if r:
            summary = self.param("summary_tokens", token_init, (1, r, self.width))
            summary = jnp.broadcast_to(summary, (len(x), r, self.width)).astype(x.dtype)
            x = jnp.concatenate([summary, x], axis=1)
        key_valid = None
        if valid is not None:
            key_valid = jnp.concatenate([jnp.ones((len(x), r), bool), valid], axis=1)

        for i in range(self.depth):
            block = Block(
                self.num_heads,
                self.mlp_ratio,
                self.precision,
                drop_path=self.drop_path * i / max(1, self.depth - 1),
                out_scale=residual_scale(self.depth),
                name=f"block_{i}",
            )
            x = block(x, key_valid)
            self.sow("intermediates", f"tokens_{i}", x)  # for who asks; nothing in training
        x = layer_norm("norm")(x).astype(jnp.float32)
        return x[:, r:], x[:, :r]


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the affine parameters and the epsilon used throughout, in float32."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, name=name)


def residual_scale(depth: int) -> float:
    """1 / sqrt(2 depth), the `out_scale` of the blocks of a network."""
    return (2 * depth) ** -0.5
