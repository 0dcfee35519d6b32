"""The tables of a sweep's results in the README beside them: one row per setting, over its seeds.

  PYTHONPATH=. python experiments/sweep_table.py experiments/ablations/shapes.csv

writes it between the marks `<!-- shapes.csv -->` and `<!-- end of shapes.csv -->`. Scores are means
over seeds, with +- the standard deviation (n - 1) of several. Speeds are medians, as seeds may have
run on different machines. The first row of the results is the baseline. Scores above it are bold
and scores below it in italics, if Welch's t-test gives p < 0.05. A single seed is never marked.
"""

import collections
import csv
import pathlib
import statistics
import sys

from scipy.stats import ttest_ind

from experiments.results_table import between_marks

SCORES = {
    "linear": "linear", "knn": "k-NN", "linear_level_0": "linear, level 0",
    "knn_level_0": "k-NN, level 0",
}  # fmt: skip
PLAIN = {
    "effective_rank": ("rank", statistics.mean), "images_per_sec": ("images/s", statistics.median)
}  # fmt: skip


def sweep_table(results: pathlib.Path) -> str:
    """A row per name, in the order of the file; the last run of a seed counts."""
    runs: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(dict)
    with results.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            runs[row["row"]][row["seed"]] = row
    heads = ["row", "seeds", *SCORES.values(), *(head for head, _ in PLAIN.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    first = next(iter(runs))
    for name, by_seed in runs.items():
        cells = [f"`{name}`", str(len(by_seed))]
        for column in SCORES:
            values = [float(row[column]) for row in by_seed.values()]
            compared = [float(row[column]) for row in runs[first].values()]
            cells.append(_score(values, compared))
        for column, (_, average) in PLAIN.items():
            cells.append(f"{average(float(row[column]) for row in by_seed.values()):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score(values: list[float], compared: list[float]) -> str:
    """Returns mean and spread, marked if it differs from the baseline."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    text = f"{mean:.1f} +- {statistics.stdev(values):.1f}"
    if len(compared) < 2:
        return text
    if not ttest_ind(values, compared, equal_var=False).pvalue < 0.05:
        return text
    return f"**{text}**" if mean > statistics.mean(compared) else f"*{text}*"


def with_table(readme: str, results: pathlib.Path) -> str:
    """The README with the table of now."""
    begin, end = f"<!-- {results.name} -->", f"<!-- end of {results.name} -->"
    return between_marks(readme, begin, end, sweep_table(results))


def main() -> None:
    for argument in sys.argv[1:]:
        results = pathlib.Path(argument)
        readme = results.parent / "README.md"
        readme.write_text(with_table(readme.read_text(), results))


if __name__ == "__main__":
    main()
