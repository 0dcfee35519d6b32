"""The table of results in README.md and docs/results.md, from the probe tables in experiments/.

  python experiments/results_table.py     # writes it between the two marks of both pages

Top-1 in percent on the test images, everything concatenated (levels and summary tokens), with the
commit that trained the run. The last row is a published result to compare with.
"""

import json
import pathlib
import re

EXPERIMENTS = pathlib.Path(__file__).parent
PAGES = {EXPERIMENTS.parent / "README.md": "", EXPERIMENTS.parent / "docs/results.md": "../"}
BEGIN, END = "<!-- results: experiments/results_table.py -->", "<!-- end of results -->"
ENCODERS = ("target", "random_init", "pixels")
# Commits in the table that are older than bc926dd, which made random crops keep their drawn area.
BEFORE_CROPS = ("bcbe262",)
FOOTNOTE = (
    "\\* made before random crops kept their drawn area (bc926dd): "
    "today's code trains on other crops."
)
OUTSIDE = (
    "| [solo-learn](https://jmlr.org/papers/v23/21-1155.html), VICReg, ResNet-18, CIFAR-10 "
    "| da Costa et al. 2022 | 1000 | 92.07 (online probe) | | | | | |"
)


def results_table(to_root: str = "") -> str:
    """Returns a row per kept run; the best score of each protocol is bold.

    Args:
      to_root: the way from the page to the root of the repository, "" or "../".
    """
    lines = [
        "| run | commit | epochs | linear: trained | random-init | raw pixels "
        "| k-NN: trained | random-init | raw pixels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    old = False
    for path in _probes():
        rows = json.loads(path.read_text())["results"]
        config = json.loads((path.parent / "config.json").read_text())
        name = path.relative_to(EXPERIMENTS).parts[0]
        trained = {(row["step"], row["train_size"]) for row in rows if row["encoder"] == "target"}
        step, num_images = max(trained)  # the newest of several checkpoints counts
        epochs = round(step * config["train"]["batch_size"] / num_images)  # some were stopped
        commit = commit_of(path)
        if commit in BEFORE_CROPS:
            commit, old = f"{commit} \\*", True
        link = f"[`{name}`]({to_root}experiments/{name}/README.md)"
        cells = [c for protocol in ("linear", "knn") for c in _scores(rows, protocol, step)]
        lines.append("| " + " | ".join([link, commit, str(epochs), *cells]) + " |")
    return "\n".join([*lines, OUTSIDE, "", FOOTNOTE] if old else [*lines, OUTSIDE])


def _scores(rows: list[dict], protocol: str, step: int) -> list[str]:
    """Scores of the three encoders in one protocol; the best is bold."""
    scores = {
        row["encoder"]: f"{100 * row['top1']:.1f}"
        for row in rows
        if row["protocol"] == protocol and row["pool"] == "concat" and "labels" not in row
        if row["encoder"] != "target" or row["step"] == step
    }
    best = max(scores.values(), key=float)
    return [f"**{s}**" if (s := scores[e]) == best else s for e in ENCODERS]


def commit_of(probe: pathlib.Path) -> str:
    """Returns the commit that trained a run: from its checkpoint, or else the last on its page.

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
    """The probe tables of all experiments, in their report or without one."""
    found = [*EXPERIMENTS.glob("*/probe.json"), *EXPERIMENTS.glob("*/report/probe.json")]
    return sorted(found, key=lambda path: path.relative_to(EXPERIMENTS).parts[0])


def between_marks(text: str, begin: str, end: str, new: str) -> str:
    """Returns the text with `new` between two marks."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{new}\n{end}{after}"


def with_table(page: str, to_root: str = "") -> str:
    """Returns the page with the table of now."""
    return between_marks(page, BEGIN, END, results_table(to_root))


if __name__ == "__main__":
    for path, to_root in PAGES.items():
        path.write_text(with_table(path.read_text(), to_root))
