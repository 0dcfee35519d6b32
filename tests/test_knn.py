import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.knn import knn_predict, knn_probe


def blobs(n, *, num_classes=4, d=8, noise=1.0, seed=0):
    """Returns features scattered around one centre per class, and the classes."""
    centres = np.random.default_rng(99).normal(size=(num_classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(num_classes, size=n)
    return (centres[y] + noise * rng.normal(size=(n, d))).astype(np.float32), y


def directions(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_votes_match_a_case_worked_by_hand():
    # The query is at 0 degrees. Class 1 is at 10 degrees (similarity 0.985). Class 0 is at 20 and
    # -25 degrees (0.940 and 0.906). At temperature 0.07 the votes for class 0 have
    # e^-0.64 + e^-1.12 = 0.85 times the weight of class 1, and lose. At temperature 1 they have
    # 1.88 times that weight, and win. The length of a vector must not matter.
    bank = directions(10, 20, -25) * np.array([[0.1], [5.0], [9.0]], np.float32)
    classes = np.array([1, 0, 0])
    query = directions(0)
    cold = knn_predict(bank, classes, query, ks=[1, 3], num_classes=2, temperature=0.07)
    warm = knn_predict(bank, classes, query, ks=[1, 3], num_classes=2, temperature=1.0)
    np.testing.assert_array_equal(cold, [[1], [1]])
    np.testing.assert_array_equal(warm, [[1], [0]])


def test_predictions_equal_scikit_learn_for_every_k():
    bank_x, bank_y = blobs(1000)
    query_x, _ = blobs(300, seed=1)
    ks = [20, 1, 5, 200]  # results have the order of `ks`
    predicted = knn_predict(bank_x, bank_y, query_x, ks=ks, num_classes=4, block_size=128)
    assert predicted.dtype == np.int32
    for row, k in zip(predicted, ks, strict=True):
        reference = KNeighborsClassifier(n_neighbors=k, metric="cosine")
        reference.set_params(weights=lambda distance: np.exp((1 - distance) / 0.07))
        reference.fit(bank_x.astype(np.float64), bank_y)
        np.testing.assert_array_equal(row, reference.predict(query_x.astype(np.float64)))


def test_ties_go_to_the_lower_row_and_the_lower_class():
    far = np.random.default_rng(0).integers(2, size=64)
    bank_x, bank_y = directions(0, 90)[far], np.arange(64)[::-1]
    (near,) = np.nonzero(far == 0)
    # Each of the first k equal rows has one vote, for a class of its own. Labels fall along the
    # bank, so the last of these rows has the lowest class and wins.
    for ks in ([1, 5], [1, 5, len(near)]):  # the largest k takes some or all equal rows
        predicted = knn_predict(bank_x, bank_y, directions(0, 30), ks=ks, num_classes=64)
        for row, k in zip(predicted, ks, strict=True):
            assert row.tolist() == [bank_y[near[k - 1]]] * 2


def test_zero_rows_are_tolerated():
    bank_x, bank_y = blobs(20)
    (found,) = knn_predict(bank_x * 0, bank_y, bank_x, ks=[1], num_classes=4)
    assert found.tolist() == [bank_y[0]] * 20


def test_the_test_score_uses_all_rows_at_the_chosen_k():
    train_x, train_y = blobs(1000, noise=2.0)
    test_x, test_y = blobs(400, noise=2.0, seed=1)
    ks = (1, 5, 50)
    result = knn_probe(train_x, train_y, test_x, test_y, num_classes=4, ks=ks, num_val=100)
    assert result.chosen_k == ks[int(np.argmax(result.val_top1))] > 1
    predicted = knn_predict(train_x, train_y, test_x, ks=[result.chosen_k], num_classes=4)[0]
    np.testing.assert_array_equal(result.test_predictions, predicted)
    assert result.top1 == pytest.approx(np.mean(predicted == test_y))


def test_equal_scores_choose_the_smallest_k():
    train_x, train_y = blobs(200, noise=0.01)
    result = knn_probe(train_x, train_y, train_x, train_y, num_classes=4, ks=(10, 1, 5))
    assert result.val_top1 == (1.0, 1.0, 1.0)
    assert result.chosen_k == 1
    assert result.at_edge == ()


def test_the_largest_k_is_noted_if_more_rows_exist():
    """Only many neighbours can tell the two classes of 150 rows apart."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 150)
    x = np.stack([np.ones(300), 0.1 * (2 * y - 1) + rng.normal(size=300)], axis=1)
    options = {"num_classes": 2, "temperature": 1e3}
    few = knn_probe(x, y, x, y, ks=(1, 3, 31), **options)
    assert few.chosen_k == 31
    assert few.at_edge == ("k 31 is the largest tried, a better one may lie beyond",)
    assert knn_probe(x, y, x, y, ks=(1, 3, 31, 33), **options).at_edge != few.at_edge
    assert knn_probe(x, y, x, y, ks=(1, 240), **options).at_edge == ()


@pytest.mark.parametrize("ks", [(), (0, 1), (1, 81)])
def test_impossible_k_is_refused_by_name(ks):
    x, y = blobs(100)  # 80 remain after the hold-out
    with pytest.raises(InputError, match=r"^ks=.*\[1, 80\]"):
        knn_probe(x, y, x, y, num_classes=4, ks=ks)


def spoilt(array, value):
    array = array.copy()
    array.flat[0] = value
    return array


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("train_x", lambda x: spoilt(x, np.nan)),
        ("train_x", lambda x: x[:4]),
        ("train_x", lambda x: x[:0]),
        ("train_y", lambda y: y[:-1]),
        ("train_y", lambda y: spoilt(y, 4)),
        ("test_x", lambda x: spoilt(x, np.inf)),
        ("test_x", lambda x: x[:, :-1]),
        ("test_y", lambda y: spoilt(y, -1)),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(field, spoil):
    x, y = blobs(50)
    arrays = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    arrays[field] = spoil(arrays[field])
    if field == "train_x":
        arrays["train_y"] = y[: len(arrays["train_x"])]
    with pytest.raises(InputError, match=f"^{field}="):
        knn_probe(**arrays, num_classes=4, ks=(1,))
