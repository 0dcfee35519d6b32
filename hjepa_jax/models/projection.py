"""The projection: an MLP into the space where all views of an image agree.

References:
  Chen et al. 2020, arXiv 2002.05709, section 4.2 (a nonlinear head between features and loss).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hjepa_jax.models.matmul import Dense, Precision

EPSILON = 1e-5


class BatchStandardize(nn.Module):
    """Zero mean and unit variance over images and views, then a scale and a bias per feature."""

    @nn.compact
    def __call__(self, x: Float[Array, "I V D"]) -> Float[Array, "I V D"]:
        mean = jnp.mean(x, axis=(0, 1), keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=(0, 1), keepdims=True)
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
        return x * scale[None, None] + bias[None, None]


class Projection(nn.Module):
    """MLP with hidden features that are standardized over all views of the batch.

    The hidden layers have no bias: standardizing would remove it, and Adam would follow the
    rounding noise in its gradient. The statistics always come from the current batch, because only
    the loss reads the result.

    Attributes:
      hidden: width of each of the two hidden layers.
      features: width of the result, K.
      precision: precision of the matrix products; parameters are float32.
    """

    hidden: int
    features: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "I V D"]) -> Float[Array, "I V K"]:
        """Projects V views of each of I images."""
        for layer in range(2):
            dense = Dense(self.hidden, self.precision, use_bias=False, name=f"hidden_{layer}")
            x = dense(x).astype(jnp.float32)
            x = jnp.maximum(BatchStandardize(name=f"norm_{layer}")(x), 0.0)
        return Dense(self.features, self.precision, name="out")(x).astype(jnp.float32)
