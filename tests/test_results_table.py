"""The README's numbers are those of the runs in experiments/."""

import json

import pytest

from experiments import results_table, sweep_table


def test_the_table_of_the_readme_is_made_of_the_kept_runs():
    readme = results_table.README.read_text()
    assert results_table.with_table(readme) == readme, "run experiments/results_table.py"
    table = results_table.results_table()
    kept = list(results_table.EXPERIMENTS.glob("**/probe.json"))
    assert len(kept) > 4
    for path in kept:
        scores = [
            row["top1"]
            for row in json.loads(path.read_text())["results"]
            if (row["encoder"], row["pool"], row["protocol"]) == ("target", "concat", "linear")
        ]
        name = path.relative_to(results_table.EXPERIMENTS).parts[0]
        line = next(line for line in table.splitlines() if f"`{name}`" in line)
        assert f"{100 * scores[-1]:.1f}" in line


def test_a_run_that_was_stopped_has_the_epochs_that_it_trained():
    (line,) = [
        line
        for line in results_table.results_table().splitlines()
        if "`cifar10_tiny_agreement`" in line and "linear" in line
    ]
    assert "| 15 |" in line


@pytest.mark.parametrize(
    "results", sorted(results_table.EXPERIMENTS.glob("ablations/*.csv")), ids=lambda path: path.stem
)
def test_the_tables_of_the_ablations_are_made_of_their_rows(results):
    readme = (results.parent / "README.md").read_text()
    assert sweep_table.with_table(readme, results) == readme, "run experiments/sweep_table.py"


def test_only_differences_that_chance_makes_less_than_once_in_twenty_are_marked(tmp_path):
    header = "row,seed,linear,knn,linear_level_0,knn_level_0,effective_rank,images_per_sec"
    runs = [
        *(
            f"base,{seed},{50 + seed},{30 + seed},{20 + seed},{20 + seed},8,100"
            for seed in range(3)
        ),
        *(
            f"better,{seed},{53 + seed},{32 + seed},{17 + 2 * seed},{14 + 2 * seed},9,100"
            for seed in range(3)
        ),
        "once,0,90,90,90,90,9,100",
        "once,0,91,90,90,90,9,100",
    ]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([header, *runs]) + "\n")
    base, better, once = sweep_table.sweep_table(path).splitlines()[2:]
    assert (
        base == "| `base` | 3 | 51.0 +- 1.0 | 31.0 +- 1.0 | 21.0 +- 1.0 | 21.0 +- 1.0 | 8 | 100 |"
    )
    # By Student's t with 4 degrees of freedom 2.78 sqrt(2 / 3) = 2.27 is the border: 3 is beyond
    # it, 2 within, though above two standard errors (1.63). Where spreads are 1 and 2, 2.94 degrees
    # of freedom are left, and the border is 3.22 sqrt(5 / 3) = 4.15.
    scores = "**54.0 +- 1.0** | 33.0 +- 1.0 | 19.0 +- 2.0 | *16.0 +- 2.0*"
    assert better == f"| `better` | 3 | {scores} | 9 | 100 |"
    assert once == "| `once` | 1 | 91.0 | 90.0 | 90.0 | 90.0 | 9 | 100 |"
