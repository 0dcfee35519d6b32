import functools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation import linear, logistic

NUM_CLASSES = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Limits BLAS to one thread; with small matrices, more would only compete with XLA."""
    with threadpool_limits(1, user_api="blas"):
        yield


def correlated(n, *, d=20, seed=0):
    """Returns correlated features of unequal scale, and noisy classes that are linear in them."""
    shared = np.random.default_rng(99)
    mixing = shared.normal(size=(d, d)) * np.geomspace(1, 0.1, d)[:, None]
    direction = shared.normal(size=(d, NUM_CLASSES))
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, d))
    y = (latent @ direction + 2 * rng.gumbel(size=(n, NUM_CLASSES))).argmax(axis=1)
    return (latent @ mixing * np.geomspace(1e-2, 1e2, d) + 3).astype(np.float32), y


def objective(x, y, kernel, bias, l2):
    logits = x @ kernel + bias
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return np.mean(log_sum - logits[np.arange(len(y)), y]) + l2 / 2 * np.sum(kernel**2)


@pytest.mark.parametrize("l2", [1e-8, 1e-3, 1.0])
def test_fit_reaches_the_minimum_of_scikit_learn(l2):
    x, y = correlated(1500)
    std = x.std(axis=0, dtype=np.float64)
    z = (x - x.mean(axis=0, dtype=np.float64)) / std
    model = logistic.fit(x, y, num_classes=NUM_CLASSES, l2=l2, num_iterations=200)
    assert model.converged
    reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=5000).fit(z, y)
    best = objective(z, y, reference.coef_.T, reference.intercept_, l2)
    assert objective(z, y, model.kernel * std[:, None], model.bias, l2) - best < 1e-6


def test_a_fit_that_is_stopped_early_reports_it():
    x, y = correlated(1500)
    fit = functools.partial(logistic.fit, x, y, num_classes=NUM_CLASSES, num_iterations=8)
    assert [fit(l2=l2).converged for l2 in (1e-4, 10.0)] == [False, True]
    result = linear.linear_probe(x, y, x, y, num_classes=NUM_CLASSES, num_iterations=3)
    assert result.converged is False


def test_probe_is_as_good_as_scikit_learn_at_its_best():
    train_x, train_y = correlated(5000)
    test_x, test_y = correlated(4000, seed=1)
    result = linear.linear_probe(train_x, train_y, test_x, test_y, num_classes=NUM_CLASSES)
    scaler = StandardScaler().fit(train_x)
    best = max(
        LogisticRegression(C=c, max_iter=2000)
        .fit(scaler.transform(train_x), train_y)
        .score(scaler.transform(test_x), test_y)
        for c in np.geomspace(1e-4, 1e2, 7)
    )
    assert result.top1 > best - 0.005
    assert result.top1 == pytest.approx(np.mean(result.test_predictions == test_y))


def test_weak_features_choose_a_penalty_inside_the_grid():
    # 200 of 220 columns are noise and there are few rows, so both ends of the grid score lower.
    x, y = correlated(400)
    noise = np.random.default_rng(3).normal(size=(400, 200)).astype(np.float32)
    l2, scores, at_edge = linear.choose_l2(np.hstack([x, noise]), y, num_classes=NUM_CLASSES)
    assert tuple(scores) == tuple(reversed(linear.DEFAULT_L2_GRID))
    assert l2 == max(l2 for l2, score in scores.items() if score == max(scores.values()))
    assert min(scores) < l2 < max(scores)
    assert at_edge == ()


def scores_by_penalty(monkeypatch, score):
    """Replaces the fits, so that each penalty has the held-out score `score(l2)`."""
    monkeypatch.setattr(logistic.Problem, "minimize", lambda self, l2, start: (np.array(l2), True))
    monkeypatch.setattr(logistic.Problem, "model", lambda self, weights: weights)
    right = lambda l2, x: np.arange(len(x)) < round(score(l2) * len(x))
    monkeypatch.setattr(linear, "predict", right)


@pytest.mark.parametrize(
    ("peak", "chosen", "at_edge"),
    [
        (1e-3, 1e-3, ()),
        (1e-8, 1e-8, ()),  # beyond the initial grid
        (1e2, 1e2, ()),
        (1e-20, 1e-10, ("l2 1e-10 is the smallest tried, a better one may lie beyond",)),
        (1e20, 1e3, ("l2 1000 is the largest tried, a better one may lie beyond",)),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_the_grid_grows_while_its_end_is_best(monkeypatch, peak, chosen, at_edge, every):
    scores_by_penalty(monkeypatch, lambda l2: 1 - abs(np.log10(l2 / peak)) / 40)
    x, y = correlated(5000)
    grid = linear.DEFAULT_L2_GRID[::every]
    y = np.ones_like(y)
    l2, scores, found = linear.choose_l2(x, y, num_classes=NUM_CLASSES, l2_grid=grid)
    assert l2 == pytest.approx(chosen)
    assert found == at_edge
    assert len(scores) <= len(grid) + 8


def test_equal_scores_choose_the_largest_inner_penalty(monkeypatch):
    scores_by_penalty(monkeypatch, lambda l2: 0.5)
    x, y = correlated(50)
    l2, scores, at_edge = linear.choose_l2(x, np.ones_like(y), num_classes=NUM_CLASSES)
    assert l2 == linear.DEFAULT_L2_GRID[-2]
    assert at_edge == ()
    assert len(scores) == len(linear.DEFAULT_L2_GRID)


def test_constant_features_predict_the_most_frequent_class():
    y = np.repeat([2, 0, 1], [6, 3, 3])
    x = np.full((12, 3), 0.1, np.float32)
    model = logistic.fit(x, y, num_classes=NUM_CLASSES, l2=1e-3)
    assert np.all(logistic.predict(model, x[:4]) == 2)


def test_cholesky_succeeds_despite_rounding_errors():
    """The matrix has a negative eigenvalue. The floor grows until a Cholesky factor exists."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    values = np.array([5.0, 1, 1, 1, 0, -2e-5])
    bound, penalty = basis * values @ basis.T, np.full(6, 1e-6)
    found = logistic._cholesky(bound, penalty)
    np.testing.assert_allclose(found @ found.T, bound, atol=1e-3)


def test_the_size_of_chunks_changes_nothing(monkeypatch):
    x, y = correlated(100)
    whole = logistic.fit(x, y, num_classes=NUM_CLASSES, l2=1e-2)
    expected = logistic.predict(whole, x)
    monkeypatch.setattr(logistic, "_CHUNK_ROWS", 30)
    cut = logistic.fit(x, y, num_classes=NUM_CLASSES, l2=1e-2)
    np.testing.assert_allclose(cut.kernel, whole.kernel, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(logistic.predict(cut, x), expected)


@pytest.mark.parametrize("l2_grid", [(), (0.0, 1.0)])
def test_bad_grid_is_refused_by_name(l2_grid):
    x, y = correlated(50)
    with pytest.raises(InputError, match=r"^l2_grid="):
        linear.linear_probe(x, y, x, y, num_classes=NUM_CLASSES, l2_grid=l2_grid)
