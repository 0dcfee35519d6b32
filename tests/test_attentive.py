import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.attentive import attentive_probe
from hjepa_jax.evaluation.linear import linear_probe

OPTIONS = {"num_classes": 4, "num_epochs": 12, "batch_size": 50, "learning_rates": (1e-2, 3e-2)}


def needles(n, *, num_tokens=16, d=8, seed=0):
    """Returns tokens and classes; one marked token at a random place carries the class.

    The other tokens carry random classes, so that the mean holds little information.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    tokens = rng.normal(0, 0.3, (n, num_tokens, d))
    said = rng.integers(4, size=(n, num_tokens))
    place = rng.integers(num_tokens, size=n)
    said[np.arange(n), place] = y
    tokens[np.arange(n)[:, None], np.arange(num_tokens), said] += 1.5
    tokens[np.arange(n), place, 5] += 3.0
    return tokens.astype(np.float16), y


def test_finds_the_token_that_the_mean_hides():
    (x, y), (test_x, test_y) = needles(1500), needles(400, seed=1)
    attentive = attentive_probe(x, y, test_x, test_y, **OPTIONS)
    means = (t.astype(np.float32).mean(axis=1) for t in (x, test_x))
    linear = linear_probe(next(means), y, next(means), test_y, num_classes=4)
    assert attentive.top1 > 0.9
    assert linear.top1 < 0.6
    assert attentive.top1 == pytest.approx(np.mean(attentive.test_predictions == test_y))


def test_the_choice_does_not_depend_on_test_labels():
    (x, y), (test_x, test_y) = needles(300), needles(100, seed=1)
    noise = np.random.default_rng(5).permutation(test_y)
    options = OPTIONS | {"learning_rates": (1e-6, 1e-2), "weight_decays": (1e-3,)}
    true, false = (attentive_probe(x, y, test_x, labels, **options) for labels in (test_y, noise))
    assert true.chosen_learning_rate == 1e-2
    assert true.val_top1 == false.val_top1
    assert len(true.val_top1) == 2
    assert true.at_edge == ("learning rate 0.01 is the largest tried, a better one may lie beyond",)
    np.testing.assert_array_equal(true.test_predictions, false.test_predictions)


def test_settings_trained_together_equal_settings_alone():
    (x, y), (test_x, test_y) = needles(200), needles(50, seed=1)
    rates = (1e-5, 3e-2)  # too low to learn much, and high enough
    options = OPTIONS | {"weight_decays": (1e-3,)}
    both = attentive_probe(x, y, test_x, test_y, **(options | {"learning_rates": rates}))
    alone = [
        attentive_probe(x, y, test_x, test_y, **(options | {"learning_rates": (rate,)})).val_top1[0]
        for rate in rates
    ]
    assert both.val_top1 == pytest.approx(alone, abs=0.03)
    assert alone[1] > alone[0] + 0.2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("test_tokens", lambda x: x[:, :, :3]),
        ("train_x", lambda x: x * np.float16(np.nan)),
    ],
)
def test_tokens_that_do_not_fit_are_refused_by_name(name, spoil):
    x, y = needles(50)
    test_x = spoil(x) if name.startswith("test") else x
    train_x = spoil(x) if name.startswith("train") else x
    with pytest.raises(InputError, match=f"^{name}="):
        attentive_probe(train_x, y, test_x, y, num_classes=4)
