import numpy as np
import pytest

from hjepa_jax.data.rows import spread_rows
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.knn import knn_probe
from hjepa_jax.evaluation.labelled import choose, edge_note, hold_out
from hjepa_jax.evaluation.linear import linear_probe
from hjepa_jax.evaluation.lowshot import lowshot_probe

X, Y = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 2


def test_hold_out_is_a_sorted_partition_fixed_by_its_seed():
    fit, val = hold_out(50_000, num_val=5000)
    assert len(val) == 5000
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, val])), np.arange(50_000))
    assert (np.diff(fit) > 0).all()
    assert (np.diff(val) > 0).all()
    np.testing.assert_array_equal(val, hold_out(50_000, num_val=5000)[1])
    assert (val != hold_out(50_000, num_val=5000, seed=1)[1]).any()


def test_hold_out_takes_a_fifth_of_a_small_set_at_most():
    fit, val = hold_out(104, num_val=5000)
    assert (len(fit), len(val)) == (84, 20)


def test_nothing_to_hold_out_is_refused():
    with pytest.raises(InputError, match=r"train_x='4 rows'.*at least 5"):
        hold_out(4, num_val=5000)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe, lowshot_probe])
@pytest.mark.parametrize(
    ("field", "arrays"),
    [
        ("train_x", (np.where(X > 22, np.nan, X), Y, X, Y)),
        ("train_y", (X, Y[1:], X, Y)),
        ("test_x", (X, Y, X[:, :1], Y)),
        ("test_y", (X, Y, X, Y + 1)),
    ],
)
def test_every_probe_refuses_arrays_that_do_not_fit_by_name(probe, field, arrays):
    with pytest.raises(InputError, match=f"^{field}="):
        probe(*arrays, num_classes=2)


def test_spread_rows_reach_every_class():
    labels = np.repeat(np.arange(10), 1600)
    for count in (10, 5_000, 10_000, 15_999):
        rows = spread_rows(np.arange(16_000), count)
        assert (len(rows), len(set(rows.tolist())), rows[0], rows[-1]) == (count, count, 0, 15_999)
        counts = np.bincount(labels[rows], minlength=10)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(spread_rows(np.array([3, 5]), 9), [3, 5])


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([1, 3, 2], {}, (1, False)),
        ([3, 1, 2], {}, (0, True)),
        ([1, 2, 3], {}, (2, True)),
        ([3, 1, 2], {"open_start": False}, (0, False)),
        ([1, 2, 3], {"open_end": False}, (2, False)),
        ([3, 3, 1], {}, (1, False)),  # one of the best two is inside the grid
        ([3, 1, 3], {}, (0, True)),
        ([3, 1, 3], {"open_end": False}, (2, False)),
        ([2, 2, 2, 2], {}, (1, False)),
        ([5], {}, (0, False)),  # a single setting is not a choice
    ],
)
def test_equal_scores_choose_the_first_inner_setting(scores, options, expected):
    assert choose(scores, **options) == expected


def test_the_end_of_a_grid_is_named():
    assert edge_note("k", 200, [1, 200]).startswith("k 200 is the largest tried")
    assert edge_note("l2", 1e-10, [1, 1e-10]).startswith("l2 1e-10 is the smallest tried")
