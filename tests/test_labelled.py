import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.labelled import hold_out, spread_rows


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


def test_rows_are_spread_from_the_first_to_the_last_so_that_no_class_is_left_out():
    """Of 16,000 images in 10 classes, one after the other, as a folder has them."""
    labels = np.repeat(np.arange(10), 1600)
    for count in (10, 5_000, 10_000, 15_999):
        rows = spread_rows(np.arange(16_000), count)
        assert (len(rows), len(set(rows.tolist())), rows[0], rows[-1]) == (count, count, 0, 15_999)
        counts = np.bincount(labels[rows], minlength=10)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(spread_rows(np.array([3, 5]), 9), [3, 5])
