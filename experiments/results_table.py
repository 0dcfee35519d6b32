"""The README's table of results, from the probe tables that are kept in experiments/.

  python experiments/results_table.py     # writes it between the two marks in README.md

Top-1 in percent on the test images, of everything concatenated (levels and summary tokens).
"""

import json
import pathlib

EXPERIMENTS = pathlib.Path(__file__).parent
README = EXPERIMENTS.parent / "README.md"
BEGIN, END = "<!-- results: experiments/results_table.py -->", "<!-- end of results -->"
PROTOCOLS = {"linear": "linear", "knn": "k-NN"}
ENCODERS = ("target", "random_init", "pixels")


def results_table() -> str:
    """A row per kept run and protocol; the best score of a row is bold."""
    lines = [
        "| run | epochs | probe | trained | random-init | raw pixels |",
        "|---|---|---|---|---|---|",
    ]
    for path in _probes():
        rows = json.loads(path.read_text())["results"]
        config = json.loads((path.parent / "config.json").read_text())
        name = path.relative_to(EXPERIMENTS).parts[0]
        trained = {(row["step"], row["train_size"]) for row in rows if row["encoder"] == "target"}
        step, num_images = max(trained)  # of several checkpoints the newest counts
        epochs = round(step * config["train"]["batch_size"] / num_images)  # some were stopped
        for protocol, shown in PROTOCOLS.items():
            scores = {
                row["encoder"]: f"{100 * row['top1']:.1f}"
                for row in rows
                if row["protocol"] == protocol and row["pool"] == "concat" and "labels" not in row
                if row["encoder"] != "target" or row["step"] == step
            }
            best = max(scores.values(), key=float)
            cells = [f"**{s}**" if (s := scores[e]) == best else s for e in ENCODERS]
            link = f"[`{name}`](experiments/{name}/README.md)"
            lines.append("| " + " | ".join([link, str(epochs), shown, *cells]) + " |")
    return "\n".join(lines)


def _probes() -> list[pathlib.Path]:
    """Of each experiment with a probe table, in its report or without one."""
    found = [*EXPERIMENTS.glob("*/probe.json"), *EXPERIMENTS.glob("*/report/probe.json")]
    return sorted(found, key=lambda path: path.relative_to(EXPERIMENTS).parts[0])


def between_marks(text: str, begin: str, end: str, new: str) -> str:
    """The text with `new` for what stands between two marks."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{new}\n{end}{after}"


def with_table(readme: str) -> str:
    """The README with the table of now."""
    return between_marks(readme, BEGIN, END, results_table())


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
