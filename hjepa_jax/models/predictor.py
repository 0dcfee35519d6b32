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

from hjepa_jax.masks.masks import gather_tokens
from hjepa_jax.models import hierarchy
from hjepa_jax.models.matmul import Dense, Precision
from hjepa_jax.models.positions import PositionTable, rope2d_angles, turns_of
from hjepa_jax.models.transformer import block_type, layer_norm, residual_scale, token_init

MODES = ("self", "blocks", "cross")


class Predictor(nn.Module):
    """A transformer over context and queries, with one linear head per level.

    Who attends to whom is its `mode`:
      self: all tokens to all, so that what is predicted of one block depends on the others.
      blocks: each block's queries to the context and to themselves, as if every block were
        predicted by a pass of its own, but for the context, which attends to itself and not to
        queries; likewise the queries of each coarser level.
      cross: each query to the context alone, whose tokens stay as they are: the cheapest.

    Attributes:
      grid_size: patches per side, G.
      num_levels: L.
      out_width: width of the encoder's tokens, D.
      width, depth, num_heads, mlp_ratio: size of the predictor.
      global_level: whether one query more, on top of the levels, stands for the whole grid.
      mode: one of `MODES`.
      positions: "learned", "sincos2d" or "rope2d"; the last beside "sincos2d", so that a query says
        where it is even where it attends to summary tokens alone, which are nowhere.
      precision: of the matrix products; parameters are float32.
      remat: see `block_type`.
    """

    grid_size: int
    num_levels: int
    out_width: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    global_level: bool = False
    mode: str = "self"
    positions: str = "learned"
    precision: Precision = Precision()
    remat: bool = False

    def setup(self):
        added = "sincos2d" if self.positions == "rope2d" else self.positions
        self.position_table = PositionTable(added, self.grid_size, self.width)
        num_levels = self.num_levels + self.global_level
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        self.level_tokens = self.param("level_tokens", token_init, (num_levels, self.width))
        self.project_in = Dense(self.width, self.precision)
        scale, block_class = residual_scale(self.depth), block_type(remat=self.remat)
        self.blocks = [
            block_class(self.num_heads, self.mlp_ratio, self.precision, out_scale=scale)
            for _ in range(self.depth)
        ]
        self.norm = layer_norm()
        if self.mode == "cross":
            self.norm_context = layer_norm()
        self.heads = [Dense(self.out_width, self.precision) for _ in range(num_levels)]

    def __call__(
        self,
        context: Float[Array, "B C D"],
        context_index: Int[Array, "B K"] | None,
        context_valid: Bool[Array, "B C"],
        target_index: Int[Array, "B Q"] | None,
        query_valid: tuple[Bool[Array, "B _"], ...],
        *,
        num_blocks: int = 1,
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """Predicts the level-0 features of `target_index` and those of all cells above.

        Args:
          context: encoder tokens to predict from: R summary tokens, then K patch tokens.
          context_index: patches of the last K of them; None where there are summary tokens only.
          context_valid: False where a context token is padding.
          target_index: patches to predict at level 0; None to predict the global level alone.
          query_valid: per level, which queries count: [B, Q] for `target_index`, then [B, N_l]
            for every cell of level l, [B, 1] for the global one. No other token attends to one
            that does not.
          num_blocks: M, how many blocks of equal size `target_index` consists of.

        Returns:
          Predictions per level: float32 [B, Q, D], then [B, N_l, D], then [B, 1, D]; without
          `target_index` the last one alone, as `query_valid` has.
        """
        table = self.position_table()
        x = self.project_in(context)
        num_context = x.shape[1]
        num_summary = num_context - (0 if context_index is None else context_index.shape[1])

        def of_context(rows: Float[Array, "N _"]) -> Float[Array, "#B C _"]:
            """Rows of the context's patches, and zeros for its summary tokens."""
            if context_index is None:
                return jnp.zeros((1, num_summary, rows.shape[1]))
            found = gather_tokens(rows, context_index)
            return jnp.pad(found, ((0, 0), (num_summary, 0), (0, 0)))

        def of_queries(rows: Float[Array, "N _"]) -> list[Float[Array, "#B _ _"]]:
            """Rows of the target patches, and per level their means over its cells."""
            found = []
            if target_index is not None:
                found.append(gather_tokens(rows, target_index))
                for level in range(1, self.num_levels):
                    found.append(hierarchy.pool(rows, self.grid_size, level)[None])
            if self.global_level:
                found.append(jnp.mean(rows, axis=0)[None, None])
            return found

        if context_index is not None:
            x = x + of_context(table).astype(x.dtype)
        num_queries = [valid.shape[1] for valid in query_valid]
        first = len(self.heads) - len(num_queries)
        queries = [
            jnp.broadcast_to(self.mask_token + token[None, None], (1, n, self.width))
            for token, n in zip(self.level_tokens[first:], num_queries, strict=True)
        ]
        queries = [q + rows for q, rows in zip(queries, of_queries(table), strict=True)]
        queries = _side_by_side(queries, len(x)).astype(x.dtype)
        turns = source_turns = query_turns = None
        if self.positions == "rope2d":
            angles = jnp.asarray(rope2d_angles(self.grid_size, self.width // self.num_heads))
            turns = turns_of(_side_by_side([of_context(angles), *of_queries(angles)], len(x)))
            source_turns, query_turns = turns[:, :num_context], turns[:, num_context:]

        if self.mode == "cross":
            x = self.norm_context(x).astype(x.dtype)
            for block in self.blocks:
                queries = block(queries, context_valid[:, None], query_turns, x, source_turns)
        else:
            tokens = jnp.concatenate([x, queries], axis=1)
            allowed = jnp.concatenate([context_valid, *query_valid], axis=1)[:, None]
            if self.mode == "blocks":
                groups = _groups(num_context, num_blocks, num_queries)
                of_context_or_own = (groups == 0) | (groups[:, None] == groups)
                allowed = allowed & of_context_or_own[None]
            *blocks, last_block = self.blocks
            for block in blocks:
                tokens = block(tokens, allowed, turns)
            # Of the context nothing is asked any more.
            x, queries = jax.lax.split(tokens, (num_context, sum(num_queries)), axis=1)
            allowed = allowed[:, -queries.shape[1] :]
            queries = last_block(queries, allowed, turns, before=x)

        levels = jax.lax.split(self.norm(queries), num_queries, axis=1)
        return tuple(
            head(level).astype(jnp.float32)
            for head, level in zip(self.heads[first:], levels, strict=True)
        )


def _side_by_side(parts: list[Float[Array, "_ _ D"]], batch_size: int) -> Float[Array, "B Q D"]:
    """Parts that each or all images share, one after the other, for each image."""
    return jnp.concatenate(
        [jnp.broadcast_to(part, (batch_size, *part.shape[1:])) for part in parts], axis=1
    )


def _groups(num_context: int, num_blocks: int, num_queries: list[int]) -> Int[np.ndarray, " T"]:
    """Which of the tokens attend to each other: 0 for the context, then each block and level."""
    sizes = [num_context] + [num_queries[0] // num_blocks] * num_blocks + num_queries[1:]
    return np.repeat(np.arange(len(sizes)), sizes)
