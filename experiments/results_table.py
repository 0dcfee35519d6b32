"""The README's table of results, from the probe tables that are kept in experiments/.

  python experiments/results_table.py     # writes it between the two marks in README.md

Top-1 in percent on the test images, of everything concatenated (levels and summary tokens), with
the commit that trained the run.
"""

import json
import pathlib
import re

EXPERIMENTS = pathlib.Path(__file__).parent
README = EXPERIMENTS.parent / "README.md"
BEGIN, END = "<!-- results: experiments/results_table.py -->", "<!-- end of results -->"
PROTOCOLS = {"linear": "linear", "knn": "k-NN"}
ENCODERS = ("target", "random_init", "pixels")
# Commits in the table that are older than bc926dd, which made random crops keep their drawn area.
BEFORE_CROPS = ("bcbe262",)
FOOTNOTE = (
    "\\* made before random crops kept their drawn area (bc926dd): "
    "today's code trains on other crops."
)


def results_table() -> str:
    """A row per kept run and protocol; the best score of a row is bold."""
    lines = [
        "| run | commit | epochs | probe | trained | random-init | raw pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    old = False
    for path in _probes():
        rows = json.loads(path.read_text())["results"]
        config = json.loads((path.parent / "config.json").read_text())
        name = path.relative_to(EXPERIMENTS).parts[0]
        trained = {(row["step"], row["train_size"]) for row in rows if row["encoder"] == "target"}
        step, num_images = max(trained)  # of several checkpoints the newest counts
        epochs = round(step * config["train"]["batch_size"] / num_images)  # some were stopped
        commit = commit_of(path)
        if commit in BEFORE_CROPS:
            commit, old = f"{commit} \\*", True
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
            lines.append("| " + " | ".join([link, commit, str(epochs), shown, *cells]) + " |")
    return "\n".join([*lines, "", FOOTNOTE] if old else lines)


def commit_of(probe: pathlib.Path) -> str:
    """The commit that trained a run: as its checkpoint says, or else its page; of several the last.

    Raises:
      ValueError: for a run without either record.
    """
    record = probe.parent / "checkpoint.json"
    if record.exists():
        return json.loads(record.read_text())["versions"]["commit"][:7]
    page = EXPERIMENTS / probe.relative_to(EXPERIMENTS).parts[0] / "README.md"
    line = re.search(r"^\* Commits?:? .*$", page.read_text(), flags=re.M)
    found = re.findall(r"\b[0-9a-f]{7}\b", line[0]) if line else []
    if not found:
        raise ValueError(f"{page}: needs a line '* Commit 1234abc.', or the run a checkpoint.json")
    return found[-1]


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
