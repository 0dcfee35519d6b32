"""The README's numbers are those of the runs in experiments/."""

import json

from experiments import results_table


def test_the_table_of_the_readme_is_made_of_the_kept_runs():
    readme = results_table.README.read_text()
    assert results_table.with_table(readme) == readme, "run experiments/results_table.py"
    table = results_table.results_table()
    kept = list(results_table.EXPERIMENTS.glob("*/report/probe.json"))
    assert kept
    for path in kept:
        scores = [
            row["top1"]
            for row in json.loads(path.read_text())["results"]
            if (row["encoder"], row["pool"], row["protocol"]) == ("target", "concat", "linear")
        ]
        assert f"{100 * scores[-1]:.1f}" in table
