import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hjepa_jax.blocks import block_shapes, rank
from hjepa_jax.errors import InputError
from hjepa_jax.masking import (
    Masks,
    MultiBlockMask,
    gather_tokens,
    target_union,
)


def sample(mask: MultiBlockMask, batch: int = 64, seed: int = 0) -> Masks:
    return jax.device_get(jax.jit(mask)(jax.random.split(jax.random.PRNGKey(seed), batch)))


def context_sets(masks: Masks) -> list[set[int]]:
    rows = zip(masks.context_index, masks.context_valid, strict=True)
    return [set(index[valid].tolist()) for index, valid in rows]


def target_sets(masks: Masks) -> list[set[int]]:
    rows = zip(masks.target_index, masks.target_valid, strict=True)
    return [set(index[valid].tolist()) for index, valid in rows]


def test_rank_is_the_inverse_of_a_stable_sort():
    x = np.array([3.0, 1.0, 2.0, 1.0, 3.0], np.float32)
    assert rank(jnp.asarray(x)).tolist() == np.argsort(np.argsort(x, kind="stable")).tolist()
    assert rank(jnp.asarray(x)).tolist() == [3, 0, 2, 1, 4]


def test_gather_tokens_copies_rows_exactly():
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    index = np.array([[6, 0, 0], [3, 2, 1]])
    batched = gather_tokens(jnp.asarray(x), jnp.asarray(index))
    np.testing.assert_array_equal(batched, np.take_along_axis(x, index[..., None], axis=1))
    np.testing.assert_array_equal(gather_tokens(jnp.asarray(x[0]), jnp.asarray(index)), x[0][index])


@settings(max_examples=10, deadline=None)
@given(
    grid_size=st.integers(4, 16),
    align_level=st.integers(0, 2),
    num_blocks=st.integers(1, 5),
    low=st.floats(0.05, 0.4),
    spread=st.floats(0.0, 0.3),
    seed=st.integers(0, 2**31 - 1),
)
def test_masks_obey_their_rules(grid_size, align_level, num_blocks, low, spread, seed):
    aspect_ratio = (0.5, 2.0)
    try:
        mask = MultiBlockMask(
            grid_size,
            num_blocks,
            (low, low + spread),
            aspect_ratio,
            align_level=align_level,
        )
    except InputError:
        assume(False)
        raise
    masks = sample(mask, batch=16, seed=seed)
    n, cell = grid_size**2, 2**align_level
    assert masks.context_index.shape == (16, mask.context_capacity)
    assert masks.target_index.shape == (16, num_blocks, mask.block_capacity)
    for context, targets in zip(context_sets(masks), target_sets(masks), strict=True):
        assert not context & targets
        assert (context | targets) <= set(range(n))
    for index, valid in zip(masks.context_index, masks.context_valid, strict=True):
        assert len(set(index[valid].tolist())) == valid.sum(), "a context patch is repeated"
    blocks = zip(
        masks.target_index.reshape(-1, mask.block_capacity),
        masks.target_valid.reshape(-1, mask.block_capacity),
        strict=True,
    )
    for index, valid in blocks:
        if not valid.any():  # an image whose blocks hide everything
            continue
        patches = index[valid]
        assert len(set(patches.tolist())) == len(patches), "a target patch is repeated"
        rows, cols = patches // grid_size, patches % grid_size
        height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
        assert height * width == len(patches), "a target block is not a rectangle"
        assert rows.min() % cell == 0
        assert cols.min() % cell == 0
        assert (rows.max() + 1) % cell == 0 or rows.max() + 1 == grid_size
        assert (cols.max() + 1) % cell == 0 or cols.max() + 1 == grid_size
        if grid_size % cell == 0:
            assert low - 1e-4 <= len(patches) / n <= low + spread + 1e-4
            assert aspect_ratio[0] - 1e-4 <= height / width <= aspect_ratio[1] + 1e-4


def test_area_range_is_covered_and_its_middle_is_typical():
    mask = MultiBlockMask(14, 1, (0.1, 0.4), (0.5, 2.0))
    masks = sample(mask, batch=4000)
    area = masks.target_valid.sum(axis=(1, 2)) / 196
    assert area.min() < 0.13
    assert area.max() > 0.37
    assert abs(area.mean() - 0.25) < 0.015


def test_every_patch_is_a_target_and_a_context_patch_somewhere():
    mask = MultiBlockMask(8, 4, (0.15, 0.25), align_level=1)
    masks = sample(mask, batch=2000)
    targets = np.bincount([i for s in target_sets(masks) for i in s], minlength=64) / 2000
    context = np.bincount([i for s in context_sets(masks) for i in s], minlength=64) / 2000
    assert targets.min() > 0.3, "corners too must be targets"
    assert context.min() > 0.05


