"""Recomputes every number of a report.md from the files it was made of, by code of its own.

All that is expected is taken out of the text, and what is left holds no digit. What only a
checkpoint can tell is given as `Checkpoint`, or is checked in form alone.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics

import numpy as np

# Digits that belong to words.
WORDS = ("top-1", "Top-1")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the report says of the checkpoints of its run.

    Attributes:
      versions: by name, with the commit.
      sizes: as shown, by step.
      features: the words about k-NN on the held-out images.
      verdict: those about their spread.
    """

    versions: dict[str, str]
    sizes: dict[str, str]
    features: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files a report is made of.

    Attributes:
      lines: of metrics.jsonl.
      probes: rows of probe.json.
      config: config.json.
      defaults: the same fields by default.
      params: number of parameters by part.
      width: of the encoder.
      num_images: of the training set.
      saved: step of the newest checkpoint when the report was written; None for no checkpoint.
      checkpoint: what the report must say of it; None where it is not there any more.
      beside_untrained: whether a rank counts as collapsed beside that of the first lines, and after
        three lines; older reports knew a tenth of the largest rank alone.
    """

    lines: list[dict]
    probes: list[dict]
    config: dict
    defaults: dict
    params: dict[str, int]
    width: int
    num_images: int
    saved: int | None
    checkpoint: Checkpoint | None = None
    beside_untrained: bool = True

    @property
    def limits(self) -> tuple[float, float]:
        """Rank and relative std below which features have collapsed."""
        rank, std = self.max_rank / 10, 0.01
        if not self.beside_untrained:
            return rank, std
        first: list[dict] = []
        for line in self.lines:
            if "train/effective_rank" in line:
                first.append(line)
                if line["step"] * self.config["train"]["batch_size"] >= 512:
                    break
        half = max(line["train/effective_rank"] for line in first) / 2
        stds = [line["train/relative_std"] for line in first if "train/relative_std" in line]
        least = min(rank, max(self.max_rank / 50, 1.5))
        return (
            max(min(rank, half), least),
            max(min(std, max(stds) / 2), 0.001) if stds else std,
        )

    @property
    def max_rank(self) -> int:
        batch = min(self.config["train"]["batch_size"], 512)
        return min(batch * (512 // batch) - 1, self.width)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.config["train"]["batch_size"]

    @property
    def num_steps(self) -> int:
        c = self.config["train"]
        return c["num_steps"] or max(1, round(c["num_epochs"] * self.steps_per_epoch))

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]

    @property
    def num_held_out(self) -> int:
        at_least = self.steps_per_epoch * self.config["train"]["batch_size"]
        return min(self.config["eval"]["num_val"], at_least // 5)

    def best(self, protocol: str, encoder: str) -> dict | None:
        """Of the features that held-out training images choose, on the run's own data."""
        keys = (protocol, encoder, self.config["data"]["source"])
        rows = [r for r in self.probes if (r["protocol"], r["encoder"], r["data"]) == keys]
        return functools.reduce(better, rows) if rows else None


