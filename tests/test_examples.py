"""The examples in docstrings and in the notebook run as written."""

import doctest
import importlib
import json
import pathlib

import pytest

from tests.processes import run_at_full_speed

WITH_EXAMPLES = (
    "hjepa_jax.evaluation.knn",
    "hjepa_jax.evaluation.linear",
    "hjepa_jax.masks.samplers",
    "hjepa_jax.reporting.figures",
)
NOTEBOOK = pathlib.Path(__file__).parent.parent / "examples" / "first_steps.ipynb"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_give_what_they_say(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


@pytest.mark.slow
def test_the_notebook_runs_as_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code.append("assert knn.top1 > 0.35, 'after 200 steps; an untrained encoder has 0.25'")
    done = run_at_full_speed("-c", "\n".join(code), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "k-NN after 200 steps" in done.stdout
