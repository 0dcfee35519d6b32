"""A fit recovers the power law of a run's curve, with a range for its predictions."""

import json

import numpy as np
import pytest

from experiments import fitted_curve
from hjepa_jax.config import base_config
from hjepa_jax.errors import InputError
from hjepa_jax.runs.scores import write_probe_json


def write_run(workdir, lines):
    """Writes the config and log of a run with ten steps per epoch."""
    config = base_config()
    config.data.source, config.train.batch_size = "shapes", 500  # shapes has 5,000 images
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_fit_recovers_a_power_law():
    epochs = np.arange(1.0, 11.0)
    top1 = 80.0 - 45.0 * epochs**-0.4
    a, b, c = fitted_curve.fit(epochs, top1)
    assert (a, b, c) == pytest.approx((80.0, 45.0, 0.4), rel=0.02)
    middle, low, high = fitted_curve.predictions(epochs, top1, 100.0)
    assert middle == pytest.approx(80.0 - 45.0 * 100.0**-0.4, abs=0.2)
    assert low <= middle <= high < low + 0.5


def test_the_range_comes_from_leaving_out_one_score():
    epochs = np.arange(1.0, 7.0)
    top1 = 60.0 - 25.0 * epochs**-0.5
    top1[-1] += 3.0
    middle, low, high = fitted_curve.predictions(epochs, top1, 100.0)
    assert low == pytest.approx(60.0 - 25.0 * 100.0**-0.5, abs=0.2), "fit without the last"
    assert low + 3.0 < middle <= high


def test_a_falling_curve_predicts_no_fall():
    a, b, _ = fitted_curve.fit(np.arange(1.0, 6.0), np.array([50.0, 49.0, 48.0, 47.0, 46.0]))
    assert (a, b) == pytest.approx((48.0, 0.0))


def test_a_fit_until_an_epoch_ignores_later_scores(tmp_path, capsys):
    top1 = [0.6 - 0.25 * epoch**-0.5 for epoch in range(1, 6)] + [0.1, 0.1]
    lines = [{"step": 10 * (i + 1), "eval/knn_top1": score} for i, score in enumerate(top1)]
    write_run(tmp_path, lines)
    fitted_curve.main([str(tmp_path), "100", "--until=5"])
    last = capsys.readouterr().out.splitlines()[-1]
    predicted = float(last.split(": ")[1].split()[0])
    assert predicted == pytest.approx(60.0 - 25.0 * 100.0**-0.5, abs=0.2)
    with pytest.raises(SystemExit, match="2"):
        fitted_curve.main([str(tmp_path), "100", "--until=3"])
    assert "has 3 scores of eval/knn_top1 up to epoch 3; a fit needs 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "epoch", "words"),
    [
        (False, "100", "holds no run"),
        (True, "0", "epoch=0: must be above 0"),
        (True, "nan", "epoch=nan: must be above 0"),
    ],
)
def test_runs_without_a_curve_are_refused_in_one_line(tmp_path, capsys, run, epoch, words):
    if run:
        write_run(tmp_path, [{"step": i, "eval/knn_top1": 0.1 * i} for i in range(1, 6)])
    with pytest.raises(SystemExit, match="2"):
        fitted_curve.main([str(tmp_path), epoch])
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_missing_images_are_counted_from_the_probe_table(tmp_path, capsys):
    write_run(tmp_path, [{"step": 10, "eval/knn_top1": 0.3}])
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["source"] = "npz:gone.npz"
    (tmp_path / "config.json").write_text(json.dumps(config))
    row = {
        "protocol": "knn", "encoder": "target", "step": 1, "pool": "mean", "level": 0, "dim": 8,
        "data": "shapes", "top1": 0.5, "chosen": {"val_top1": 0.5}, "train_size": 1000,
    }  # fmt: skip
    with pytest.raises(InputError, match="there is no such file"):
        fitted_curve.scores(tmp_path, "eval/knn_top1")
    write_probe_json(tmp_path / "probe.json", [row])
    epochs, _ = fitted_curve.scores(tmp_path, "eval/knn_top1")
    np.testing.assert_allclose(epochs, [5.0], err_msg="an epoch of 1,000 images has two steps")
    assert "1,000 images of shapes" in capsys.readouterr().out
    write_probe_json(tmp_path / "probe.json", [row | {"data": "other", "train_size": 5}])
    with pytest.raises(InputError, match="there is no such file"):
        fitted_curve.scores(tmp_path, "eval/knn_top1")


def test_epochs_and_scores_come_from_the_log(tmp_path):
    lines = [{"step": 10, "eval/knn_top1": 0.3}, {"step": 15, "train/loss": 1.0}]
    lines += [{"step": 20, "eval/knn_top1": 0.4}, {"step": 40, "train/loss": 0.9}]
    write_run(tmp_path, lines)
    epochs, top1 = fitted_curve.scores(tmp_path, "eval/knn_top1")
    np.testing.assert_allclose(epochs, [1.0, 2.0])
    np.testing.assert_allclose(top1, [30.0, 40.0])
