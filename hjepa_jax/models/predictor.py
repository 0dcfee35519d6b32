"""The predictor: a narrow transformer that infers hidden latents, at every level, from context.

References:
  Assran et al. 2023, arXiv 2301.08243, section 3 ("Prediction"). Here all blocks and all levels
  are predicted in one pass: a level-0 query is mask token + position of the patch, a level-l
  query is mask token + mean position of its cell, each + an embedding of its level.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.masking import gather_tokens
from hjepa_jax.models import hierarchy
from hjepa_jax.models.products import Dense, Precision
from hjepa_jax.models.vit import (
    Block,
    PositionTable,
    layer_norm,
    residual_scale,
    token_init,
)


class Predictor(nn.Module):
    """Joint self-attention over context and queries, one linear head per level.

    Attributes:
      grid_size: patches per side, G.
      num_levels: L.
      out_width: width of the encoder's tokens, D.
      width, depth, num_heads, mlp_ratio: size of the predictor.
      positions: "learned" or "sincos2d".
      precision: of the matrix products; parameters are float32.
    """

    grid_size: int
    num_levels: int
    out_width: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    positions: str = "learned"
    precision: Precision = Precision()

    def setup(self):
        self.position_table = PositionTable(self.positions, self.grid_size, self.width)
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        self.level_tokens = self.param("level_tokens", token_init, (self.num_levels, self.width))
        self.project_in = Dense(self.width, self.precision)
        scale = residual_scale(self.depth)
        self.blocks = [
            Block(self.num_heads, self.mlp_ratio, self.precision, out_scale=scale)
            for _ in range(self.depth)
        ]
        self.norm = layer_norm()
        self.heads = [Dense(self.out_width, self.precision) for _ in range(self.num_levels)]

    def __call__(
        self,
        context: Float[Array, "B C D"],
        context_index: Int[Array, "B K"] | None,
        context_valid: Bool[Array, "B C"],
        target_index: Int[Array, "B Q"],
        query_valid: tuple[Bool[Array, "B _"], ...],
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """Predicts the level-0 features of `target_index` and those of all cells above.

        Args:
          context: encoder tokens to predict from: R summary tokens, then K patch tokens.
          context_index: patches of the last K of them; None where there are summary tokens only.
          context_valid: False where a context token is padding.
          target_index: patches to predict at level 0.
          query_valid: per level, which queries count: [B, Q] for `target_index`, then [B, N_l]
            for every cell of level l. No other token attends to one that does not.

        Returns:
          Predictions per level: float32 [B, Q, D], then [B, N_l, D].
        """
        table = self.position_table()
        x = self.project_in(context)
        if context_index is not None:
            position = gather_tokens(table, context_index)
            num_summary = x.shape[1] - position.shape[1]
            x = x + jnp.pad(position, ((0, 0), (num_summary, 0), (0, 0))).astype(x.dtype)

        queries = []
        for level in range(self.num_levels):
            if level == 0:
                position = gather_tokens(table, target_index)
            else:
                position = hierarchy.pool(table, self.grid_size, level)[None]
            query = self.mask_token + self.level_tokens[level][None, None] + position
            queries.append(jnp.broadcast_to(query, (len(x), *query.shape[1:])))

        num_queries = [q.shape[1] for q in queries]
        x = jnp.concatenate([x, *(q.astype(x.dtype) for q in queries)], axis=1)
        key_valid = jnp.concatenate([context_valid, *query_valid], axis=1)
        for block in self.blocks:
            x = block(x, key_valid)

        predictions, start = [], context.shape[1]
        for head, n in zip(self.heads, num_queries, strict=True):
            predictions.append(head(self.norm(x[:, start : start + n])).astype(jnp.float32))
            start += n
        return tuple(predictions)
