import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hjepa_jax.data import shapes
from hjepa_jax.data.augment import LUMA
from hjepa_jax.data.shapes import CLASS_NAMES, create_shapes
from hjepa_jax.evaluation.knn import knn_predict


@pytest.fixture(scope="module")
def splits():
    return create_shapes(num_train=4000, num_test=1000, seed=0)  # the full training set has 5,000


def as_rows(images):
    return images.reshape(len(images), -1).astype(np.float32) / 255


def test_ten_classes_and_the_counts_that_were_asked_for(splits):
    train, test = splits
    assert train.images.shape == (4000, 32, 32, 3)
    assert test.images.shape == (1000, 32, 32, 3)
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10


def test_class_counts_differ_by_at_most_one():
    train, test = create_shapes(num_train=23, num_test=1)
    counts = np.bincount(train.labels, minlength=10)
    assert counts.sum() == len(train.images) == 23
    assert counts.max() - counts.min() == 1
    assert test.images.shape == (1, 32, 32, 3)


def test_labels_come_in_random_order(splits):
    followed_by_next_class = np.diff(splits[0].labels) % 10 == 1
    assert 0.05 < followed_by_next_class.mean() < 0.15


def test_same_seed_same_bytes_other_seed_or_split_other_images():
    (first, test), (again, _), (other, _) = (create_shapes(30, 30, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.images != other.images).mean() > 0.9
    assert (first.images != test.images).mean() > 0.9


def test_global_statistics_do_not_tell_the_class(splits):
    def statistics(images):
        pixels = images.astype(np.float32) / 255
        luma = (pixels @ np.array(LUMA, np.float32)).std((1, 2))
        return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2)), luma[:, None]], axis=1)

    train, test = splits
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    probe.fit(statistics(train.images), train.labels)
    assert probe.score(statistics(test.images), test.labels) < 0.15  # chance 0.10, std 0.01


def test_a_line_through_the_raw_pixels_does_not_solve_the_set(splits):
    train, test = splits
    linear = RidgeClassifier(alpha=1e3).fit(as_rows(train.images), train.labels)
    assert linear.score(as_rows(test.images), test.labels) < 0.25  # 0.15 with 5,000 images


def test_the_nearest_raw_pixels_do_not_solve_the_set(splits):
    train, test = splits
    bank, queries = as_rows(train.images), as_rows(test.images)
    found = knn_predict(bank, train.labels, queries, ks=[1, 20], num_classes=10)
    assert (np.asarray(found) == test.labels).mean(axis=1).max() < 0.5  # 0.40 with 5,000 images


def test_area_and_centroid_have_one_distribution_for_all_classes():
    labels = np.arange(5000, dtype=np.int32) % 10
    cover = shapes._shape_cover(labels, (0.0, 0.0), np.random.default_rng(0))
    areas, (low, high) = cover.sum(axis=(1, 2)), shapes.AREA
    x = (cover * (np.arange(32) - 15.5)).sum(axis=(1, 2)) / areas
    for label in range(10):
        area, centre = areas[labels == label], x[labels == label]
        assert area.min() > 0.85 * low
        assert area.max() < 1.1 * high
        # The mean of 500 uniform draws has standard deviation 1.0.
        assert abs(area.mean() - (low + high) / 2) < 5
        # Draws on +-5.5 have standard deviation 3.18, the mean of 500 draws 0.14.
        assert abs(centre.mean()) < 0.6
        assert 2.9 < centre.std() < 3.5


def test_every_outline_differs_from_every_other():
    axis = np.linspace(-1.5, 1.5, 61)
    x, y = np.meshgrid(axis, axis)
    inside = [(outline(x, y) < 0) for outline in shapes.OUTLINES.values()]
    for i, one in enumerate(inside):
        assert 0.05 < one.mean() < 0.5
        for other in inside[:i]:
            assert (one != other).mean() > 0.02


def test_polygon_distance_is_exact_on_a_square():
    distance = shapes._polygon((0.0, 0.0), (2.0, 0.0), (2.0, 2.0), (0.0, 2.0))
    x, y = np.array([1.0, 3.0, 5.0, 0.5]), np.array([1.0, 1.0, 6.0, 1.0])
    np.testing.assert_allclose(distance(x, y), [-1, 1, 5, -0.5], atol=1e-6)


def test_shapes_are_light_on_dark_as_often_as_dark_on_light():
    rng = np.random.default_rng(0)
    light = rng.random((5000, 1, 1, 1)) < shapes.LIGHT_BACKGROUNDS
    assert 0.47 < light.mean() < 0.53  # standard deviation 0.007
    colour = shapes._either(light, rng)
    np.testing.assert_array_equal(colour.min(axis=-1) >= shapes.LIGHT, light[..., 0])
    np.testing.assert_array_equal(colour.max(axis=-1) <= shapes.DARK, ~light[..., 0])


def test_an_image_shows_its_shape_in_each_quarter():
    rng, axis = np.random.default_rng(0), np.arange(32) - 15.5
    for x, y in shapes.CENTRES:
        cover = shapes._shape_cover(np.zeros(200, np.int32), (x, y), rng)
        for centre, weights in ((x, axis), (y, axis[:, None])):
            found = (cover * weights).sum(axis=(1, 2)) / cover.sum(axis=(1, 2))
            assert np.abs(found - centre).max() < shapes.MAX_OFFSET + 1


def test_a_thousand_images_take_less_than_two_seconds_of_processor_time():
    def seconds():
        start = time.process_time()
        create_shapes(1000, 1)
        return time.process_time() - start

    # Up to three tries, because other work on the same core makes the processor slower.
    assert any(seconds() < 2 for _ in range(3))
