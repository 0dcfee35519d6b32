"""Sections of the report with curves: speed, loss, schedules, collapse indicators."""

import numpy as np

from hjepa_jax.reporting.facts import Facts
from hjepa_jax.reporting.figures import Panel, changing_curves
from hjepa_jax.reporting.page import Section, table
from hjepa_jax.reporting.verdicts import collapse_check, gib, num, pct
from hjepa_jax.runs.history import History
from hjepa_jax.runs.progress import format_duration

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
PLOTTED = 1500  # points per curve, more than a figure can show


def speed_section(facts: Facts) -> Section | None:
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
        rows.append(("peak memory (CPU: of the process)", gib(memory.max())))
    if facts.device_memory:
        rows.append(("memory of the device", gib(facts.device_memory)))
    text = table(["", "value"], rows)
    text += "\n\nEvaluation, saving and compiling are not counted."
    speed = {"": thin(history.series("perf/images_per_sec"))}
    panel = Panel("Speed", "images per second", speed, from_zero=True)
    return "Speed and memory", text, changing_curves([panel], "speed", "Speed over training")


def loss_section(facts: Facts) -> Section | None:
    history = facts.history
    names = [name for name in history.names("train/loss") if name != "train/loss"]
    steps, loss = history.series("train/loss")
    if not len(steps):
        return None
    chosen = [int(np.argmin(np.abs(steps - f * steps[-1]))) for f in FRACTIONS]
    by_step = {line["step"]: line for line in history.lines}
    rows = [
        [
            steps[i],
            num(loss[i]),
            _change(loss[0], loss[i]),
            *(num(by_step[int(steps[i])].get(name)) for name in names),
        ]
        for i in sorted(set(chosen))
    ]
    changes = [_change(history.first(name), history.last(name)) for name in names]
    rows.append(["change, %", _change(loss[0], loss[-1]), "", *changes])
    heads = ["step", "loss", "% from first", *(n.removeprefix("train/loss_") for n in names)]
    text = table(heads, rows) + (
        "\n\nMeans over the steps since the previous line. Terms are shown without their weight in "
        "the loss; the spread as a multiple of its floor, and the summary pass as the weighted sum "
        "of its levels."
    )
    terms = {name.removeprefix("train/loss_"): thin(history.series(name)) for name in names}
    panels = [Panel("Total loss", "loss", {"loss": thin((steps, loss))}, log=True)]
    panels += [Panel("Terms of the loss", "before weighting", terms, log=True)] if terms else []
    return "Loss", text, changing_curves(panels, "loss", "Loss over training")


def _change(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None or not first else f"{100 * (last / first - 1):+.1f}"


def schedules_section(facts: Facts) -> Section | None:
    rows, panels = [], []
    for name in ("learning_rate", "weight_decay", "ema_momentum"):
        steps, values = facts.history.series(f"train/{name}")
        if len(steps):
            label = name.replace("_", " ").replace("ema", "EMA")
            rows.append((label, num(values[0]), num(values.max()), num(values[-1])))
            title = label[0].upper() + label[1:]
            panels.append(Panel(title, label, {label: thin((steps, values))}))
    if not rows:
        return None
    text = table(["schedule", "first line", "highest", "newest line"], rows)
    return "Schedules", text, changing_curves(panels, "schedules", "Schedules over training")


def collapse_section(facts: Facts) -> Section | None:
    history = facts.history
    steps, rank = history.series("train/effective_rank")
    if not len(steps):
        return None
    rows = [
        (name, num(history.first(f"train/{name}")), num(history.last(f"train/{name}")))
        for name in (
            "effective_rank",
            "relative_std",
            "target_std",
            "context_std",
            "pred_target_cosine",
            "explained_variance_level_0",
            "position_share",
            "image_share",
        )
        if history.last(f"train/{name}") is not None
    ]
    healthy, _, evidence = collapse_check(facts)
    verdict = f"Verdict: **{'healthy' if healthy else 'collapsed'}** ({evidence})."
    text = table(["indicator", "first line", "newest line"], rows) + "\n\n" + verdict
    if facts.look:
        v = facts.look.verdict
        text += (
            f"\n\nThe checkpoint at step {facts.look.step}, on {len(facts.look.images)} "
            f"held-out training images: **{v.label}**, effective rank {v.effective_rank:.1f} of "
            f"{v.max_rank}, relative std {v.relative_std:.3f} (threshold {v.min_relative_std:.2g})."
        )
    limits = {"collapse below": facts.limits.effective_rank}
    spread = _present(history, target_std="target_std", context_std="context_std")
    parts = _present(
        history,
        explained_variance_level_0="explained",
        position_share="decided by the place",
        image_share="decided by the image",
    )
    panels = [
        Panel("Effective rank", "directions", {"rank": thin((steps, rank))}, limits, from_zero=True)
    ]
    panels += [Panel("Spread of the features", "standard deviation", spread)] if spread else []
    panels += [Panel("Parts of the targets' variance", "share", parts)] if parts else []
    caption = "Collapse indicators over training"
    return "Collapse indicators", text, changing_curves(panels, "collapse", caption)


def _present(history: History, **labels: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the curves of the metrics that the log has, by label."""
    names = (name for name in labels if history.last(f"train/{name}") is not None)
    return {labels[name]: thin(history.series(f"train/{name}")) for name in names}


def thin(line: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most `PLOTTED` evenly spaced points of a curve, the last one included."""
    x, y = line
    stride = max(1, -(-len(x) // PLOTTED))
    return x[::-1][::stride][::-1], y[::-1][::stride][::-1]