def test_target_coverage_is_that_of_uniform_placement():
    """A block of fixed shape h x w covers a patch with a probability that can be counted."""
    grid_size, side, batch = 6, 3, 6000
    mask = MultiBlockMask(grid_size, 1, (0.25, 0.25), (1.0, 1.0))
    masks = sample(mask, batch=batch)
    count = np.bincount([i for s in target_sets(masks) for i in s], minlength=36)
    starts = np.arange(grid_size - side + 1)
    per_side = np.array([np.mean((starts <= p) & (p < starts + side)) for p in range(grid_size)])
    expected = np.outer(per_side, per_side).reshape(-1)
    sigma = np.sqrt(expected * (1 - expected) / batch)
    assert np.all(np.abs(count / batch - expected) < 4.5 * sigma)


def test_kept_context_is_a_uniform_choice_among_visible_patches():
    free = MultiBlockMask(8, 1, (0.25, 0.25), (1.0, 1.0), context_scale=(1.0, 1.0), num_context=64)
    few = MultiBlockMask(8, 1, (0.25, 0.25), (1.0, 1.0), context_scale=(1.0, 1.0), num_context=12)
    batch = 5000
    visible = np.bincount([i for s in context_sets(sample(free, batch)) for i in s], minlength=64)
    kept = np.bincount([i for s in context_sets(sample(few, batch)) for i in s], minlength=64)
    np.testing.assert_allclose(kept / visible, 12 / 48, atol=0.035)


def test_padding_appears_where_fewer_patches_are_visible():
    mask = MultiBlockMask(8, 2, (0.25, 0.25), (1.0, 1.0), context_scale=(1.0, 1.0), num_context=40)
    masks = sample(mask)
    visible = 64 - np.array([len(s) for s in target_sets(masks)])
    np.testing.assert_array_equal(masks.context_valid.sum(axis=1), np.minimum(visible, 40))


def test_same_key_gives_the_same_mask_and_rows_differ():
    mask = MultiBlockMask(14, 4, (0.15, 0.25), align_level=1)
    a, b = sample(mask, batch=8), sample(mask, batch=8)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len({tuple(sorted(s)) for s in context_sets(a)}) == 8
    other = sample(mask, batch=8, seed=1)
    assert context_sets(a) != context_sets(other)


def test_one_image_has_the_mask_it_has_in_a_batch():
    mask = MultiBlockMask(8, 4, (0.15, 0.25), align_level=1)
    rngs = jax.random.split(jax.random.PRNGKey(3), 5)
    whole, alone = mask(rngs), mask(rngs[2:3])
    jax.tree.map(lambda w, a: np.testing.assert_array_equal(w[2:3], a), whole, alone)


def test_target_union_marks_the_patches_of_all_blocks():
    mask = MultiBlockMask(14, 4, (0.15, 0.25), align_level=1)
    masks = mask(jax.random.split(jax.random.PRNGKey(0), 6))
    union = np.asarray(target_union(masks, 196))
    assert [set(np.flatnonzero(row).tolist()) for row in union] == target_sets(
        jax.device_get(masks)
    )


def test_image_without_a_visible_patch_has_no_target():
    """Four 4x4 blocks that happen to tile an 8x8 grid leave nothing to predict from."""
    mask = MultiBlockMask(8, 4, (0.25, 0.25), (1.0, 1.0), align_level=2)
    masks = sample(mask, batch=2000)
    hidden_all = ~masks.context_valid.any(axis=1)
    assert hidden_all.any()
    assert not masks.target_valid[hidden_all].any()
    assert masks.target_valid[~hidden_all].any(axis=(1, 2)).all()


def test_block_shapes_satisfy_both_ranges_on_a_ragged_grid():
    shapes = block_shapes(14, (0.1, 0.4), (0.75, 1.5), cell_size=4)
    sides = np.minimum(shapes * 4, 14)
    assert len(shapes)
    assert np.all((sides.prod(axis=1) / 196 >= 0.1) & (sides.prod(axis=1) / 196 <= 0.4))


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"scale": (0.01, 0.01)}, "mask.scale"),
        ({"scale": (0.15, 0.2), "align_level": 2}, "mask.scale"),
        ({"context_scale": (0.001, 0.002)}, "mask.context_scale"),
        ({"scale": (0.9, 1.0), "num_blocks": 4}, "mask.scale"),
        ({"num_context": 65}, "mask.num_context"),
        ({"num_blocks": 0}, "mask.num_blocks"),
    ],
)
def test_impossible_masks_are_refused_by_name(kwargs, field):
    with pytest.raises(InputError) as error:
        MultiBlockMask(8, **kwargs)
    assert error.value.field == field
