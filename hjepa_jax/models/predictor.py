"""The predictor: a narrow transformer that infers hidden latents, at every level, from context.

References:
  Assran et al. 2023, arXiv 2301.08243, section 3 ("Prediction"). Here all blocks and all levels
  are predicted in one pass: a level-0 query is mask token + position of the patch, a level-l
  query is mask token + mean position of its cell, each + an embedding of its level.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hjepa_jax.data.sides import Sides
from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.models import hierarchy
from hjepa_jax.models.matmul import Dense, Precision
from hjepa_jax.models.positions import PositionTable, rope2d_angles, turns_of
from hjepa_jax.models.transformer import block_type, layer_norm, residual_scale, token_init

MODES = ("self", "blocks", "cross")


class Predictor(nn.Module):
    """A transformer over context and queries, with one linear head per level.

    `mode` selects the attention pattern:
      self: all tokens attend to all. The prediction of one block depends on the other blocks.
      blocks: the queries of a block attend to the context and to each other. This equals one pass
        per block, except that the context attends to itself only and is computed once. The queries
        of each coarser level form a block, too.
      cross: each query attends to the context alone. Context tokens are not updated. The cheapest.

    Attributes:
      grid_size: patches per side, G, or rows and columns.
      num_levels: L.
      out_width: width of the encoder's tokens, D.
      width, depth, num_heads, mlp_ratio: size of the predictor.
      mode: one of `MODES`.
      positions: "learned", "sincos2d" or "rope2d". "rope2d" is used together with "sincos2d": a
        query must know its position even if it attends only to summary tokens, which have none.
      precision: precision of the matrix products; parameters are float32.
      remat: see `block_type`.
    """

    grid_size: Sides
    num_levels: int
    out_width: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    mode: str = "self"
    positions: str = "learned"
    precision: Precision = Precision()
    remat: bool = False

    def setup(self):
        added = "sincos2d" if self.positions == "rope2d" else self.positions
        self.position_table = PositionTable(added, self.grid_size, self.width)
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        self.level_tokens = self.param("level_tokens", token_init, (self.num_levels, self.width))
        self.project_in = Dense(self.width, self.precision)
        scale, block_class = residual_scale(self.depth), block_type(remat=self.remat)
        self.blocks = [
            block_class(
                self.num_heads,
                self.mlp_ratio,
                self.precision,
                out_scale=scale,
                cross=self.mode == "cross",
            )
            for _ in range(self.depth)
        ]
        self.norm = layer_norm()
        if self.mode == "cross":
            self.norm_context = layer_norm()
        self.heads = [Dense(self.out_width, self.precision) for _ in range(self.num_levels)]

    def __call__(
        self,
        context: Float[Array, "B C D"],
        *,
        context_valid: Bool[Array, "B C"],
        context_index: Int[Array, "B K"] | None = None,
        target_index: Int[Array, "B Q"],
        query_valid: dict[int, Bool[Array, "B _"]],
        num_blocks: int = 1,
    ) -> dict[int, Float[Array, "B _ D"]]:
        """Predicts the features of the patches `target_index` and of all cells above them.

        Args:
          context: encoder tokens to predict from: R summary tokens, then K patch tokens.
          context_valid: False where a context token is padding.
          context_index: patches of the last K context tokens; None if there are summary tokens
            only.
          target_index: patches to predict at level 0.
          query_valid: by level, which queries count: [B, Q] at level 0, [B, N_l] for the cells of
            level l. No other token attends to a query that does not count. Only these levels are
            predicted.
          num_blocks: M, number of blocks of equal size in `target_index`.

        Returns:
          Predictions by level: float32 [B, Q, D] or [B, N_l, D].
        """
        table, levels = self.position_table(), list(query_valid)
        x = self.project_in(context)
        b, num_context, _ = x.shape
        num_summary = num_context - (0 if context_index is None else context_index.shape[1])

        def at_context(rows: Float[Array, "N _"]) -> Float[Array, "#B C _"]:
            """Rows of the context patches, preceded by zeros for the summary tokens."""
            if context_index is None:
                return jnp.zeros((1, num_summary, rows.shape[1]))
            found = gather_tokens(rows, context_index)
            return jnp.pad(found, ((0, 0), (num_summary, 0), (0, 0)))

        def at_queries(rows: Float[Array, "N _"], level: int) -> Float[Array, "#B _ _"]:
            """Rows of the target patches, or their means over the cells of a level."""
            if level == 0:
                return gather_tokens(rows, target_index)
            return hierarchy.pool(rows, self.grid_size, level)[None]

        if context_index is not None:
            x = x + at_context(table).astype(x.dtype)
        num_queries = {level: query_valid[level].shape[1] for level in levels}
        queries = []
        for level, n in num_queries.items():
            token = self.mask_token + self.level_tokens[level][None, None]
            token = jnp.broadcast_to(token, (1, n, self.width))
            queries.append(token + at_queries(table, level))
        queries = _side_by_side(queries, b).astype(x.dtype)
        turns = None
        if self.positions == "rope2d":
            angles = jnp.asarray(rope2d_angles(self.grid_size, self.width // self.num_heads))
            places = [at_context(angles), *(at_queries(angles, level) for level in levels)]
            turns = turns_of(_side_by_side(places, b))
        if self.mode == "cross":
            memory = self.norm_context(x).astype(x.dtype)
            for block in self.blocks:
                queries = block(queries, memory=memory, allowed=context_valid[:, None], turns=turns)
        else:
            valid = jnp.concatenate([context_valid, *query_valid.values()], axis=1)
            allowed = valid[:, None]  # which tokens each token may attend to
            if self.mode == "blocks":
                groups = _groups(num_context, num_blocks, num_queries)
                allowed = allowed & ((groups == 0) | (groups[:, None] == groups))[None]
            queries = self._joint(x, queries, allowed, turns)
        parts = jax.lax.split(self.norm(queries), [*num_queries.values()], axis=1)
        return {
            level: self.heads[level](part).astype(jnp.float32)
            for level, part in zip(levels, parts, strict=True)
        }

    def _joint(
        self,
        x: Float[Array, "B C E"],
        queries: Float[Array, "B Q E"],
        allowed: Bool[Array, "B _ T"],
        turns: Float[Array, "_ T _"] | None,
    ) -> Float[Array, "B Q E"]:
        """Runs all blocks over context and queries. The last one updates the queries only."""
        sizes = x.shape[1], queries.shape[1]
        tokens = jnp.concatenate([x, queries], axis=1)
        *blocks, last_block = self.blocks
        for block in blocks:
            tokens = block(tokens, allowed=allowed, turns=turns)
        x, queries = jax.lax.split(tokens, sizes, axis=1)
        return last_block(queries, memory=x, allowed=allowed[:, -sizes[1] :], turns=turns)


def _side_by_side(parts: list[Float[Array, "_ _ D"]], batch_size: int) -> Float[Array, "B Q D"]:
    """Concatenates the parts along the tokens; a part with one row is repeated for all images."""
    return jnp.concatenate(
        [jnp.broadcast_to(part, (batch_size, *part.shape[1:])) for part in parts], axis=1
    )


def _groups(
    num_context: int, num_blocks: int, num_queries: dict[int, int]
) -> Int[np.ndarray, " T"]:
    """The group of each token: 0 for the context, then one for each block and coarser level."""
    sizes = [num_context]
    for level, n in num_queries.items():
        sizes += [n] if level else [n // num_blocks] * num_blocks
    return np.repeat(np.arange(len(sizes)), sizes)
