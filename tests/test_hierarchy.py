import math

import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.data.sides import pair
from hjepa_jax.models import hierarchy

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("grid_size", "level"), [(8, 1), (8, 3), (14, 2), (5, 1), ((3, 8), 1), ((7, 5), 2)]
)
def test_pooling_is_the_mean_over_the_patches_a_cell_has(grid_size, level):
    rows, cols = pair(grid_size)
    x = RNG.normal(size=(rows, cols, 3))
    side = 2**level
    expected = [
        x[r : r + side, c : c + side].mean(axis=(0, 1))
        for r in range(0, rows, side)
        for c in range(0, cols, side)
    ]
    tokens = jnp.asarray(x.reshape(1, -1, 3), jnp.float32)
    pooled = hierarchy.pool(tokens, grid_size, level)
    np.testing.assert_allclose(pooled[0], expected, atol=1e-6)
    assert math.prod(hierarchy.level_grid(grid_size, level)) == len(expected)


def test_standardize_gives_zero_mean_and_unit_variance():
    x = hierarchy.standardize(jnp.asarray(3 + 5 * RNG.normal(size=(4, 64)), jnp.float32))
    np.testing.assert_allclose(x.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=-1), 1, atol=1e-4)


def test_level_features_pool_before_they_standardize():
    tokens = jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    levels = hierarchy.level_features(tokens, 4, 3)
    assert [level.shape for level in levels] == [(2, 16, 8), (2, 4, 8), (2, 1, 8)]
    np.testing.assert_allclose(
        levels[2], hierarchy.standardize(tokens.mean(axis=1, keepdims=True)), atol=1e-5
    )


def hidden_cells(hidden, *args):
    """Calls `hierarchy.hidden_cells` for a square grid.

    `hidden` is an index of the hidden patches; `args` begin with the side of the grid.
    """
    patches = np.zeros((1, args[0] ** 2), bool)
    patches[0, hidden] = True
    return np.asarray(hierarchy.hidden_cells(jnp.asarray(patches), *args))[0].tolist()


@pytest.mark.parametrize(("coverage", "second"), [(1.0, 0), (0.25, 1), (0.26, 0), (1e-5, 1)])
def test_cell_counts_as_hidden_at_the_stated_coverage(coverage, second):
    """The first 2x2 cell and a quarter of the second are hidden. Visible cells never count."""
    assert hidden_cells([0, 1, 4, 5, 2], 4, 1, coverage) == [True, bool(second), False, False]


def test_coverage_1_needs_every_patch_of_a_cell():
    """All 16,384 patches of a large cell, or the only patch in the corner cell of a 3x3 grid."""
    assert hidden_cells(slice(None), 128, 7, 1.0) == [True]
    assert hidden_cells([i for i in range(128**2) if i != 77], 128, 7, 1.0) == [False]
    assert hidden_cells([8], 3, 1, 1.0) == [False, False, False, True]
