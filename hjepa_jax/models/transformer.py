"""Pre-norm transformer blocks, of which encoder and predictor are made.

References:
  Dosovitskiy et al. 2021, arXiv 2010.11929 (ViT). By default the GELU is the tanh form (fast on
  every backend). Exponentials and sums of softmax, and LayerNorm, are computed in float32 whatever
  the precision is, of logits in the precision's results.
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
    """Multi-head attention, explicit in [B, h, N, d], the layout every backend likes.

    Of tokens to each other, and to those `before` them; given a `source`, to those of the source.
    """

    num_heads: int
    precision: Precision = Precision()
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        allowed: Bool[Array, "B _ K"] | None = None,
        turns: Float[Array, "_ _ _"] | None = None,
        source: Float[Array, "B K D"] | None = None,
        source_turns: Float[Array, "_ K _"] | None = None,
        before: Float[Array, "B C D"] | None = None,
    ) -> Float[Array, "B N D"]:
        b, n, d = x.shape
        if source is None:
            seen = x if before is None else jnp.concatenate([before, x], axis=1)
            parts = Dense(3 * d, self.precision, name="qkv").parts(seen, 3)
            query, key, value = map(self._heads, parts)
            query, source_turns = query[:, :, -n:], turns
            turns = None if turns is None else turns[:, -n:]
        else:
            query = self._heads(Dense(d, self.precision, name="query")(x))
            pair = Dense(2 * d, self.precision, name="key_value").parts(source, 2)
            key, value = map(self._heads, pair)
        if turns is not None and source_turns is not None:
            query, key = rotate(query, turns), rotate(key, source_turns)
        scale = (d // self.num_heads) ** -0.5
        logits = product("bhqd,bhkd->bhqk", query * scale, key, self.precision)
        logits = logits.astype(jnp.float32)
        if allowed is not None:
            # Finite, so that a row without one allowed key gives a mean and not NaN.
            logits = jnp.where(allowed[:, None], logits, -1e9)
        # The softmax's division comes after the product: over d numbers a row instead of N.
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        self.sow("intermediates", "weights", weights / total)  # for who asks; nothing in training
        out = product("bhqk,bhkd->bhqd", weights, value, self.precision)
        out = out / total.astype(out.dtype)
        out = out.transpose(0, 2, 1, 3).reshape(b, n, d)
        return Dense(d, self.precision, self.out_scale, name="out")(out)

    def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B h N d"]:
        b, n, d = x.shape
        x = x.astype(self.precision.operands)  # what is kept for the backward pass: half of it
        return x.reshape(b, n, self.num_heads, d // self.num_heads).transpose(0, 2, 1, 3)


class LayerScale(nn.Module):
    """A learned factor per feature, at first `initial`.

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

    `out_scale` scales what either branch adds at initialisation. With 1 / sqrt(2 depth) the 2 depth
    branches of a network together add about as much as one, however deep it is. `layer_scale` above
    0 multiplies them by learned factors, which begin there (`LayerScale`).

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
    layer_scale: float = 0.0
    gelu: str = "tanh"  # one of `GELUS`
    epsilon: float = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        allowed: Bool[Array, "B _ K"] | None = None,
        turns: Float[Array, "_ _ _"] | None = None,
        source: Float[Array, "B K D"] | None = None,
        source_turns: Float[Array, "_ K _"] | None = None,
        before: Float[Array, "B C D"] | None = None,
    ) -> Float[Array, "B N D"]:
        """See `Attention`.

        Args:
          x: tokens.
          allowed: which keys each token may attend to; None for all.
          turns: of rotary positions, see `positions.rotate`; None for no rotation.
          source: tokens to attend to; None for those of `x`.
          source_turns: theirs.
          before: tokens before `x` that are attended to like them, and not computed any further;
            the keys of `allowed`, and `turns`, begin with theirs.
        """
        d = x.shape[-1]
        norm = layer_norm("norm_attention", self.epsilon)
        attention = Attention(self.num_heads, self.precision, self.out_scale, name="attention")
        before = None if before is None else norm(before)
        y = attention(norm(x), allowed, turns, source, source_turns, before)
        x = x + self._branch(y, "scale_attention")
        y = layer_norm("norm_mlp", self.epsilon)(x)
        y = Dense(int(d * self.mlp_ratio), self.precision, name="mlp_in")(y)
        y = y.astype(self.precision.operands)  # what is kept for the backward pass: half of it
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
    """`Block`; with `remat`, one whose backward pass computes the forward pass again.

    That keeps the input of each block only: less memory for a third more computation.
    """
    return nn.remat(Block) if remat else Block


def layer_norm(name: str | None = None, epsilon: float = LAYER_NORM_EPSILON) -> nn.LayerNorm:
    """LayerNorm with affine parameters, in float32.

    The variance is the mean of (x - mean)^2. Flax's faster mean(x^2) - mean^2 cancels: at a mean of
    1000 standard deviations it is wrong by a tenth.
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
