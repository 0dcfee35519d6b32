import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.fewshot import fewshot_probe
from tests.test_knn import blobs


def test_distant_classes_need_one_example():
    x, y = blobs(400, num_classes=6, noise=0.01)
    result = fewshot_probe(x, x, y, num_shots=1, num_episodes=20)
    assert (result.top1, result.interval, result.num_episodes) == (1.0, 0.0, 20)


def test_pure_noise_is_at_chance_within_its_interval():
    x = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    y = np.arange(500) % 10
    result = fewshot_probe(x, x, y, num_shots=5, num_episodes=300)
    assert 0 < result.interval < 0.02
    assert abs(result.top1 - 0.2) < 3 * result.interval


def test_one_episode_equals_an_independent_computation():
    x, y = blobs(200, num_classes=3, noise=2.0)
    train_x, _ = blobs(100, num_classes=3, noise=2.0, seed=3)
    result = fewshot_probe(
        train_x, x, y, num_shots=2, num_ways=3, num_queries=4, num_episodes=1, seed=7
    )
    rng = np.random.default_rng(7)
    ways = rng.choice(3, size=3, replace=False)
    drawn = [rng.choice(np.flatnonzero(y == c), size=6, replace=False) for c in ways]
    z = x - train_x.mean(axis=0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    prototypes = [z[rows[:2]].mean(axis=0) for rows in drawn]
    hits = [
        np.argmin([np.linalg.norm(z[row] - p) for p in prototypes]) == way
        for way, rows in enumerate(drawn)
        for row in rows[2:]
    ]
    assert result.top1 == pytest.approx(np.mean(hits))
    assert result.interval == 0.0


def test_more_examples_help():
    x, y = blobs(600, num_classes=6, noise=1.5)
    one, five = (fewshot_probe(x, x, y, num_shots=n, num_episodes=200).top1 for n in (1, 5))
    assert five > one + 0.05


def test_a_shift_shared_by_all_images_changes_nothing():
    x, y = blobs(300, num_classes=5)
    plain, shifted = (
        fewshot_probe(z, z, y, num_shots=1, num_episodes=50).top1 for z in (x, x + 30.0)
    )
    assert plain == pytest.approx(shifted, abs=5e-3)


def test_too_few_images_of_a_class_are_refused_by_name():
    x, y = blobs(20, num_classes=4)
    with pytest.raises(InputError, match=r"^--fewshot_shots=20"):
        fewshot_probe(x, x, y, num_shots=20)
    with pytest.raises(InputError, match="at least two classes"):
        fewshot_probe(x, x, y * 0, num_shots=1)
