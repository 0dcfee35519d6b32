"""The report of a run: sections of Markdown and figures, made of `Facts` and nothing else."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hjepa_jax.config import base_config
from hjepa_jax.evaluation.results import QUALITY_COLUMNS, column
from hjepa_jax.fields import flatten
from hjepa_jax.figures import (
    Panel,
    bars,
    confusion_matrix,
    curves,
    histograms,
    scatter_maps,
    spectrum,
)  # fmt: skip
from hjepa_jax.image_figures import neighbours, principal_components, snapshot_figures
from hjepa_jax.logging import format_duration
from hjepa_jax.page import table
from hjepa_jax.run_facts import KNN_K, Facts
from hjepa_jax.snapshot import as_unit
from hjepa_jax.verdicts import checklist, next_steps, num, pct

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
PLOTTED = 1500  # points of a curve: more than a figure shows

# A section: its heading, its Markdown, and its figures with their captions, by file name.
Section = tuple[str, str, dict[str, tuple[Figure, str]]]


def sections(facts: Facts) -> list[Section]:
    """All sections of the report that the run has something to say to."""
    made = [
        _summary, _setting, _parameters, _speed, _loss, _schedules, _collapse, _warnings, _probes,
        _look, _features, _checkpoints, _next,
    ]  # fmt: skip
    return [section for make in made if (section := make(facts)) is not None]


def _summary(facts: Facts) -> Section:
    step, total = facts.history.last_step(), facts.num_steps
    lines = [
        f"**Status: {facts.status}**, step {step}" + (f" of {total}." if total else "."),
        "The aim of a run is a representation that is better than the same network untrained and "
        "than raw pixels, without collapse. Whether this one is, by its own numbers:",
        table(
            ["", "check", "evidence"],
            [({True: "✓", False: "✗", None: "?"}[ok], what, why) for ok, what, why in
             checklist(facts)],
        ),
        "✓ holds, ✗ does not, ? not known.",
    ]  # fmt: skip
    if facts.history.sampled:
        shown, total = len(facts.history.lines), facts.history.num_lines
        lines.append(
            f"metrics.jsonl has {total} lines, of which {shown} at even distances were read; sums "
            "over steps are estimates."
        )
    if facts.history.num_damaged:
        lines.append(f"{facts.history.num_damaged} lines of metrics.jsonl are damaged.")
    return "What was reached", "\n\n".join(lines), {}


def _setting(facts: Facts) -> Section:
    defaults, config = flatten(base_config().to_dict()), flatten(facts.config.to_dict())
    main = (
        "data.source", "data.image_size", "model.name", "model.patch_size", "model.num_levels",
        "train.batch_size", "train.num_epochs", "optim.learning_rate", "seed",
    )  # fmt: skip
    changed = [field for field in config if config[field] != defaults[field] and field not in main]
    rows = [(f"`{field}`", f"`{config[field]}`") for field in (*main, *changed)]
    origin = {**facts.meta.get("versions", {}), "commit": facts.meta.get("commit")}
    text = "The fields that matter most, then those that differ from their defaults; all are in "
    text += "`config.json`.\n\n" + table(["field", "value"], rows)
    if facts.meta:
        rows = [(name, f"`{value}`") for name, value in origin.items() if value]
        text += "\n\nMade by (as the newest checkpoint says):\n\n" + table(["", "version"], rows)
    return "Configuration", text, {}


def _parameters(facts: Facts) -> Section:
    trained = sum(n for name, n in facts.params.items() if name != "target_encoder")
    rows = [(name.replace("_", " "), f"{n:,}") for name, n in facts.params.items()]
    rows += [("trained", f"{trained:,}"), ("in total", f"{sum(facts.params.values()):,}")]
    return "Parameters", table(["part", "parameters"], rows), {}


def _speed(facts: Facts) -> Section | None:
    history = facts.history
    steps, rates = history.series("perf/steps_per_sec")
    seconds = history.training_seconds()
    if not len(steps) or not seconds:
        return None
    _, images = history.series("perf/images_per_sec")
    overall = steps[-1] / seconds
    rows = [
        ("steps per second, whole run", num(overall)),
        ("steps per second, median line", num(float(np.median(rates)))),
        ("images per second, median line", num(float(np.median(images)))),
        ("time in steps, so far", format_duration(seconds)),
    ]
    if facts.steps_per_epoch:
        rows.append(("time per epoch", format_duration(facts.steps_per_epoch / overall)))
    if facts.num_steps and rates[0] > 0:
        estimate = facts.num_steps / rates[0]
        rows.append(("whole run, estimated from the first line", format_duration(estimate)))
        if steps[-1] < facts.num_steps:
            left = (facts.num_steps - steps[-1]) / overall
            rows.append(("still to come at this speed", format_duration(left)))
    if (wait := history.last("perf/data_wait_fraction")) is not None:
        rows.append(("waiting for data, newest line", f"{pct(wait)} %"))
    _, memory = history.series("perf/peak_memory_bytes")
    if len(memory):
        rows.append(("peak memory (CPU: of the process)", f"{memory.max() / 2**30:.2f} GiB"))
    text = table(["", "value"], rows)
    text += "\n\nEvaluation, saving and compiling are not counted."
    speed = {"": thin(history.series("perf/images_per_sec"))}
    panel = Panel("Speed", "images per second", speed, from_zero=True)
    return "Speed and memory", text, {"speed": (curves([panel]), "Speed over training")}


def _loss(facts: Facts) -> Section | None:
    history = facts.history
    names = [name for name in history.names("train/loss") if name != "train/loss"]
    steps, loss = history.series("train/loss")
    if not len(steps):
        return None
    columns = ["train/loss", *names]
    chosen = [int(np.argmin(np.abs(steps - f * steps[-1]))) for f in FRACTIONS]
    by_step = {line["step"]: line for line in history.lines}
    rows = [
        [
            steps[i],
            *(num(by_step[int(steps[i])].get(name)) for name in columns),
            _change(loss[0], loss[i]),
        ]
        for i in sorted(set(chosen))
    ]
    changes = [_change(history.first(name), history.last(name)) for name in columns]
    rows.append(["change, %", *changes, ""])
    heads = ["step", *(name.removeprefix("train/") for name in columns), "loss, % from first"]
    text = table(heads, rows) + (
        "\n\nMeans over the steps since the line before. Terms are unweighted; that the loss rises "
        "after a first fall, while the effective rank grows, is what richer targets do."
    )
    terms = {name.removeprefix("train/"): thin(history.series(name)) for name in names}
    panels = [Panel("Total loss", "loss", {"loss": thin((steps, loss))})]
    panels += [Panel("Terms of the loss", "loss, unweighted", terms, log=True)] if terms else []
    return "Loss", text, {"loss": (curves(panels), "Loss over training")}


def _change(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None or not first else f"{100 * (last / first - 1):+.1f}"


def _schedules(facts: Facts) -> Section | None:
    rows, panels = [], []
    for name in ("learning_rate", "weight_decay", "ema_momentum"):
        steps, values = facts.history.series(f"train/{name}")
        if len(steps):
            label = name.replace("_", " ")
            rows.append((label, num(values[0]), num(values.max()), num(values[-1])))
            panels.append(Panel(label.capitalize(), label, {label: thin((steps, values))}))
    if not rows:
        return None
    text = table(["schedule", "first line", "highest", "newest line"], rows)
    return "Schedules", text, {"schedules": (curves(panels), "Schedules over training")}


def _collapse(facts: Facts) -> Section | None:
    history = facts.history
    steps, rank = history.series("train/effective_rank")
    if not len(steps):
        return None
    rows = [
        (name, num(history.first(f"train/{name}")), num(history.last(f"train/{name}")))
        for name in ("effective_rank", "target_std", "context_std", "pred_target_cosine")
        if history.last(f"train/{name}") is not None
    ]
    healthy = rank[-1] >= facts.min_rank
    text = (
        table(["indicator", "first line", "newest line"], rows)
        + f"\n\nVerdict by effective rank: **{'healthy' if healthy else 'collapsed'}** "
        f"({rank[-1]:.1f} of at most {facts.max_rank}; threshold {facts.min_rank:.1f})."
    )
    if facts.look:
        v = facts.look.verdict
        text += (
            f"\n\nOf the checkpoint at step {facts.look.step}, on {len(facts.look.labels)} "
            f"held-out training images: **{v.label}**, effective rank {v.effective_rank:.1f} of "
            f"{v.max_rank}, relative std {v.relative_std:.3f} (threshold {v.min_relative_std})."
        )
    limits = {"collapse below": facts.min_rank}
    spread = {
        name: thin(history.series(f"train/{name}"))
        for name in ("target_std", "context_std")
        if history.last(f"train/{name}") is not None
    }
    panels = [
        Panel("Effective rank", "directions", {"rank": thin((steps, rank))}, limits, from_zero=True)
    ]
    panels += [Panel("Spread of the features", "standard deviation", spread)] if spread else []
    figure = curves(panels)
    return "Collapse indicators", text, {"collapse": (figure, "Collapse indicators over training")}


def _warnings(facts: Facts) -> Section:
    found, before, sick = [], 0.0, False
    for line in facts.history.lines:
        bad, rank = line.get("train/nonfinite_steps", before), line.get("train/effective_rank")
        if bad > before:
            text = f"step {line['step']}: {bad:.0f} steps in all were not finite and left out"
            found.append(text)
        before = bad
        if rank is not None and (rank < facts.min_rank) != sick:
            sick = not sick
            how = "below" if sick else "back above"
            found.append(
                f"step {line['step']}: effective rank {rank:.1f}, {how} {facts.min_rank:.1f}"
            )
    if facts.status == "stopped":
        limit = facts.config.train.max_nonfinite_steps
        found.append(f"the run ended: more than train.max_nonfinite_steps={limit} were left out")
    shown = found[:20] + ([f"and {len(found) - 20} more"] if len(found) > 20 else [])
    return "Warnings", "\n".join(f"- {text}" for text in shown) or "None in metrics.jsonl.", {}


def _probes(facts: Facts) -> Section | None:
    figures, parts = {}, []
    scored = [row for row in facts.probes if "top1" in row]
    steps, knn = facts.history.series("eval/knn_top1")
    if len(steps):
        line = {"": (steps, 100 * knn)}
        title = "k-NN on held-out training images"
        panel = Panel(title, "top-1, percent", line, from_zero=True)
        figures["knn"] = (curves([panel]), "k-NN accuracy over training")
    if scored:
        names = list(dict.fromkeys(column(row) for row in scored))
        cells: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in scored:
            key = (row["encoder"], row["step"], row["pool"], row["level"], row["dim"])
            cells.setdefault(key, {})[column(row)] = row["top1"]
        rows = [[*key, *(pct(scores.get(n)) for n in names)] for key, scores in cells.items()]
        parts += [
            "Top-1 in percent on the test images, each protocol on every representation:",
            table(["encoder", "step", "pool", "level", "dim", *names], rows),
        ]
    for name in dict.fromkeys(row["protocol"] for row in scored if not row.get("labels")):
        figures[f"probe_{name}"] = (_bars(facts, name), f"{name} probe beside its baselines")
    quality = [row for row in facts.probes if row["protocol"] == "quality"]
    if quality:
        rows = [
            [r["encoder"], r["step"], r["pool"], r["level"], *(num(r.get(n)) for n in
             QUALITY_COLUMNS), r["verdict"]]
            for r in quality
        ]  # fmt: skip
        heads = ["encoder", "step", "pool", "level", *QUALITY_COLUMNS, "verdict"]
        parts.append(table(heads, rows))
    if not parts and not figures:
        return None
    return "Probes", "\n\n".join(parts) or "probe.json has no rows yet.", figures


def _bars(facts: Facts, protocol: str) -> Figure:
    """The newest step of each encoder."""
    rows = [r for r in facts.probes if r["protocol"] == protocol and not r.get("labels")]
    encoders = list(dict.fromkeys(r["encoder"] for r in rows if r["encoder"] != "pixels"))
    newest = {e: max(r["step"] for r in rows if r["encoder"] == e) for e in encoders}
    scores = {
        (r["encoder"], r["pool"], r["level"]): 100 * r["top1"]
        for r in rows
        if r["encoder"] == "pixels" or r["step"] == newest[r["encoder"]]
    }
    groups = list(dict.fromkeys(key[1:] for key in scores if key[0] != "pixels"))
    pixels = [value for key, value in scores.items() if key[0] == "pixels"]
    return bars(
        [f"{pool}, level {level}" if pool == "mean" else pool for pool, level in groups],
        {e.replace("_", "-"): [scores.get((e, *g), np.nan) for g in groups] for e in encoders},
        title=f"{protocol} probe",
        ylabel="top-1, percent",
        limits={"raw pixels": pixels[-1]} if pixels else {},
    )


def _look(facts: Facts) -> Section:
    if facts.look is None:
        return "What it sees", f"No pictures: {facts.no_look}.", {}
    captions = {
        "masks": "Masks of training, at every level",
        "pca": "First three principal components of the features",
        "cosine": "Cosine of prediction and target, where something was predicted",
        "similarity": "Similarity of the framed patch to all others",
        "attention": "Attention of the target encoder: last block by head, and rollout",
    }
    figures = snapshot_figures(facts.look.snapshot)
    text = f"Training images, and the checkpoint at step {facts.look.step}."
    return "What it sees", text, {name: (figures[name], captions[name]) for name in captions}


def _features(facts: Facts) -> Section | None:
    look = facts.look
    if look is None:
        return None
    levels = {name.replace("_", " "): x for name, x in look.features.items()}
    top1 = float((look.predictions == look.labels).mean())
    text = (
        f"{len(look.labels)} held-out training images beside {look.bank_size} others, target "
        f"encoder at step {look.step}, level 0, mean over patches. k-NN with k = "
        f"{min(KNN_K, look.bank_size)} gets {pct(top1)} % of them right. The test images are left "
        "to the probes."
    )
    values = {name: np.linalg.svd(x - x.mean(axis=0), compute_uv=False) for name, x in
              levels.items()}  # fmt: skip
    pictures = (as_unit(look.queries), as_unit(look.neighbours))
    names = [look.class_names[label] for label in look.labels[: len(look.queries)]]
    return "Features", text, {
        "neighbours": (
            neighbours(*pictures, names, look.same_class.tolist()), "Nearest neighbours"
        ),
        "confusion": (
            confusion_matrix(look.labels, look.predictions, look.class_names),
            "Confusion matrix of k-NN",
        ),
        "map": (
            scatter_maps(_maps(look.features["level_0"]), look.labels, look.class_names),
            "Maps of the features in two dimensions",
        ),
        "spectrum": (spectrum(values), "Spectrum of the features"),
        "histogram": (histograms(levels), "Values of the features"),
    }  # fmt: skip


def _maps(x: np.ndarray) -> dict[str, np.ndarray]:
    """PCA; and t-SNE, where scikit-learn is installed (the extra `maps`)."""
    maps = {"PCA": principal_components(x, 2)}
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return maps
    if len(x) > 30:
        tsne = TSNE(
            perplexity=min(30, len(x) // 4), init="pca", max_iter=500, n_jobs=1, random_state=0
        )
        maps["t-SNE"] = tsne.fit_transform(x)
    return maps


def _checkpoints(facts: Facts) -> Section:
    knn = dict(zip(*facts.history.series("eval/knn_top1"), strict=True))
    rows = [
        (step, f"{size / 1e6:.1f} MB", pct(knn.get(step)))
        for step, size in facts.checkpoints.items()
    ]
    text = table(["step", "size", "k-NN top-1, %"], rows) if rows else "None."
    return "Checkpoints", text, {}


def _next(facts: Facts) -> Section:
    found = next_steps(facts)
    text = "\n".join(f"- {what} *Because: {rule}.*" for what, rule in found)
    return "Next steps", text or "None: no rule applies.", {}


def thin(line: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """At most `PLOTTED` points of a line, at even distances, the last among them."""
    x, y = line
    stride = max(1, -(-len(x) // PLOTTED))
    return x[::-1][::stride][::-1], y[::-1][::stride][::-1]
