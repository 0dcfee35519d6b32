import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from hjepa_jax.data.sides import pair
from hjepa_jax.errors import InputError
from hjepa_jax.masks.blocks import covers
from hjepa_jax.masks.choice import is_first_smallest, lowest_first, rank
from hjepa_jax.masks.masks import Masks, gather_tokens, target_union
from hjepa_jax.masks.random_mask import RandomMask
from hjepa_jax.masks.samplers import HierarchicalMask, MaskSampler, MultiBlockMask


def sample(mask: MaskSampler, batch: int = 64, seed: int = 0) -> Masks:
    return jax.device_get(jax.jit(mask)(jax.random.split(jax.random.PRNGKey(seed), batch)))


def context_sets(masks: Masks) -> list[set[int]]:
    return sets_of(masks.context_index, masks.context_valid)


def target_sets(masks: Masks) -> list[set[int]]:
    return sets_of(masks.target_index, masks.target_valid)


def sets_of(index: np.ndarray, valid: np.ndarray) -> list[set[int]]:
    return [set(row[real].tolist()) for row, real in zip(index, valid, strict=True)]


@pytest.mark.parametrize("values", [3, 10_000])
def test_sorting_ranks_and_picks_as_comparing_does(monkeypatch, values):
    x = jnp.asarray(np.random.default_rng(0).integers(values, size=400) / values, jnp.float32)
    index = jnp.asarray(np.random.default_rng(1).integers(400, size=(2, 3, 9)))
    masks = Masks(index, index > 0, index, index % 3 > 0)
    make = lambda: (rank(x), lowest_first(x, jnp.int32(30), 50), target_union(masks, 400))
    compared = make()
    assert rank(x).tolist() == np.argsort(np.argsort(x, kind="stable")).tolist()
    assert is_first_smallest(x).tolist() == (rank(x) == 0).tolist()
    monkeypatch.setattr("hjepa_jax.masks.choice.MAX_COMPARED", 399)
    monkeypatch.setattr("hjepa_jax.masks.masks.MAX_COMPARED", 399)
    found = make()
    jax.tree.map(np.testing.assert_array_equal, found, compared)
    assert found[0].dtype == found[1][0].dtype == jnp.int32


def test_masks_of_the_largest_grid_compare_no_patch_with_every_other():
    """128 x 128 patches would need 268 million comparisons per image, so they are sorted."""
    sampler = MultiBlockMask(128, scale=(0.1, 0.2), aspect_ratio=(0.5, 2.0), num_blocks=2)
    rngs = jax.random.split(jax.random.PRNGKey(0), 1)
    program = jax.make_jaxpr(lambda rngs: target_union(sampler(rngs), 128**2))(rngs)
    sizes = [var.aval.size for eqn in every_equation(program.jaxpr) for var in eqn.outvars]
    assert max(sizes) <= 4 * 128**2


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


def test_gather_tokens_copies_rows_exactly():
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    index = np.array([[6, 0, 0], [3, 2, 1]])
    batched = gather_tokens(jnp.asarray(x), jnp.asarray(index))
    np.testing.assert_array_equal(batched, np.take_along_axis(x, index[..., None], axis=1))
    np.testing.assert_array_equal(gather_tokens(jnp.asarray(x[0]), jnp.asarray(index)), x[0][index])


RATIO = (0.5, 2.0)
NUM_SAMPLES = 1000


@st.composite
def kinds_of_masks(draw) -> functools.partial:
    """Draws a mask of any kind on a grid from 3 x 3 to 32 x 32. Some draws are impossible."""
    kind = draw(st.sampled_from(["multiblock", "hierarchical", "random"]))
    grid_size = draw(st.integers(3, 32)), draw(st.integers(3, 32))
    num_levels = draw(st.integers(1, 3))
    low, spread = draw(st.floats(0.05, 0.3)), draw(st.floats(0.05, 0.2))
    ratio = draw(st.sampled_from([RATIO, (1.0, 1.0), (0.4, 0.8)]))
    shared = {"scale": (low, low + spread)}
    if kind == "random":
        return functools.partial(RandomMask, grid_size, align_level=num_levels - 1, **shared)
    shared |= {"aspect_ratio": ratio}
    if kind == "multiblock":
        shared |= {"align_level": num_levels - 1, "num_blocks": draw(st.integers(1, 4))}
        return functools.partial(MultiBlockMask, grid_size, **shared)
    growth = draw(st.sampled_from(["geometric", "linear"])), draw(st.floats(1.0, 1.6))
    shared |= {"num_blocks": num_levels + 1, "num_levels": num_levels, "progression": growth}
    return functools.partial(HierarchicalMask, grid_size, **shared)


