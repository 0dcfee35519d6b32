import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation import linear

NUM_CLASSES = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of BLAS for such small matrices fight with those of XLA."""
    with threadpool_limits(1, user_api="blas"):
        yield


def correlated(n, *, d=20, seed=0):
    """Returns correlated features of very unequal scale, and noisy classes linear in them."""
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


def test_fit_matches_a_case_worked_by_hand():
    # x = -1, +1 with classes 0, 1. By symmetry the bias is 0 and the kernel (-w, w), and the loss
    # is log(1 + exp(-2 w)) + l2 w^2: zero slope where sigmoid(-2 w) = l2 w. At w = log(3) / 2 the
    # left side is 1/4, so l2 = 1 / (2 log 3) gives that w.
    model = linear.fit(
        np.array([[-1.0], [1.0]], np.float32),
        np.array([0, 1]),
        num_classes=2,
        l2s=[1 / (2 * np.log(3))],
    )
    np.testing.assert_allclose(model.kernel[:, :, 0], [[-np.log(3) / 2, np.log(3) / 2]], atol=1e-4)
    np.testing.assert_allclose(model.bias, 0, atol=1e-5)


@pytest.mark.parametrize("weak", [1e-4, 1e-8])
def test_fit_reaches_the_minimum_that_scikit_learn_finds(weak):
    """Within 100 iterations each; at 1e-8 the first-order method of before needed thousands."""
    x, y = correlated(1500)
    l2s = [weak, 1e-2, 1.0]
    std = x.std(axis=0, dtype=np.float64)
    z = (x - x.mean(axis=0, dtype=np.float64)) / std
    model = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=l2s, num_iterations=100)
    assert model.converged == (True, True, True)
    for g, l2 in enumerate(l2s):
        reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=5000).fit(z, y)
        best = objective(z, y, reference.coef_.T, reference.intercept_, l2)
        kernel = model.kernel[:, :, g] * std[:, None]
        assert objective(z, y, kernel, model.bias[:, g], l2) - best < 1e-6


def test_a_fit_that_is_stopped_early_says_so():
    x, y = correlated(1500)
    model = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=[1e-4, 10.0], num_iterations=8)
    assert model.converged == (False, True)
    result = linear.linear_probe(x, y, x, y, num_classes=NUM_CLASSES, num_iterations=3)
    assert result.converged is False


def test_fitting_penalties_together_equals_fitting_each_alone():
    x, y = correlated(300)
    together = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=[1e-3, 1e-1])
    alone = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=[1e-1])
    np.testing.assert_allclose(
        (x - together.mean) @ together.kernel[:, :, 1] + together.bias[:, 1],
        (x - alone.mean) @ alone.kernel[:, :, 0] + alone.bias[:, 0],
        atol=2e-2,
    )


def test_probe_is_within_half_a_point_of_scikit_learn_at_its_best():
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
    # 200 of 220 columns are noise and the rows are few: both ends of the grid must lose.
    x, y = correlated(400)
    noise = np.random.default_rng(3).normal(size=(400, 200)).astype(np.float32)
    chosen = linear.select(np.hstack([x, noise]), y, num_classes=NUM_CLASSES)
    assert chosen.grid == tuple(reversed(linear.DEFAULT_L2_GRID))
    best = [
        l2 for l2, v in zip(chosen.grid, chosen.val_top1, strict=True) if v == max(chosen.val_top1)
    ]
    assert chosen.l2 == max(best)
    assert chosen.grid[-1] < chosen.l2 < chosen.grid[0]
    assert chosen.at_edge == ()


def scores_by_penalty(monkeypatch, score):
    """Replaces fits by a rule: the held-out score of each penalty."""
    monkeypatch.setattr(linear._Problem, "minimize", lambda self, l2, start: (np.array(l2), True))
    monkeypatch.setattr(linear._Problem, "model", lambda self, weights, converged: weights[0])
    monkeypatch.setattr(
        linear, "predict", lambda l2, x: np.arange(len(x))[None] < round(score(l2) * len(x))
    )


@pytest.mark.parametrize(
    ("peak", "chosen", "at_edge"),
    [
        (1e-3, 1e-3, ()),
        (1e-8, 1e-8, ()),  # beyond the grid it begins with
        (1e2, 1e2, ()),
        (1e-20, 1e-10, ("l2 1e-10 is the smallest tried, a better one may lie beyond",)),
        (1e20, 1e3, ("l2 1000 is the largest tried, a better one may lie beyond",)),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_the_grid_grows_while_an_end_of_it_is_best(monkeypatch, peak, chosen, at_edge, every):
    scores_by_penalty(monkeypatch, lambda l2: 1 - abs(np.log10(l2 / peak)) / 40)
    x, y = correlated(5000)
    grid = linear.DEFAULT_L2_GRID[::every]
    found = linear.select(x, np.ones_like(y), num_classes=NUM_CLASSES, l2_grid=grid)
    assert found.l2 == pytest.approx(chosen)
    assert found.at_edge == at_edge
    assert len(found.grid) <= len(grid) + 8


def test_equal_scores_choose_the_largest_penalty_but_no_end(monkeypatch):
    scores_by_penalty(monkeypatch, lambda l2: 0.5)
    x, y = correlated(50)
    found = linear.select(x, np.ones_like(y), num_classes=NUM_CLASSES)
    assert found.l2 == linear.DEFAULT_L2_GRID[-2]
    assert found.at_edge == ()
    assert len(found.grid) == len(linear.DEFAULT_L2_GRID)


def test_test_labels_do_not_influence_a_choice():
    train_x, train_y = correlated(400)
    test_x, test_y = correlated(200, seed=1)
    noise = np.random.default_rng(5).integers(NUM_CLASSES, size=200)
    true, false = (
        linear.linear_probe(train_x, train_y, test_x, labels, num_classes=NUM_CLASSES)
        for labels in (test_y, noise)
    )
    assert (true.chosen_l2, true.val_top1) == (false.chosen_l2, false.val_top1)
    np.testing.assert_array_equal(true.test_predictions, false.test_predictions)
    assert true.top1 > false.top1


def test_constant_features_predict_the_most_frequent_class():
    y = np.repeat([2, 0, 1], [6, 3, 3])
    model = linear.fit(np.full((12, 3), 0.1, np.float32), y, num_classes=NUM_CLASSES, l2s=[1e-3])
    assert np.all(linear.predict(model, np.full((4, 3), 0.1, np.float32)) == 2)


def test_more_rows_than_one_chunk_change_nothing(monkeypatch):
    x, y = correlated(100)
    whole = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=[1e-2])
    expected = linear.predict(whole, x)
    monkeypatch.setattr(linear, "_CHUNK_ROWS", 30)
    cut = linear.fit(x, y, num_classes=NUM_CLASSES, l2s=[1e-2])
    np.testing.assert_allclose(cut.kernel, whole.kernel, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(linear.predict(cut, x), expected)


@pytest.mark.parametrize("l2_grid", [(), (0.0, 1.0)])
def test_bad_grid_is_refused_by_name(l2_grid):
    x, y = correlated(50)
    with pytest.raises(InputError, match=r"^l2_grid="):
        linear.linear_probe(x, y, x, y, num_classes=NUM_CLASSES, l2_grid=l2_grid)


def test_arrays_that_do_not_fit_are_refused_by_name():
    x, y = correlated(50)
    for bad in ({"train_x": x * np.nan}, {"test_x": x[:, :3]}, {"train_y": y[:3]}):
        arrays = {"train_x": x, "train_y": y, "test_x": x, "test_y": y} | bad
        with pytest.raises(InputError, match=f"^{next(iter(bad))}="):
            linear.linear_probe(**arrays, num_classes=NUM_CLASSES)