def better(a: dict, b: dict) -> dict:
    """The one of two rows that held-out images favour; if equal, by what the features are."""
    for judged in (
        lambda r: r["step"],
        lambda r: r["chosen"]["val_top1"],
        lambda r: -r["dim"],
        lambda r: ["concat", "summary", "mean"].index(r["pool"]),
        lambda r: -1e9 if r["level"] == "all" else -int(r["level"]),
        lambda r: -r.get("num_layers", 1),
    ):
        if judged(a) != judged(b):
            return a if judged(a) > judged(b) else b
    return a


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n, by the quadratic equation that Wilson solved.

    (p - share)^2 = z^2 p (1 - p) / n
    """
    z2 = 1.959964**2
    roots = np.roots([1 + z2 / n, -(2 * share + z2 / n), share**2]).real
    return max(0.0, min(roots)), min(1.0, max(roots))


def gap(a: float, b: float, n: int, m: int) -> tuple[float, float]:
    """The 95 % interval of a - b: the ends of the two intervals, at right angles."""
    (a_low, a_high), (b_low, b_high) = interval(a, n), interval(b, m)
    return (
        a - b - math.sqrt((a - a_low) ** 2 + (b_high - b) ** 2),
        a - b + math.sqrt((a_high - a) ** 2 + (b - b_low) ** 2),
    )


def comparison(ours: dict, theirs: dict) -> tuple[bool | None, str]:
    a, b = ours["top1"], theirs["top1"]
    n, m = ours["test_size"], theirs["test_size"]
    low, high = gap(a, b, n, m)
    assert n == m
    says = f"{percent(a)} against {percent(b)} % on {n:,} test images: {100 * (a - b):+.2f} points"
    holds = True if low > 0.01 else None if a - b > 0.01 else False
    return holds, f"{says}, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"


def read_sources(folder: pathlib.Path, **known) -> Sources:
    """Those in a workdir, or beside a report that was kept; a run need not have been probed."""
    probes = folder / "probe.json"
    return Sources(
        lines=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        probes=json.loads(probes.read_text())["results"] if probes.exists() else [],
        config=json.loads((folder / "config.json").read_text()),
        **known,
    )


def read_sections(report: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", report, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every Markdown table, the heads first, the rule left out."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def change(first: float | None, last: float | None) -> str:
    return f"{100 * (last / first - 1):+.1f}" if first and last is not None else "-"


def duration(seconds: float) -> str:
    total = round(seconds)
    hours, minutes, sec = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{sec:02}" if hours else f"{minutes}:{sec:02}"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def signs(s: Sources, line: dict) -> list[str]:
    """What says in a line that features have collapsed."""
    rank, std = line["train/effective_rank"], line.get("train/relative_std")
    least, least_std = s.limits
    found = [f"effective rank {rank:.1f} is below {least:.1f}"] if rank < least else []
    if std is not None and std < least_std:
        found.append(f"relative std {std:.2g} is below {least_std:.2g}")
    return found


def newest_signs(s: Sources) -> tuple[bool, str]:
    """Whether features are healthy at the end, and why."""
    with_rank = [line for line in s.lines if "train/effective_rank" in line]
    line, newest = with_rank[-1], with_rank[-3:] if s.beside_untrained else with_rank[-1:]
    found = signs(s, line) if all(signs(s, x) for x in newest) else []
    if (
        s.checkpoint
        and (label := re.findall(r"\*\*(.+)\*\*", s.checkpoint.verdict)[0]) != "healthy"
    ):
        found.append(f"{label} at the checkpoint of step {s.saved}")
    rank, (least, least_std) = line["train/effective_rank"], s.limits
    says = f"effective rank {rank:.1f}, threshold {least:.1f} of {s.max_rank}"
    if "train/relative_std" in line:
        says += f"; relative std {line['train/relative_std']:.2g}, threshold {least_std:.2g}"
    return not found, "; ".join(found) or says


def reached(s: Sources) -> list:
    step, loss = s.lines[-1]["step"], s.values("train/loss")
    bad, knn = s.values("train/nonfinite_steps")[-1], s.values("eval/knn_top1")
    healthy, spread = newest_signs(s)
    status = "finished" if step == s.num_steps else "interrupted"
    found = [f"**Status: {status}**, step {step} of {s.num_steps}."]
    checks = [
        (step == s.num_steps, "Training reached its last step", f"step {step} of {s.num_steps}"),
        (bad == 0, "Every step was finite", f"{bad:.0f} steps left out"),
        (loss[-1] < loss[0], "The loss ended below its first value",
         f"{four(loss[0])} to {four(loss[-1])}"),
        (healthy, "Features have not collapsed", spread),
        (True if gap(knn[-1], knn[0], *2 * [s.num_held_out])[0] > 0 else None if knn[-1] > knn[0]
         else False, "k-NN accuracy rose", f"{percent(knn[0])} to {percent(knn[-1])} % on at least "
         f"{s.num_held_out:,} held-out images")
        if len(knn) > 1 else (None, "k-NN accuracy rose", "fewer than two evaluations"),
    ]  # fmt: skip
    for protocol in ("linear", "knn"):
        for encoder, name in (("random_init", "random-init"), ("pixels", "raw pixels")):
            ours, theirs = s.best(protocol, "target"), s.best(protocol, encoder)
            what = f"Trained features beat {name} by more than 1.00 points ({protocol})"
            if ours is None or theirs is None:
                checks.append((None, what, "not probed"))
                continue
            holds, says = comparison(ours, theirs)
            checks.append((holds, what, says))
    saved = (None, "no checkpoint")
    if s.saved is not None:
        saved = (s.saved >= step, f"newest is step {s.saved}")
    checks.append((saved[0], "The last step has a checkpoint", saved[1]))
    marks = {True: "✓", False: "✗", None: "?"}
    return found + [row(marks[ok], what, why) for ok, what, why in checks]


def configuration(s: Sources) -> list:
    flat = {f"{group}.{name}": value for group, fields in s.config.items()
            if isinstance(fields, dict) for name, value in fields.items()}  # fmt: skip
    flat |= {name: value for name, value in s.config.items() if not isinstance(value, dict)}
    main = ["data.source", "data.image_size", "model.name", "model.patch_size",
            "model.num_levels", "train.batch_size", "train.num_epochs", "optim.learning_rate",
            "seed"]  # fmt: skip
    flat = {name: value for name, value in flat.items() if name in s.defaults}  # others are gone
    changed = [field for field, value in flat.items() if value != s.defaults[field]]
    found = [row(f"`{f}`", f"`{flat[f]}`") for f in dict.fromkeys([*main, *changed])]
    if s.saved is None:
        return found
    if s.checkpoint is None:
        return [*found, re.compile(r"Made by \(as the newest checkpoint says\):[^#]*")]
    return found + [row(name, f"`{value}`") for name, value in s.checkpoint.versions.items()]


def parameters(s: Sources) -> list:
    trained = sum(n for name, n in s.params.items() if name != "target_encoder")
    counts = {**s.params, "trained": trained, "in total": sum(s.params.values())}
    return [row(name.replace("_", " "), f"{n:,}") for name, n in counts.items()]


def speed(s: Sources) -> list:
    lines = [line for line in s.lines if "perf/steps_per_sec" in line]
    rates, before, seconds = [line["perf/steps_per_sec"] for line in lines], 0, 0.0
    for line in lines:
        seconds += (line["step"] - before) / line["perf/steps_per_sec"]
        before = line["step"]
    overall = before / seconds
    shown = {
        "steps per second, whole run": four(overall),
        "steps per second, median line": four(statistics.median(rates)),
        "images per second, median line": four(statistics.median(s.values("perf/images_per_sec"))),
        "time in steps, so far": duration(seconds),
        "time per epoch": duration(s.steps_per_epoch / overall),
        "whole run, estimated from the first line": duration(s.num_steps / rates[0]),
    }
    if before < s.num_steps:
        shown["still to come at this speed"] = duration((s.num_steps - before) / overall)
    shown |= {
        "waiting for data, newest line": f"{percent(s.values('perf/data_wait_fraction')[-1])} %",
        "peak memory (CPU: of the process)":
            f"{max(s.values('perf/peak_memory_bytes')) / 2**30:.2f} GiB",
    }  # fmt: skip
    return [row(*cells) for cells in shown.items()]


def loss(s: Sources) -> list:
    lines = [line for line in s.lines if "train/loss" in line]
    names = sorted({n for line in lines for n in line if n.startswith("train/loss")})
    first, last = lines[0], lines[-1]
    heads = [name.removeprefix("train/") for name in names]
    found = [row("step", *heads, "loss, % from first")]
    chosen = {}
    for share in (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1):
        line = min(lines, key=lambda line: abs(line["step"] - share * last["step"]))
        chosen[line["step"]] = line
    for step, line in chosen.items():
        cells = [four(line.get(name)) for name in names]
        found.append(row(step, *cells, change(first["train/loss"], line["train/loss"])))
    changes = [change(s.values(name)[0], s.values(name)[-1]) for name in names]
    return [*found, row("change, %", *changes, "")]


def schedules(s: Sources) -> list:
    found = []
    for name in ("learning_rate", "weight_decay", "ema_momentum"):
        values = s.values(f"train/{name}")
        cells = (four(values[0]), four(max(values)), four(values[-1]))
        found.append(row(name.replace("_", " ").replace("ema", "EMA"), *cells))
    return found


def collapse(s: Sources) -> list:
    found = []
    spread = ("effective_rank", "relative_std", "target_std", "context_std")
    shares = ("explained_variance_level_0", "position_share", "image_share")
    for name in (*spread, "pred_target_cosine", *shares):
        if values := s.values(f"train/{name}"):
            found.append(row(name, four(values[0]), four(values[-1])))
    healthy, evidence = newest_signs(s)
    says = f"Verdict: **{'healthy' if healthy else 'collapsed'}** ({evidence})."
    if s.saved is None:
        return [*found, says]
    looked = re.compile(
        rf"Of the checkpoint at step {s.saved}, on \d+ held-out training images: "
        r"\*\*healthy\*\*, effective rank [\d.]+ of \d+, relative std [\d.]+ \(threshold [\d.]+\)\."
    )
    return [*found, says, s.checkpoint.verdict if s.checkpoint else looked]


def warnings(s: Sources) -> list:
    found, before, unreadable, sick, in_a_row = [], 0, 0, False, 0
    for line in s.lines:
        bad, rank = line.get("train/nonfinite_steps", before), line.get("train/effective_rank")
        if bad > before:
            found.append(f"step {line['step']}: {bad} steps in all were not finite and left out")
        if rank is not None:
            in_a_row = in_a_row + 1 if signs(s, line) else 0
        now = in_a_row >= (3 if s.beside_untrained else 1)
        if now != sick:
            sick = now
            healthy = f"no collapse any more, effective rank {rank:.1f}"
            how = "; ".join(signs(s, line)) if sick else healthy
            found.append(f"step {line['step']}: {how}")
        before, skipped = bad, line.get("train/unreadable_images", unreadable)
        if skipped > unreadable:
            text = f"{skipped} unreadable in all, and the next ones trained on instead"
            found.append(f"step {line['step']}: training images: {text}")
        unreadable = skipped
    return [f"- {text}" for text in found]


def column(r: dict) -> str:
    return f"{r['protocol']} {r['labels']}" if r.get("labels") else r["protocol"]


def score(r: dict) -> str:
    low, high = interval(r["top1"], r["test_size"])
    if "interval" in r:
        low, high = max(0, r["top1"] - r["interval"]), min(1, r["top1"] + r["interval"])
    return f"{percent(r['top1'])} ({100 * low:.1f}-{100 * high:.1f})"


def probes(s: Sources) -> list:
    scored = [r for r in s.probes if "top1" in r]
    names = list(dict.fromkeys(map(column, scored)))
    cells: dict[tuple, dict] = {}
    for r in scored:
        key = (r["encoder"], r["step"], r["pool"], r["level"], r["dim"])
        cells.setdefault(key, {})[column(r)] = score(r)
    sizes = " or ".join(f"{n:,}" for n in sorted({r["test_size"] for r in scored}))
    found = [f"Top-1 in percent on {sizes} test images, with its 95 % interval"] * bool(scored)
    found += [row("encoder", "step", "pool", "level", "dim", *names)]
    found += [
        f"- {column(r)}, {r['encoder']} {r['pool']} level {r['level']}: {note}"
        for r in scored
        for note in [
            *r.get("at_edge", []),
            *["the fit did not converge"] * (r.get("converged") is False),
        ]
    ]  # fmt: skip
    found += [row(*key, *(scores.get(n, "-") for n in names)) for key, scores in cells.items()]
    for r in s.probes:
        if r["protocol"] == "quality":
            numbers = (
                "relative_std",
                "effective_rank",
                "rankme",
                "alpha_req",
                "uniformity",
                "lidar",
            )
            values = [four(r.get(name)) for name in numbers]
            found.append(row(r["encoder"], r["step"], r["pool"], r["level"], *values, r["verdict"]))
    return found


def look(s: Sources) -> list:
    return [] if s.saved is None else [f"Training images, and the checkpoint at step {s.saved}."]


def features(s: Sources) -> list:
    if s.checkpoint:
        return [s.checkpoint.features]
    return [
        re.compile(
            rf"\d+ held-out training images beside \d+ others, target encoder at step {s.saved}"
            r"(, level 0, mean over patches\.|\. Neighbours, confusion matrix and maps are made of "
            r"the features with the best k-NN score among those others: (level \d+|[a-z ]+)"
            r"(, mean over patches| and summary tokens)?\.) "
            r"k-NN with k = \d+ gets [\d.]+ % of (them|the held-out images) right"
        )
    ]


def checkpoints(s: Sources) -> list:
    if s.saved is None:
        return []
    scores = {line["step"]: line.get("eval/knn_top1") for line in s.lines}
    scores.setdefault(s.saved, None)
    if s.checkpoint:
        return [row(k, size, percent(scores.get(int(k)))) for k, size in s.checkpoint.sizes.items()]
    rows = (rf"\| {step} \| [\d.]+ MB \| {percent(x)} \|" for step, x in scores.items())
    return [re.compile("(" + "|".join(rows) + r"|\s)+$")]


def next_steps(s: Sources) -> list:
    last = {name: values[-1] for name in {n for line in s.lines for n in line}
            if (values := s.values(name))}  # fmt: skip
    cosine, wait, found = last["train/pred_target_cosine"], last["perf/data_wait_fraction"], []
    healthy, evidence = newest_signs(s)
    if bad := last["train/nonfinite_steps"]:
        found.append(f"train/nonfinite_steps is {bad}, above 0")
    if not healthy:
        found.append(evidence)
    if cosine > 0.95 and healthy:
        found.append(f"train/pred_target_cosine {cosine:.3f} is above 0.95")
    places = last.get("train/position_share", 0.0)
    explained = last.get("train/explained_variance_level_0", 1.0)
    if places > 0.5 and explained < places + 0.1 and s.config["model"]["positions"] != "rope2d":
        found.append(
            f"train/position_share {places:.3f} is above 0.5, and "
            f"train/explained_variance_level_0 {explained:.3f} not 0.1 above it"
        )
    if wait > 0.1:
        found.append(f"perf/data_wait_fraction {wait:.3f} is above 0.1")
    knn = [(line["step"], line["eval/knn_top1"]) for line in s.lines if "eval/knn_top1" in line]
    before = [score for step, score in knn if step <= 2 / 3 * knn[-1][0]]
    sure = lambda a, b: a > b + 0.01 and gap(a, b, *2 * [s.num_held_out])[0] > 0
    if len(knn) > 2 and before and sure(knn[-1][1], before[-1]):
        rise = f"{percent(before[-1])} to {percent(knn[-1][1])} %"
        found.append(f"eval/knn_top1 rose from {rise} in the last third")
    if knn and sure(most := max(score for _, score in knn), knn[-1][1]):
        step = next(step for step, score in knn if score == most)
        ended = f"{percent(knn[-1][1])} %, below the {percent(most)} % of step {step}"
        found.append(f"eval/knn_top1 ended at {ended}")
    ours, random = s.best("linear", "target"), s.best("linear", "random_init")
    if ours and random and not (compared := comparison(ours, random))[0]:
        found.append(f"linear, trained against random-init: {compared[1]}")
    return [f"*Because: {rule}.*" for rule in found]


EXPECTED = {
    "What was reached": reached,
    "Configuration": configuration,
    "Parameters": parameters,
    "Speed and memory": speed,
    "Loss": loss,
    "Schedules": schedules,
    "Collapse indicators": collapse,
    "Warnings": warnings,
    "Probes": probes,
    "What it sees": look,
    "Features": features,
    "Checkpoints": checkpoints,
    "Next steps": next_steps,
}


def problems(report: str, sources: Sources) -> list[str]:
    """What of the report is not so, or not traced; empty where all is well."""
    sections, found = read_sections(report), []
    absent = {"Features"} if sources.saved is None else set()
    absent |= set() if sources.probes else {"Probes"}
    if differing := (EXPECTED.keys() - absent) ^ sections.keys():
        found.append(f"sections differ: {sorted(differing)}")
    for heading in EXPECTED.keys() & sections.keys():
        rest = re.sub(r"^!\[\D*\]\(figures/\D+\.png\)$", "", sections[heading], flags=re.M)
        for part in EXPECTED[heading](sources):
            pattern = re.compile(re.escape(part)) if isinstance(part, str) else part
            rest, count = pattern.subn("", rest, count=1)
            if not count:
                found.append(f"{heading}: not found: {pattern.pattern}")
        for word in WORDS:
            rest = rest.replace(word, "")
        found += [f"{heading}: not traced: {text}" for text in re.findall(r".*\d.*", rest)]
    return found
