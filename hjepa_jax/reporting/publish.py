"""Writes the report: report.md, report.html and figures/."""

import pathlib

import numpy as np

from hjepa_jax.config import Config
from hjepa_jax.config.fields import flatten
from hjepa_jax.data.base import Split
from hjepa_jax.evaluation.results import best_row, column, differing, format_score
from hjepa_jax.reporting.curve_sections import thin
from hjepa_jax.reporting.facts import Facts, read_facts
from hjepa_jax.reporting.figures import Panel, changing_curves, png
from hjepa_jax.reporting.page import Section, code, escape, slug, table, to_html
from hjepa_jax.reporting.projector import write_projector
from hjepa_jax.reporting.sections import sections
from hjepa_jax.reporting.verdicts import num, pct
from hjepa_jax.runs.seeds import differences
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.names import encodable


def write_report(
    workdirs: list[pathlib.Path],
    output: pathlib.Path,
    *,
    images: bool = True,
    splits: tuple[Split, Split] | None = None,
) -> list[pathlib.Path]:
    """Writes the report of one run, or of several runs side by side.

    A report in the run's own work directory adds features for TensorBoard's PROJECTOR tab.

    Args:
      workdirs: work directories of the runs.
      output: directory to write into; created if needed.
      images: whether to read checkpoint and training images; ignored for several runs.
      splits: images of the run, if they are in memory.

    Raises:
      InputError: a work directory holds no run of this version.
    """
    if len(workdirs) > 1:
        runs = [read_facts(workdir, images=False) for workdir in workdirs]
        return publish("Runs side by side", comparison(runs), output)
    facts = read_facts(workdirs[0], images=images, splits=splits)
    files = publish(f"Run {facts.name}", sections(facts), output)
    if (look := facts.look) and output.resolve() == workdirs[0].resolve():
        write_projector(output, look.features, look.names, look.images)
    return files


def publish(title: str, parts: list[Section], output: pathlib.Path) -> list[pathlib.Path]:
    """Writes sections as report.md, report.html and figures/."""
    (output / "figures").mkdir(parents=True, exist_ok=True)
    contents = " · ".join(f"[{heading}](#{slug(heading)})" for heading, _, _ in parts)
    text, pictures = [f"# {escape(title)}", contents], {}
    for heading, body, figures in parts:
        text += [f"## {heading}", body]
        for name, (figure, caption) in figures.items():
            address = f"figures/{name}.png"
            pictures[address] = (png(figure), png(figure, dark=True))
            (output / address).write_bytes(pictures[address][0])
            text.append(f"![{caption}]({address})")
    markdown = encodable("\n\n".join(text) + "\n")
    files = {
        "report.md": markdown,
        "report.html": to_html(markdown, title=title, pictures=pictures),
    }
    for name, content in files.items():
        with replacing(output / name) as file:
            file.write(content.encode())
    return [output / name for name in files]


def comparison(runs: list[Facts]) -> list[Section]:
    """Returns sections that compare runs: progress, scores, curves, configurations."""
    names = _unique_names(runs)
    heads = ["", *map(escape, names)]
    last = [run.history.last for run in runs]
    rows = [
        ["status", *(run.status for run in runs)],
        ["step", *(run.history.last_step() for run in runs)],
        ["steps planned", *(run.num_steps or "?" for run in runs)],
        ["parameters", *(f"{sum(run.params.values()):,}" for run in runs)],
        ["loss", *(num(f("train/loss")) for f in last)],
        ["effective rank", *(num(f("train/effective_rank")) for f in last)],
        ["highest possible rank", *(run.max_rank for run in runs)],
        ["k-NN during training, %", *(pct(f("eval/knn_top1")) for f in last)],
        ["images per second, newest line", *(num(f("perf/images_per_sec")) for f in last)],
    ]
    for protocol in ("linear", "knn"):
        for encoder in ("target", "random_init", "pixels"):
            best = [best_row(run.own_probes, protocol, encoder) for run in runs]
            scores = ["-" if row is None else format_score(row) for row in best]
            rows.append([f"best {protocol} of {encoder.replace('_', '-')}, %", *scores])
    panels = []
    for metric, title, unit in (
        ("train/loss", "Total loss", "loss"),
        ("train/effective_rank", "Effective rank", "directions"),
        ("eval/knn_top1", "k-NN on held-out images", "top-1, fraction"),
        ("perf/images_per_sec", "Speed", "images per second"),
    ):
        series = {n: run.history.series(metric) for n, run in zip(names, runs, strict=True)}
        lines = {name: thin(line) for name, line in series.items() if len(line[0])}
        if lines:
            panels.append(Panel(title, unit, lines))
    figures = changing_curves(panels, "comparison", "Runs over training")
    parts: list[Section] = [("Side by side", table(heads, rows), figures)]
    parts.append(("Configurations", _differences([run.config for run in runs], heads), {}))
    if any(run.probes for run in runs):
        parts.append(("Probes", _probe_table(runs, heads), {}))
    return parts


def _unique_names(runs: list[Facts]) -> list[str]:
    names = [run.name for run in runs]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _differences(configs: list[Config], heads: list[str]) -> str:
    flat = [flatten(config.to_dict()) for config in configs]
    fields = [
        field for field in flat[0] if any(other[field] != flat[0][field] for other in flat[1:])
    ]
    if not fields:
        return "The configurations are the same."
    return table(heads, [[code(field), *(code(c[field]) for c in flat)] for field in fields])


def _probe_table(runs: list[Facts], heads: list[str]) -> str:
    cells: dict[str, list[float | None]] = {}
    rare = differing([row for run in runs for row in run.probes if "top1" in row])
    for i, run in enumerate(runs):
        for row in run.probes:
            if "top1" in row:
                key = f"{column(row)}, {row['encoder']} {row['pool']} level {row['level']}"
                key += "".join(f", {name} {row.get(name)}" for name in rare)
                cells.setdefault(key, [None] * len(runs))[i] = row["top1"]
    rows = [[key, *map(pct, values)] for key, values in cells.items()]
    steps = [run.history.last_step() for run in runs]
    images = [run.meta.get("data") for run in runs]
    if differing_runs := differences([run.config for run in runs], steps, images):
        text = f"Top-1 in percent. There is no standard deviation, because {differing_runs}."
        return text + "\n\n" + table(heads, rows)
    spread = []
    for row, values in zip(rows, cells.values(), strict=True):
        known = [value for value in values if value is not None]
        std = f"{100 * float(np.std(known, ddof=1)):.2f}" if len(known) > 1 else "-"
        spread.append([*row, std])
    return "Top-1 in percent.\n\n" + table([*heads, "standard deviation"], spread)
