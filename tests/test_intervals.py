"""Intervals of accuracies match published values, a quadratic equation and a simulation."""

import numpy as np
import pytest

from hjepa_jax.evaluation.intervals import difference, wilson


def test_intervals_of_differences_match_published_values():
    """The values are from Newcombe 1998, table II, method 10."""
    for (a, n), (b, m), expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ):
        assert difference(a / n, b / m, n, m) == pytest.approx(expected, abs=1e-4)


def test_wilson_matches_cases_worked_by_hand():
    """If all n are right, z^2 p = n (1 - p): the lower end is p = n / (n + z^2).

    At an accuracy of 1/2 the interval is symmetric.
    """
    assert wilson(1.0, 8) == pytest.approx((8 / (8 + 1.959964**2), 1.0))
    assert wilson(0.0, 8) == pytest.approx((0.0, 1 - 8 / (8 + 1.959964**2)))
    low, high = wilson(0.5, 100)
    assert low + high == pytest.approx(1.0)
    for share, n in ((0.3, 10), (0.95, 40), (0.613, 2000)):
        # Both ends solve the quadratic equation (p - share)^2 = z^2 p (1 - p) / n.
        z2 = 1.959964**2
        roots = np.roots([1 + z2 / n, -(2 * share + z2 / n), share**2]).real
        assert wilson(share, n) == pytest.approx((min(roots), max(roots)))


def test_equal_encoders_rarely_differ_beyond_the_interval():
    """On one test set, both are right on 30 % of images and wrong on 30 %; the rest is chance."""
    rng, beyond = np.random.default_rng(0), 0
    for _ in range(2000):
        kind = rng.random(50)
        a, b = (np.where(kind < 0.4, rng.random(50) < 0.5, kind < 0.7).mean() for _ in range(2))
        beyond += difference(a, b, 50, 50)[0] > 0
    assert beyond / 2000 < 0.025
