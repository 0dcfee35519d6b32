import numpy as np
import pytest
from sklearn.linear_model import Ridge

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.lowshot import draw_labels, fit_ridge, lowshot_probe
from tests.test_knn import blobs


@pytest.mark.parametrize(("n", "d"), [(60, 8), (8, 60)])
def test_ridge_equals_scikit_learn(n, d):
    x, y = blobs(n, d=d)
    alphas = [0.1, 10.0, 1e3]
    kernels, biases = fit_ridge(x, y, num_classes=4, alphas=alphas)
    for kernel, bias, alpha in zip(kernels, biases, alphas, strict=True):
        reference = Ridge(alpha=alpha).fit(x.astype(np.float64), np.eye(4)[y])
        np.testing.assert_allclose(kernel, reference.coef_.T, atol=1e-4)
        np.testing.assert_allclose(bias, reference.intercept_, atol=1e-4)


def test_ridge_matches_a_case_worked_by_hand():
    # x = -1, +1 with classes 0, 1. The centred targets of class 1 are -1/2, +1/2. So the slope is
    # sum(x t) / (sum(x^2) + alpha) = 1 / (2 + 2), and the bias is the class frequency, 1/2.
    x = np.array([[-1.0], [1.0]])
    kernels, biases = fit_ridge(x, np.array([0, 1]), num_classes=2, alphas=[2.0])
    np.testing.assert_allclose(kernels[0], [[-0.25, 0.25]], atol=1e-12)
    np.testing.assert_allclose(biases[0], [0.5, 0.5], atol=1e-12)


def test_draws_have_the_right_counts_and_no_held_out_row():
    y = np.repeat([0, 1, 2], [50, 100, 250])
    rows = np.arange(0, 400, 2)
    per_class = draw_labels(y, rows, 5, num_classes=3, seed=0)
    assert np.bincount(y[per_class]).tolist() == [5, 5, 5]
    fraction = draw_labels(y, rows, 0.1, num_classes=3, seed=0)
    assert np.bincount(y[fraction]).tolist() == [5, 10, 25]
    for drawn in (per_class, fraction):
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(rows)
    assert set(per_class) != set(draw_labels(y, rows, 5, num_classes=3, seed=1))


def test_more_labels_help_and_draws_differ():
    train, test = blobs(2000, noise=2.0), blobs(500, noise=2.0, seed=1)
    few, many = lowshot_probe(*train, *test, num_classes=4, shots=(1, 50))
    assert many.top1 > few.top1 + 0.1
    assert (few.labels, few.num_labels, many.num_labels) == ("1 per class", 4, 200)
    assert len(set(few.per_seed)) > 1
    assert few.top1 == pytest.approx(np.mean(few.per_seed))
    assert few.top1_std == pytest.approx(np.std(few.per_seed, ddof=1))


def test_a_class_with_too_few_images_is_refused_by_name():
    x, y = blobs(50)
    with pytest.raises(InputError, match=r"^--lowshot_labels=50: class 0 has only"):
        lowshot_probe(x, y, x, y, num_classes=4, shots=(50,))


def test_a_penalty_at_an_end_of_the_grid_is_noted():
    train, test = blobs(500, noise=2.0), blobs(100, noise=2.0, seed=1)
    inside, ends = (
        lowshot_probe(*train, *test, num_classes=4, shots=(50,), alphas=alphas)[0]
        for alphas in ((1e-2, 1.0, 10.0, 100.0, 1e5), (1e5, 1e6, 1e7))
    )
    assert inside.at_edge == ()
    assert ends.chosen_alpha == 1e6, "equal scores must choose a penalty inside the grid"
    assert ends.at_edge == ()
    wide = blobs(500, noise=2.0, d=120), blobs(100, noise=2.0, d=120, seed=1)
    (weak,) = lowshot_probe(
        *wide[0], *wide[1], num_classes=4, shots=(30,), alphas=(1e-3, 1e-2, 1e3)
    )
    assert weak.at_edge == ("alpha 1000 is the largest tried, a better one may lie beyond",)
