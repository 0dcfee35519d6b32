"""The box that `make demo` prints at its end."""

import json

from hjepa_jax import main
from hjepa_jax.configs import shapes_tiny
from hjepa_jax.runs.scores import write_probe_json


def test_the_box_at_the_end_fits_a_terminal_of_80_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "runs" / "shapes_tiny"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(shapes_tiny.get_config().to_dict()))
    (workdir / "report.html").touch()
    where = {"step": 1, "pool": "concat", "level": "all", "dim": 8, "data": "shapes"}
    rows = [
        {
            "protocol": protocol,
            "encoder": encoder,
            "top1": 1.0,
            "chosen": {"val_top1": 1.0},
            **where,
        }
        for protocol in ("linear", "knn")
        for encoder in ("target", "random_init", "pixels")
    ]
    write_probe_json(workdir / "probe.json", rows)
    box = main.summary(workdir.relative_to(tmp_path))
    assert "best k-NN    trained 100.0 %, random-init 100.0 %, raw pixels 100.0 %" in box
    assert max(map(len, box.splitlines())) <= 80
