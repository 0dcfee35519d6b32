"""The same run on one device, on eight in three layouts, and in two processes of four."""

import numpy as np
import pytest

from hjepa_jax.logging import read_metrics
from tests import processes
from tests.test_cluster import several

# name: processes, devices of each, fsdp
LAYOUTS = {
    "data 8": (1, 8, 1),
    "data 4 x fsdp 2": (1, 8, 2),
    "fsdp 8": (1, 8, 8),
    "2 processes x 4 devices, fsdp 2": (2, 4, 2),
}
# Sums over a batch are taken in another order, each term rounded to 6e-8 of itself. Adam divides
# gradients by their size and so repeats such differences at full scale in parameters whose gradient
# is all rounding; over 50 steps the loss moved by 2e-7 of itself in any layout. Another mask or
# another crop moves it by 1e-3 and more.
LOSS_TOLERANCE = 5e-6
# Of the other metrics, norms and cosines are the furthest, by 4e-6.
METRIC_TOLERANCE = 1e-4


@several
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_curve_of_fifty_steps_is_that_of_one_device(tiny_config, tmp_path, layout):
    c = tiny_config
    c.model.width, c.model.depth = 32, 2  # so that some arrays are large enough to be cut
    c.train.num_steps, c.log.every_steps = 50, 1
    c.train.checkpoint_every_steps = 50
    c.optim.warmup_epochs = 0.5
    curves = []
    for name, (num, devices, fsdp) in {"one": (1, 1, 1), layout: LAYOUTS[layout]}.items():
        c.parallel.cpu_devices, c.parallel.fsdp = devices, fsdp
        workdir = tmp_path / name
        assert processes.finish(c, workdir, num=num) == 0, processes.printed(workdir)
        curves.append(read_metrics(workdir / "metrics.jsonl"))
        for other in range(1, num):
            assert "error" not in processes.printed(workdir, other)
            assert "epoch" not in processes.printed(workdir, other)
    one, many = curves
    assert [line["step"] for line in many] == list(range(1, 51))
    losses = [[line["train/loss"] for line in lines] for lines in curves]
    np.testing.assert_allclose(losses[1], losses[0], rtol=LOSS_TOLERANCE)
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for metric, value in a.items():
            if not metric.startswith("perf/"):
                np.testing.assert_allclose(b[metric], value, rtol=METRIC_TOLERANCE, err_msg=metric)
