import json

import numpy as np

from hjepa_jax.runs import history
from hjepa_jax.runs.history import read_history


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_short_file_is_read_completely(tmp_path):
    lines = [{"step": s, "train/loss": 1.0 / s, "perf/steps_per_sec": 2.0} for s in (5, 10, 20)]
    found = read_history(write(tmp_path / "m", lines))
    assert list(found.lines) == lines
    assert not found.sampled
    np.testing.assert_array_equal(found.series("train/loss")[0], [5, 10, 20])
    assert (found.first("train/loss"), found.last("train/loss")) == (0.2, 0.05)
    assert found.last_step() == 20
    assert found.training_seconds() == 10.0
    assert found.names("train/") == ["train/loss"]


def test_a_long_file_is_sampled_with_its_ends_and_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MAX_LINES", 50)
    lines = [{"step": s, "train/loss": 1.0} for s in range(1, 5001)]
    lines[1233]["eval/knn_top1"] = 0.5
    found = read_history(write(tmp_path / "m", lines))
    assert found.sampled
    assert found.num_lines == 5000
    steps, _ = found.series("train/loss")
    assert len(steps) <= 52
    assert (steps[0], steps[-1]) == (1, 5000)
    assert np.diff(steps).max() <= 5000 / 25
    assert found.series("eval/knn_top1")[0].tolist() == [1234]


def test_damaged_lines_are_counted_but_an_incomplete_last_one_is_not(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(
        b'{"step": 1, "a": 1}\nnoise\n[1]\n{"step": "x"}\n{"step": 2, "a": NaN, "b": "text"}\n{"st'
    )
    found = read_history(path)
    assert found.num_damaged == 3
    assert found.lines == ({"step": 1, "a": 1}, {"step": 2})
    assert found.num_lines == 5


def test_no_file_and_an_empty_file_give_an_empty_history(tmp_path):
    (tmp_path / "m").touch()
    for path in (tmp_path / "m", tmp_path / "nowhere"):
        found = read_history(path)
        assert (found.lines, found.num_lines, found.last_step()) == ((), 0, 0)
        assert found.last("train/loss") is None
