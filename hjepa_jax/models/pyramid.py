"""A feature pyramid over the levels: coarse levels inform finer ones.

References:
  Lin et al. 2017, arXiv 1612.03144, section 3 (lateral connections and a top-down pathway).
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hjepa_jax.data.sides import Sides, pair
from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.models.matmul import Precision, product
from hjepa_jax.models.transformer import LayerScale

FUSIONS = ("add", "concat")


def upsampling_matrix(grid_size: Sides, level: int) -> Float[np.ndarray, "N_l N_m"]:
    """Row-stochastic matrix that maps cells of level m = l + 1 to cells of level l.

    Bilinear between the centres of cells, also of smaller cells at the edge of the grid. Constant
    beyond the outermost centres.
    """
    weights = []
    for side in pair(grid_size):
        fine, coarse = (_centres(side, at) for at in (level, level + 1))
        unit = np.eye(len(coarse))
        weights.append(np.stack([np.interp(fine, coarse, row) for row in unit], axis=1))
    return np.kron(*weights).astype(np.float32)


def _centres(side: int, level: int) -> Float[np.ndarray, " C"]:
    """Middles of the cells along one side of the grid, in patches."""
    starts = np.arange(0, side, 2**level)
    return (starts + np.minimum(starts + 2**level, side)) / 2


class Mixing(nn.Module):
    """x W. W starts as the identity, with zeros below it if x is wider than the result.

    It has no bias and no weight decay, so that different features cannot become the same by
    shrinking.
    """

    features: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N D"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("mixing", lambda _: jnp.eye(*shape))
        rows = product("nd,df->nf", x.reshape(-1, x.shape[-1]), kernel, self.precision)
        return rows.reshape(*x.shape[:-1], self.features).astype(jnp.float32)


class FeaturePyramid(nn.Module):
    """Fuses each level with the level above it: P_l = fuse(W_l x_l, U_l P_{l+1}).

    It starts as the identity: W_l = I, and the level above has no influence yet.

    Attributes:
      grid_size: patches per side, G, or rows and columns.
      num_levels: L.
      fusion: "add" (W_l x_l + g_l * U_l P_{l+1}, with a factor g_l per feature that starts at 0) or
        "concat" (one matrix for the concatenation of both).
      precision: precision of the matrix products; parameters are float32.
    """

    grid_size: Sides
    num_levels: int
    fusion: str = "add"
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        levels: tuple[Float[Array, "B _ D"], ...],
        target_index: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """Fuses x_l, [B, N_l, D], finest first.

        Args:
          levels: one array per level.
          target_index: the patches of `levels[0]`, which is then [B, Q, D]; None = all patches.

        Returns:
          Arrays of the same shapes, float32.
        """
        width, top = levels[0].shape[-1], self.num_levels - 1
        fused = [Mixing(width, self.precision, name=f"lateral_{top}")(levels[top])]
        for level in reversed(range(top)):
            rows = jnp.asarray(upsampling_matrix(self.grid_size, level))
            if level == 0 and target_index is not None:
                rows = gather_tokens(rows, target_index)
            above = jnp.matmul(rows, fused[0])
            x = Mixing(width, self.precision, name=f"lateral_{level}")(levels[level])
            if self.fusion == "add":
                x = x + LayerScale(0.0, name=f"top_down_{level}")(above)
            else:
                both = jnp.concatenate([x, above], axis=-1)
                x = Mixing(width, self.precision, name=f"fusion_{level}")(both)
            fused.insert(0, x)
        return tuple(fused)
