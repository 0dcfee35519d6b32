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


@pytest.mark.parametrize("grid_size", [*range(2, 20), (3, 14)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_pooling_matrix_is_row_stochastic_and_uses_each_patch_once(grid_size, level):
    a = hierarchy.pooling_matrix(grid_size, level)
    np.testing.assert_allclose(a.sum(axis=1), 1, atol=1e-6)
    assert ((a > 0).sum(axis=0) == 1).all()


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


def test_cell_counts_as_hidden_at_the_stated_coverage():
    hidden = np.zeros((1, 16), bool)
    hidden[0, [0, 1, 4, 5, 2]] = True  # the first 2x2 cell whole, a quarter of the second
    cells = lambda c: np.asarray(hierarchy.hidden_cells(jnp.asarray(hidden), 4, 1, c))[0].tolist()
    assert cells(1.0) == [True, False, False, False]
    assert cells(0.25) == [True, True, False, False]
    assert cells(0.26) == [True, False, False, False]
    assert cells(1e-5) == [True, True, False, False], "a cell that is all visible is no target"


def test_a_cell_of_thousands_of_patches_is_not_whole_with_one_of_them_visible():
    hidden = np.ones((2, 128 * 128), bool)
    hidden[1, 77] = False
    found = np.asarray(hierarchy.hidden_cells(jnp.asarray(hidden), 128, 7, 1.0))
    assert found.tolist() == [[True], [False]]


def test_ragged_cell_is_hidden_when_all_its_patches_are():
    hidden = np.zeros((1, 9), bool)
    hidden[0, 8] = True  # the lone patch of the last cell of a 3x3 grid
    assert np.asarray(hierarchy.hidden_cells(jnp.asarray(hidden), 3, 1, 1.0)).tolist() == [
        [False, False, False, True]
    ]