def rules_of(mask: MaskSampler) -> list[tuple[int, tuple[float, float]]]:
    """Returns the cell side and the area range of each block."""
    if isinstance(mask, HierarchicalMask):
        kind, factor = mask.progression
        levels = [m % mask.num_levels for m in range(mask.num_blocks)]
        growth = [factor**v if kind == "geometric" else 1 + v * (factor - 1) for v in levels]
        low, high = mask.scale
        return [(2**v, (low * g, high * g)) for v, g in zip(levels, growth, strict=True)]
    num_blocks = 1 if isinstance(mask, RandomMask) else mask.num_blocks
    return [(2**mask.align_level, mask.scale)] * num_blocks


def cells_of(hidden: np.ndarray, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduces [n, G, H] patches to [n, r, c] cells: at least partly hidden, and fully hidden."""
    edges = [np.arange(0, side, cell) for side in hidden.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(hidden.astype(int), edges[0], 1), edges[1], 2)
    heights, widths = (
        np.minimum(cell, side - e) for side, e in zip(hidden.shape[1:], edges, strict=True)
    )
    return sums > 0, sums == np.outer(heights, widths)


def placements(mask: MaskSampler, cell: int, scale: tuple[float, float]) -> np.ndarray:
    """Returns the probability [G, H] that one block covers a patch.

    The computation does not use the code under test. It takes areas and aspect ratios from a fine
    grid. A block gets the shape nearest to both. All placements of a shape are equally likely,
    and fewer of them cover the border.
    """
    grid = pair(mask.grid_size)
    r, c = (-(-side // cell) for side in grid)
    if isinstance(mask, RandomMask):
        shares = np.arange(1, r * c + 1) / (r * c)
        return np.full(grid, shares[(shares > scale[0] - 1e-6) & (shares < scale[1] + 1e-6)].mean())
    # Sides are fractions of the grid's sides, because an aspect ratio of 1 means the grid's own.
    high_of, wide_of = (
        {k: min(k * cell, side) / side for k in range(1, -(-side // cell) + 1)} for side in grid
    )
    area = {(h, w): high_of[h] * wide_of[w] for h in high_of for w in wide_of}
    low, high = mask.aspect_ratio
    fits = [
        (h, w)
        for (h, w), a in area.items()
        if scale[0] - 1e-6 <= a <= scale[1] + 1e-6
        and low - 1e-6 <= high_of[h] / wide_of[w] <= high + 1e-6
    ]
    u = (np.arange(400) + 0.5) / 400
    log_area = np.log(scale[0] + (scale[1] - scale[0]) * u)[:, None, None]
    log_aspect = (np.log(low) + np.log(high / low) * u)[None, :, None]
    areas, aspects = np.log([(area[s], high_of[s[0]] / wide_of[s[1]]) for s in fits]).T
    nearest = np.argmin((areas - log_area) ** 2 + (aspects - log_aspect) ** 2, axis=-1)
    expected = np.zeros((r, c))
    for shape, times in zip(fits, np.bincount(nearest.ravel(), minlength=len(fits)), strict=True):
        rows, cols = (
            np.mean(
                [(np.arange(m) >= s) & (np.arange(m) < s + n) for s in range(m - n + 1)], axis=0
            )
            for n, m in zip(shape, (r, c), strict=True)
        )
        expected += times / nearest.size * np.outer(rows, cols)
    return expected.repeat(cell, 0).repeat(cell, 1)[: grid[0], : grid[1]]


@pytest.mark.slow
@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    phases=[Phase.generate],  # shrinking would search for rare random failures
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(kind=kinds_of_masks(), seed=st.integers(0, 2**31 - 1))
def test_any_possible_mask_obeys_its_rules(kind, seed):
    try:
        mask = kind()
    except InputError:
        assume(False)
        raise
    check_rules(mask, seed)


# Cells do not divide most of these grids evenly. Cells at the far edges are then cut, but blocks
# must still reach them.
GRIDS = [
    MultiBlockMask(5, 1, (0.36, 0.45), (0.4, 2.5), align_level=1),  # blocks may span the grid
    MultiBlockMask((6, 10), 4, (0.15, 0.35), RATIO, align_level=1),
    RandomMask((7, 3), scale=(0.2, 0.5), align_level=1),
    HierarchicalMask(14, 4, (0.1, 0.15), RATIO, num_levels=3, progression=("geometric", 1.5)),
    HierarchicalMask(16, 3, (0.1, 0.15), RATIO, num_levels=3, progression=("linear", 1.5)),
]


@pytest.mark.parametrize("mask", GRIDS, ids=lambda m: f"{type(m).__name__}-{pair(m.grid_size)}")
def test_masks_obey_their_rules_on_grids_of_every_kind(mask):
    check_rules(mask, seed=0)


def check_rules(mask: MaskSampler, seed: int) -> None:
    """Checks many draws of a mask against the rules of its kind and its fields."""
    (g, h), rules = pair(mask.grid_size), rules_of(mask)
    draws = np.random.default_rng(seed).random((NUM_SAMPLES, mask.num_draws), np.float32)
    keys = jax.random.split(jax.random.PRNGKey(seed), 16)
    draw = jax.jit(lambda k, u: (mask(k), jax.vmap(mask.sample_targets)(u)))
    masks, targets = jax.device_get(draw(keys, draws))
    if not isinstance(mask, RandomMask):
        for corner, ends in enumerate(itertools.product((0.0, 1.0 - 1e-6), repeat=2)):
            placed = draws.copy()
            placed[:, 2::4], placed[:, 3::4] = ends  # first row and column of a block
            index, valid, _ = jax.device_get(draw(keys, placed)[1])
            patch = (0, h - 1, h * (g - 1), h * g - 1)[corner]
            assert np.all(np.any((index == patch) & valid, axis=-1)), "a corner cannot be hidden"

    # Per image: context and targets are disjoint, in range and without repetition.
    assert masks.context_index.shape == (16, mask.context_capacity)
    assert masks.target_index.shape == (16, len(rules), mask.block_capacity)
    for context, hidden in zip(context_sets(masks), target_sets(masks), strict=True):
        assert not context & hidden
        assert (context | hidden) <= set(range(g * h))
    counts = [len(context) for context in context_sets(masks)]
    assert counts == masks.context_valid.sum(axis=1).tolist(), "a context patch is repeated"

    # Per block: cells are whole, the area is in its range, and every patch can be hidden.
    index, valid, union = targets
    covered = hidden_patches(index, valid, (g, h))
    np.testing.assert_array_equal(covered.any(axis=1).reshape(NUM_SAMPLES, -1), union)
    for m, (cell, scale) in enumerate(rules):
        touched, whole = cells_of(covered[:, m], cell)
        np.testing.assert_array_equal(touched, whole, "a cell is only partly hidden")
        if isinstance(mask, RandomMask):
            areas = touched.mean(axis=(1, 2))
        else:
            rows, cols = touched.any(axis=2).sum(axis=1), touched.any(axis=1).sum(axis=1)
            np.testing.assert_array_equal(rows * cols, touched.sum(axis=(1, 2)), "not a rectangle")
            # Sides of the drawn shape, before the far edge of the grid cuts it.
            height, width = np.minimum(cell * rows, g) / g, np.minimum(cell * cols, h) / h
            areas = height * width
            assert mask.aspect_ratio[0] - 1e-4 <= (height / width).min()
            assert (height / width).max() <= mask.aspect_ratio[1] + 1e-4
        assert scale[0] - 1e-4 <= areas.min()
        assert areas.max() <= scale[1] + 1e-4
        expected = placements(mask, cell, scale)
        assert expected.min() > 0
        fair = np.minimum(expected[::cell, ::cell], 1)  # all patches of a cell agree
        if not is_fair(touched, fair):
            # Neighbouring cells are hidden together, so a fair sampler misses the limits by chance,
            # in 2 of 60 draws of one mask. A wrong one misses them again with ten times the draws.
            more = np.random.default_rng([seed, m]).random(
                (10 * len(draws), *draws.shape[1:]), "f4"
            )
            index, valid, _ = jax.device_get(draw(keys, more)[1])
            hidden = hidden_patches(index, valid, (g, h))[:, m]
            assert is_fair(cells_of(hidden, cell)[0], fair)


def is_fair(touched: np.ndarray, fair: np.ndarray) -> bool:
    """Returns whether the cells [n, r, c] are hidden about as often as expected.

    A fair sampler has 0.3 % of the cells beyond 3 sigma, if cells were independent.
    """
    hits = touched.sum(axis=0)
    tails = binom.cdf(hits, len(touched), fair), binom.sf(hits - 1, len(touched), fair)
    chance = 2 * np.minimum(*tails)
    few = np.sum(chance < 2 * norm.sf(3)) <= 1 + 0.02 * chance.size
    return bool(few and chance.min() > 1e-8)


def hidden_patches(index: np.ndarray, valid: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the patches [n, M, G, H] that each of M blocks hides; refuses a repeated patch."""
    times = np.zeros((*index.shape[:2], grid[0] * grid[1]), int)
    np.add.at(times, (*np.indices(index.shape)[:2], index), valid)
    assert times.max() == 1, "a target patch is repeated"
    return times.reshape(*index.shape[:2], *grid) == 1


OWN_CONTEXT = {"context_scale": (0.4, 0.6), "num_context": 64}


@pytest.mark.parametrize(
    "mask",
    [
        MultiBlockMask(8, 2, (0.05, 0.1), **OWN_CONTEXT),
        HierarchicalMask(8, 2, (0.05, 0.1), progression=("geometric", 1.0), **OWN_CONTEXT),
        RandomMask(8, scale=(0.05, 0.1), **OWN_CONTEXT),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_the_context_is_a_separate_block_minus_the_targets(mask):
    """The block is the bounding box of the visible patches, unless targets hide a whole side."""
    masks = sample(mask, batch=1000)
    shapes, corners = collections.Counter(), set()
    for seen, hidden in zip(context_sets(masks), target_sets(masks), strict=True):
        rows, cols = np.divmod(sorted(seen), 8)
        height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
        block = {8 * (rows.min() + i) + cols.min() + j for i in range(height) for j in range(width)}
        assert block - hidden == seen, "a patch of the block is neither context nor target"
        shapes[int(height), int(width)] += 1
        corners |= seen & {0, 7, 56, 63}
    allowed = {
        (height, width)
        for height, width in itertools.product(range(1, 9), repeat=2)
        if 0.4 <= height * width / 64 <= 0.6 and 0.75 <= height / width <= 1.5
    }
    assert {shape for shape, count in shapes.items() if count > 50} == allowed
    assert sum(shapes[shape] for shape in allowed) > 950
    assert corners == {0, 7, 56, 63}


@pytest.mark.parametrize(
    ("mask", "accuracy"),
    [
        (MultiBlockMask(8, 4, (0.09, 0.19)), 0.05),
        (MultiBlockMask(14, 4, (0.25, 0.35), align_level=2), 0.15),  # the edge cuts cells
        (MultiBlockMask(5, 4, (0.6, 0.7), align_level=2), 0.25),
        (HierarchicalMask(14, 4, (0.1, 0.15), RATIO, num_levels=3), 0.15),
        (RandomMask(14, scale=(0.2, 0.5), align_level=2), 0.05),
    ],
    ids=["whole", "cut", "few", "hierarchical", "random"],
)
def test_the_context_has_room_for_what_is_visible_on_average(mask, accuracy):
    """The tolerance is needed: the estimate ignores that blocks overlap more near the middle."""
    draws = np.random.default_rng(0).random((2000, mask.num_draws + 4), np.float32)

    def count(u):
        *_, hidden = mask.sample_targets(u[:-4])
        return jnp.sum(covers([mask._context_block.place(u[-4:])], mask.grid_size) & ~hidden)

    visible = np.mean(jax.jit(jax.vmap(count))(draws))
    expected = mask.expected_num_visible
    np.testing.assert_allclose(expected, visible, rtol=accuracy)
    assert mask.context_capacity % 8 == 0
    assert expected <= mask.context_capacity < expected + 8


def test_blocks_grow_with_their_level_by_the_progression():
    """Blocks of 2 x 2 patches grow to four times their area at level 1.

    At level 2 the factor is sixteen (geometric) or seven (linear). No square has seven times the
    area, so the linear progression is refused.
    """
    squares = {"num_blocks": 4, "num_levels": 3, "scale": (4 / 256, 4 / 256)}
    mask = HierarchicalMask(16, **squares, aspect_ratio=(1, 1), progression=("geometric", 4.0))
    masks = jax.eval_shape(mask, jax.random.split(jax.random.PRNGKey(0), 2))
    assert masks.target_index.shape == (2, 4, 64)
    assert HierarchicalMask(16).scale == RandomMask(16).scale == (0.15, 0.2), "wrong default"
    assert [block.areas.tolist() for block in mask.blocks] == [[4], [16], [64], [4]]
    with pytest.raises(
        InputError, match=r"mask.progression=\('linear', 4.0\): at level 2: no block"
    ):
        HierarchicalMask(16, **squares, aspect_ratio=(1, 1), progression=("linear", 4.0))
    wide = {**squares, "scale": (0.02, 0.06), "aspect_ratio": (0.1, 10)}
    scales = [b.scale for b in HierarchicalMask(16, **wide, progression=("linear", 3.0)).blocks]
    np.testing.assert_allclose(scales[:3], [(0.02, 0.06), (0.06, 0.18), (0.1, 0.3)])


def test_random_cells_are_scattered_and_their_number_is_uniform():
    mask = RandomMask(8, scale=(0.25, 0.5), align_level=1)  # 4 to 8 of 16 cells
    masks = sample(mask, batch=2000)
    assert masks.target_index.shape == (2000, 1, 32)
    counts, times = np.unique(masks.target_valid.sum(axis=(1, 2)) // 4, return_counts=True)
    assert counts.tolist() == [4, 5, 6, 7, 8]
    np.testing.assert_allclose(times / 2000, 0.2, atol=0.035)
    corners = np.array([s >= {0, 63} for s in target_sets(masks)])
    assert corners.mean() > 0.05, "distant cells must be hidden together"


def test_kept_context_is_a_uniform_choice_among_visible_patches():
    mask = functools.partial(MultiBlockMask, 8, 1, (0.25, 0.25), (1.0, 1.0), context_scale=(1, 1))
    every, kept = (sample(mask(num_context=k), batch=5000) for k in (64, 12))
    counts = [np.bincount([i for s in context_sets(m) for i in s]) for m in (every, kept)]
    np.testing.assert_allclose(counts[1] / counts[0], 12 / 48, atol=0.035)


def test_the_context_is_padded_if_fewer_patches_are_visible():
    mask = MultiBlockMask(8, 2, (0.25, 0.25), (1.0, 1.0), context_scale=(1.0, 1.0), num_context=40)
    masks = sample(mask)
    visible = 64 - np.array([len(s) for s in target_sets(masks)])
    np.testing.assert_array_equal(masks.context_valid.sum(axis=1), np.minimum(visible, 40))


def test_a_mask_depends_on_its_key_and_on_no_other_image():
    mask = MultiBlockMask(14, 4, (0.15, 0.25), align_level=1)
    draw, rngs = jax.jit(mask), jax.random.split(jax.random.PRNGKey(0), 8)
    whole = sample(mask, batch=8)
    jax.tree.map(np.testing.assert_array_equal, draw(rngs), whole)
    jax.tree.map(lambda w, a: np.testing.assert_array_equal(w[2:3], a), whole, draw(rngs[2:3]))
    assert len({tuple(sorted(s)) for s in context_sets(whole)}) == 8
    assert context_sets(whole) != context_sets(sample(mask, batch=8, seed=1))
    union = jax.jit(target_union, static_argnums=1)(whole, 196)
    assert [set(np.flatnonzero(row).tolist()) for row in union] == target_sets(whole)


def test_image_without_a_visible_patch_has_no_target():
    """Four 4x4 blocks can tile the 8x8 grid. Then no patch is left to predict from."""
    mask = MultiBlockMask(8, 4, (0.25, 0.25), (1.0, 1.0), align_level=2)
    masks = sample(mask, batch=2000)
    hidden_all = ~masks.context_valid.any(axis=1)
    assert hidden_all.any()
    assert not masks.target_valid[hidden_all].any()
    assert masks.target_valid[~hidden_all].any(axis=(1, 2)).all()


IMPOSSIBLE = {
    MultiBlockMask: [
        ({"scale": (0.01, 0.01)}, "scale"),
        ({"scale": (0.15, 0.2), "align_level": 2}, "scale"),
        ({"context_scale": (0.001, 0.002)}, "context_scale"),
        ({"scale": (0.9, 1.0), "num_blocks": 4}, "scale"),
        ({"num_context": 65}, "num_context"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
    HierarchicalMask: [
        ({"num_blocks": 1}, "num_blocks"),
        ({"num_levels": 3, "num_blocks": 3, "progression": ("geometric", 3.0)}, "progression"),
        ({"scale": (0.14, 0.15), "progression": ("linear", 1.1)}, "progression"),
        ({"scale": (0.01, 0.01)}, "scale"),
        ({"scale": (0.9, 1.0), "progression": ("linear", 1.0)}, "scale"),
    ],
    RandomMask: [
        ({"scale": (0.01, 0.015)}, "scale"),
        ({"scale": (0.1, 0.12), "align_level": 2}, "scale"),
        ({"scale": (0.99, 1.0)}, "scale"),
        ({"num_context": 65}, "num_context"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "kwargs", "field"), [(kind, *case) for kind in IMPOSSIBLE for case in IMPOSSIBLE[kind]]
)
def test_impossible_masks_are_refused_by_name(kind, kwargs, field):
    with pytest.raises(InputError) as error:
        kind(8, **kwargs)
    assert error.value.field == f"mask.{field}"
