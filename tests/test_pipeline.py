import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_jax.data.order import BatchOrder


def test_an_epoch_shows_every_image_once():
    order = BatchOrder(20, 5, seed=0)
    assert sorted(order.batches(0, 4, size=4).reshape(-1)) == list(range(20))
    assert sorted(order.batches(4, 4, size=4).reshape(-1)) == list(range(20))


def test_epochs_and_seeds_differ():
    order = BatchOrder(20, 20, seed=0)
    first, second = order.batches(0, 2, size=2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != BatchOrder(20, 20, seed=1).batches(0, 1, size=1)[0].tolist()


@settings(deadline=None, max_examples=50)
@given(
    num_images=st.integers(2, 50),
    batch_size=st.integers(1, 50),
    start=st.integers(0, 60),
    split=st.integers(0, 8),
)
def test_batches_do_not_depend_on_the_first_step(num_images, batch_size, start, split):
    """A resumed run gets the same batches as an uninterrupted run."""
    batch_size = min(batch_size, num_images)
    whole = BatchOrder(num_images, batch_size, seed=3).batches(start, 8, size=8)
    fresh = BatchOrder(num_images, batch_size, seed=3)
    parts = [
        fresh.batches(start + split, 8 - split, size=8)[: 8 - split],
        fresh.batches(start, split, size=8)[:split],
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts[::-1]))
    assert all(len(set(batch.tolist())) == batch_size for batch in whole)
