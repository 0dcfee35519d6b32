"""Pre-norm transformer blocks of encoder and predictor.

References:
  Dosovitskiy et al. 2021, arXiv 2010.11929 (ViT). By default the GELU is the tanh form (fast on
  every backend). LayerNorm and the exponentials and sums of the softmax are always computed in
  float32; the logits have the dtype `precision.results`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from hjepa_jax.models.matmul import Dense, Precision, product
from hjepa_jax.models.positions import rotate

LAYER_NORM_EPSILON = 1e-6
GELUS = ("tanh", "erf")  # the approximation, and the exact form that published encoders have

token_init = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head attention in the layout [B, h, N, d], which is fast on every backend.

    Attributes:
      num_heads: h.
      precision: precision of the matrix products.
      out_scale: scale of the last kernel at initialisation.
      cross: whether tokens attend to `memory` alone; otherwise they attend to each other as well.
    """

    num_heads: int
    precision: Precision = Precision()
    out_scale: float = 1.0
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        memory: Float[Array, "B M D"] | None = None,
        allowed: Bool[Array, "B _ K"] | None = None,
        turns: Float[Array, "_ _ _"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attends from `x` to `memory` and, unless `cross`, to `x`.

        Args:
          x: tokens that are updated.
          memory: further tokens to attend to, which stay as they are.
          allowed: which keys each token may attend to; keys are `memory`, then `x`.
          turns: rotary embedding tables (`positions.turns_of`) of `memory`, then of `x`.
        """
        b, n, d = x.shape
        key_turns = turns
        if self.cross:
            assert memory is not None
            query = self._heads(Dense(d, self.precision, name="query")(x))
            pair = Dense(2 * d, self.precision, name="key_value").parts(memory, 2)
            key, value = map(self._heads, pair)
            key_turns = None if turns is None else turns[:, :-n]
        else:
            seen = x if memory is None else jnp.concatenate([memory, x], axis=1)
            parts = Dense(3 * d, self.precision, name="qkv").parts(seen, 3)
            query, key, value = map(self._heads, parts)
            query = query[:, :, -n:]
        if turns is not None and key_turns is not None:
            query, key = rotate(query, turns[:, -n:]), rotate(key, key_turns)
        scale = (d // self.num_heads) ** -0.5
        logits = product("bhqd,bhkd->bhqk", query * scale, key, self.precision)
        logits = logits.astype(jnp.float32)
        if allowed is not None:
            # A finite number, so that a row without allowed keys gives a mean instead of NaN.
            logits = jnp.where(allowed[:, None], logits, -1e9)
        # The softmax division comes after the product: d divisions per row instead of N.
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        self.sow("intermediates", "weights", weights / total)  # read by snapshots only
        out = product("bhqk,bhkd->bhqd", weights, value, self.precision)
        out = out / total.astype(out.dtype)
        out = out.transpose(0, 2, 1, 3).reshape(b, n, d)
        return Dense(d, self.precision, self.out_scale, name="out")(out)

    def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B h N d"]:
        b, n, d = x.shape
        x = x.astype(self.precision.operands)  # halves the memory that the backward pass keeps
        return x.reshape(b, n, self.num_heads, d // self.num_heads).transpose(0, 2, 1, 3)


class LayerScale(nn.Module):
    """A learned factor per feature, which starts at `initial`.

    References:
      Touvron et al. 2021, arXiv 2103.17239, section 2 (LayerScale).
    """

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * scale.astype(x.dtype)[None, None]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    `out_scale` scales both branches at initialisation. With 1 / sqrt(2 depth) the 2 depth branches
    of a network together add about as much as one, at any depth. If `layer_scale` is above 0, each
    branch is multiplied by learned factors that start at this value (`LayerScale`).

    If the block is applied with a key named "drop_path", each branch is skipped with probability
    `drop_path` per image, and otherwise multiplied by 1 / (1 - drop_path).

    References:
      Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3
      (`out_scale`); Huang et al. 2016, arXiv 1603.09382, section 3 (stochastic depth).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    precision: Precision = Precision()
    drop_path: float = 0.0
    out_scale: float = 1.0
    layer_scale: float = 0.0
    cross: bool = False
    gelu: str = "tanh"  # one of `GELUS`
    epsilon: float = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        memory: Float[Array, "B M D"] | None = None,
        allowed: Bool[Array, "B _ K"] | None = None,
        turns: Float[Array, "_ _ _"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Returns the updated tokens; see `Attention` for the arguments."""
        d = x.shape[-1]
        norm = layer_norm("norm_attention", self.epsilon)
        attention = Attention(
            self.num_heads, self.precision, self.out_scale, self.cross, name="attention"
        )
        if memory is not None and not self.cross:  # with `cross`, the caller has normalised it
            memory = norm(memory)
        y = attention(norm(x), memory=memory, allowed=allowed, turns=turns)
        x = x + self._branch(y, "scale_attention")
        y = layer_norm("norm_mlp", self.epsilon)(x)
        y = Dense(int(d * self.mlp_ratio), self.precision, name="mlp_in")(y)
        y = y.astype(self.precision.operands)  # halves the memory that the backward pass keeps
        y = nn.gelu(y.astype(jnp.float32), approximate=self.gelu == "tanh")
        y = Dense(d, self.precision, self.out_scale, name="mlp_out")(y)
        return x + self._branch(y, "scale_mlp")

    def _branch(self, branch: Float[Array, "B N D"], name: str) -> Float[Array, "B N D"]:
        if self.layer_scale:
            branch = LayerScale(self.layer_scale, name=name)(branch)
        if not self.drop_path or not self.has_rng("drop_path"):
            return branch
        keep = jax.random.bernoulli(
            self.make_rng("drop_path"), 1.0 - self.drop_path, (len(branch), 1, 1)
        )
        return branch * keep.astype(branch.dtype) / (1.0 - self.drop_path)


def block_type(*, remat: bool) -> Any:
    """Returns `Block`; with `remat`, the backward pass recomputes the forward pass of the block.

    Only the input of each block stays in memory, for about a third more computation.
    """
    return nn.remat(Block) if remat else Block


def layer_norm(name: str | None = None, epsilon: float = LAYER_NORM_EPSILON) -> nn.LayerNorm:
    """LayerNorm with affine parameters, in float32.

    The variance is the mean of (x - mean)^2. The faster form in Flax, mean(x^2) - mean^2, suffers
    from cancellation: at a mean of 1000 standard deviations its error is a tenth.
    """
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def residual_scale(depth: int) -> float:
    """1 / sqrt(2 depth), the `out_scale` of the blocks of a network."""
    return (2 * depth) ** -0.5


def drop_path_rates(depth: int, last: float) -> list[float]:
    """`drop_path` of each block of a network: from 0 at the first, linearly, to `last`.

    References:
      Huang et al. 2016, arXiv 1603.09382, section 4 (linear decay of survival).
    """
    return [last * i / (depth - 1) for i in range(depth)] if depth > 1 else [last] * depth
