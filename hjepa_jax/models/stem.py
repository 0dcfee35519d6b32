"""The hMLP stem: a patch embedding with several small layers."""

from flax import linen as nn
from jaxtyping import Array, Float

from hjepa_jax.models.matmul import Dense, Precision
from hjepa_jax.models.transformer import layer_norm

STEMS = ("linear", "hmlp")


class PatchMLP(nn.Module):
    """Convolutions within each patch; the stride of each equals the width of its kernel.

    The last two layers merge 2 x 2 cells each. For patches larger than 4 pixels a first layer
    merges the rest, for example 4 x 4 pixels in patches of 16. A LayerNorm over channels and a GELU
    follow each layer but the last. The BatchNorm of the paper would mix patches and images.

    References:
      Touvron et al. 2022, arXiv 2203.09795, section 4 (hMLP; hidden layers of width D / 4).
    """

    width: int
    patch_size: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, patches: Float[Array, "B K P2C"]) -> Float[Array, "B K D"]:
        b, n, _ = patches.shape
        side, strides = self.patch_size, [2, 2]
        if self.patch_size > 4:
            strides.insert(0, self.patch_size // 4)
        x = patches
        for i, stride in enumerate(strides):
            cells, last = side // stride, i == len(strides) - 1
            x = x.reshape(b, n, cells, stride, cells, stride, -1).transpose(0, 1, 2, 4, 3, 5, 6)
            x = x.reshape(b, n * cells**2, -1)
            x = Dense(self.width if last else self.width // 4, self.precision, name=f"layer_{i}")(x)
            if not last:
                x = nn.gelu(layer_norm(f"norm_{i}")(x), approximate=True)
            side = cells
        return x.reshape(b, n, self.width)
