"""The same run on one device, on eight in several layouts, and on two processes with four each."""

import numpy as np
import pytest

from hjepa_jax.runs.history import read_metrics
from tests import processes
from tests.test_cluster import several

# name: (processes, devices per process, fsdp, whether the data is streamed). Streamed images are
# read without workers here; test_streaming has shares of a batch with and without them.
ONE = (1, 1, 1, False)
LAYOUTS = {
    "8": (1, 8, 1, False),
    "2 processes x 4, fsdp 2": (2, 4, 2, False),
    "2 processes x 4, fsdp 2, streamed": (2, 4, 2, True),
}
# A layout changes the order of the sums over a batch, and each term has a rounding error of 6e-8 of
# its value. Adam divides gradients by their size. If a gradient is only rounding, Adam enlarges the
# difference to full scale. Over 50 steps, the relative change of the loss was 2e-7 in all layouts.
# Another mask or another crop changes the loss by 1e-3 or more.
LOSS_TOLERANCE = 5e-6
# Among the other metrics, norms and cosines differ most, by 4e-6.
METRIC_TOLERANCE = 1e-4


SHARDED = (1, 8, 8, False)  # each large array is spread over all devices

# All options that draw random numbers, mix images or add parameters.
OPTIONS = {
    "model.positions": "rope2d", "model.num_registers": 2, "model.layer_scale": 0.5,
    "model.drop_path": 0.2, "model.predictor_mode": "cross", "data.local_views": 2,
    "data.local_size": 8, "data.local_patches": 3,
    # Scaling the hidden features of a few images to 1 enlarges rounding, so the weight is small.
    "loss.agreement_weight": 0.1, "loss.spread_weight": 0.01, "model.projection": (16, 8),
    "model.pyramid": "concat", "loss.regularizer": "sigreg",
    "optim.accumulation_steps": 2,
}  # fmt: skip


def curve(c, workdir, layout):
    """Runs in a layout and returns the log."""
    num, c.parallel.cpu_devices, c.parallel.fsdp, streamed = layout
    c.data.streaming = "always" if streamed else "never"
    assert processes.finish(c, workdir, num=num) == 0, processes.printed(workdir)
    for other in range(1, num):
        assert "error" not in processes.printed(workdir, other)
        assert "epoch" not in processes.printed(workdir, other)
    return read_metrics(workdir / "metrics.jsonl")


@several
@pytest.mark.slow
def test_with_every_option_the_loss_curve_is_that_of_one_device_too(tiny_config, tmp_path):
    c = tiny_config
    c.update_from_flattened_dict({"model.width": 32, "model.depth": 2, **OPTIONS})
    c.train.num_steps, c.log.every_steps, c.train.checkpoint_every_steps = 16, 1, 16
    logs = [curve(c, tmp_path / str(layout[1]), layout) for layout in (ONE, SHARDED)]
    losses = [[line["train/loss"] for line in log] for log in logs]
    assert len(losses[0]) == 16
    np.testing.assert_allclose(*losses, rtol=LOSS_TOLERANCE)


@several
@pytest.mark.slow
def test_the_loss_curve_is_that_of_one_device_with_resident_data(
    tiny_config, shapes_folder, tmp_path
):
    c = tiny_config
    c.data.source, c.data.image_size, c.data.num_workers = f"folder:{shapes_folder}", 32, 0
    c.model.patch_size = 8
    c.model.width = 32  # so that some arrays are large enough to be sharded
    c.train.num_steps, c.log.every_steps = 12, 1  # an epoch has 10 steps
    c.train.checkpoint_every_steps = 12
    c.optim.warmup_epochs = 0.5
    one = curve(c, tmp_path / "one", ONE)
    for name, layout in LAYOUTS.items():
        many = curve(c, tmp_path / name, layout)
        assert [line["step"] for line in many] == list(range(1, 13))
        losses = [[line["train/loss"] for line in log] for log in (one, many)]
        np.testing.assert_allclose(*losses, rtol=LOSS_TOLERANCE, err_msg=name)
        for a, b in zip(one, many, strict=True):
            assert a.keys() == b.keys()
            for metric in (metric for metric in a if not metric.startswith("perf/")):
                words = f"{metric}, {name}"
                np.testing.assert_allclose(b[metric], a[metric], METRIC_TOLERANCE, err_msg=words)
