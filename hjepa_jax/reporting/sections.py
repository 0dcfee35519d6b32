"""The report of a run: sections of Markdown and figures, made from `Facts` alone."""

from hjepa_jax.config import base_config
from hjepa_jax.config.fields import flatten
from hjepa_jax.evaluation.collapse import PATIENCE
from hjepa_jax.evaluation.results import best_row, encoder_name, format_score, tested_on
from hjepa_jax.reporting.curve_sections import (
    collapse_section,
    loss_section,
    schedules_section,
    speed_section,
)
from hjepa_jax.reporting.facts import Facts
from hjepa_jax.reporting.page import Section, code, table
from hjepa_jax.reporting.probe_sections import (
    features_section,
    first_figures,
    look_section,
    probes_section,
)
from hjepa_jax.reporting.verdicts import checklist, next_steps, pct, verdict
from hjepa_jax.runs.progress import format_duration


def sections(facts: Facts) -> list[Section]:
    """Returns all sections of the report that are not empty: results, evidence, origin."""
    made = [
        _summary, _checks, _next, probes_section, look_section, features_section, loss_section,
        collapse_section, _warnings, schedules_section, speed_section, _checkpoints, _parameters,
        _setting,
    ]  # fmt: skip
    return [part for make in made if (part := make(facts)) is not None]


def _summary(facts: Facts) -> Section:
    """Returns the first section: scores, verdict, origin and three pictures."""
    step, total = facts.history.last_step(), facts.num_steps
    of = f" of {total}" if total else " (number of steps not known)"
    seconds = facts.history.training_seconds()
    origin = {
        "status": f"{facts.status}, step {step}{of}",
        "date": facts.ended,
        "training steps took": format_duration(seconds) if seconds else "",
        "hardware": facts.meta.get("versions", {}).get("device", ""),
    }
    origin = {head: value for head, value in origin.items() if value}
    lines = [
        *_headline(facts),
        f"**Verdict: {verdict(facts)}**",
        table([*origin], [[*origin.values()]]),
        *([f"Command: {code(facts.command)}"] if facts.command else []),
    ]
    if not facts.has_classes:
        lines.append(
            "The images have no labels, or one class: there is no k-NN score and no probe of "
            "labels. `eval.data`, or `--data` of the probe command, names labelled images."
        )
    if facts.history.sampled:
        shown, total = len(facts.history.lines), facts.history.num_lines
        lines.append(
            f"metrics.jsonl has {total} lines; {shown} evenly spaced lines were read, so sums over "
            "steps are estimates."
        )
    if facts.history.num_damaged:
        lines.append(f"{facts.history.num_damaged} lines of metrics.jsonl are damaged.")
    return "What was reached", "\n\n".join(lines), first_figures(facts)


def _checks(facts: Facts) -> Section:
    lines = [
        "A good representation beats the same network untrained and raw pixels, and has not "
        "collapsed. Whether this one does, by its own numbers:",
        table(
            ["", "check", "evidence"],
            [({True: "✓", False: "✗", None: "?"}[ok], what, why) for ok, what, why in
             checklist(facts)],
        ),
        "✓ holds, ✗ does not, ? not known.",
    ]  # fmt: skip
    return "Checks", "\n\n".join(lines), {}


def _headline(facts: Facts) -> list[str]:
    """Returns a table of the best scores of each encoder; nothing without scores."""
    encoders, rows = ("target", "random_init", "pixels"), []
    for protocol, name in (("linear", "linear probe"), ("knn", "k-NN")):
        best = [best_row(facts.own_probes, protocol, encoder) for encoder in encoders]
        if any(best):
            rows.append([name, *("-" if row is None else format_score(row) for row in best)])
    if not rows:
        return []
    text = "Best features of each encoder, chosen on held-out images; top-1 in percent"
    scored = [row for row in facts.own_probes if "top1" in row]
    chance = {row["chance"] for row in scored if "chance" in row}
    text += f" on {tested_on(scored)}, with the 95 % interval"
    text += f"; chance is {pct(chance.pop())}" if len(chance) == 1 else ""
    return [f"{text}:", table(["", *map(encoder_name, encoders)], rows)]


def _setting(facts: Facts) -> Section:
    defaults, config = flatten(base_config().to_dict()), flatten(facts.config.to_dict())
    main = (
        "data.source", "data.image_size", "model.name", "model.patch_size", "model.num_levels",
        "train.batch_size", "train.num_epochs", "optim.learning_rate", "seed",
    )  # fmt: skip
    changed = [field for field in config if config[field] != defaults[field] and field not in main]
    rows = [(code(field), code(config[field])) for field in (*main, *changed)]
    origin = {**facts.meta.get("versions", {}), "commit": facts.meta.get("commit")}
    text = "The main fields, then fields that differ from their defaults; `config.json` holds all."
    text += "\n\n" + table(["field", "value"], rows)
    if facts.meta:
        rows = [(name, code(value)) for name, value in origin.items() if value]
        text += "\n\nMade by (from the newest checkpoint):\n\n" + table(["", "value"], rows)
    return "Configuration", text, {}


def _parameters(facts: Facts) -> Section:
    trained = sum(n for name, n in facts.params.items() if name != "target_encoder")
    rows = [(name.replace("_", " "), f"{n:,}") for name, n in facts.params.items()]
    rows += [("trained", f"{trained:,}"), ("in total", f"{sum(facts.params.values()):,}")]
    return "Parameters", table(["part", "parameters"], rows), {}


def _warnings(facts: Facts) -> Section:
    found, before, unreadable, sick, num_in_a_row = [], 0.0, 0, False, 0
    for line in facts.history.lines:
        bad, rank = line.get("train/nonfinite_steps", before), line.get("train/effective_rank")
        if bad > before:
            text = f"step {line['step']}: {bad:.0f} steps so far were not finite and skipped"
            found.append(text)
        before = bad
        skipped = line.get("train/unreadable_images", unreadable)
        if skipped > unreadable:
            text = f"{skipped} unreadable so far, replaced by the next ones"
            found.append(f"step {line['step']}: training images: {text}")
        unreadable = skipped
        if rank is None:
            continue
        signs = facts.signs_in(line)
        num_in_a_row = num_in_a_row + 1 if signs else 0
        if sick and not signs:
            text = f"recovered, effective rank {rank:.1f}"
            found.append(f"step {line['step']}: {text}")
        elif not sick and num_in_a_row >= PATIENCE:  # the same rule as `Alarms` during the run
            found.append(f"step {line['step']}: {'; '.join(signs)}")
        sick = num_in_a_row >= PATIENCE
    if facts.stopped_by:
        found.append(f"the run ended: {facts.stopped_by}")
    shown = found[:20] + ([f"and {len(found) - 20} more"] if len(found) > 20 else [])
    return "Warnings", "\n".join(f"- {text}" for text in shown) or "None in metrics.jsonl.", {}


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
