"""Rows of results, compared and displayed: tables, scalars for TensorBoard, the best row.

`runs.scores` defines rows and stores them in probe.json.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hjepa_jax.evaluation.intervals import difference, wilson
from hjepa_jax.runs.scores import IDENTITY, Row

# Fields of a row that get a column only if the rows of a table differ in them.
RARE = ("data", "seed", "num_layers")
# Preference among features with equal held-out scores; see `best_row`.
_POOLS = ("mean", "summary", "concat")
# Names of encoders in tables, in the order of the rows.
ENCODERS = {
    "target": "trained", "online": "online", "random_init": "random-init", "pixels": "raw pixels",
}  # fmt: skip
SCORE_COLUMNS = 2  # in 80 characters
QUALITY_COLUMNS = ("relative_std", "effective_rank", "rankme", "alpha_req", "uniformity", "lidar")


def column(row: Row) -> str:
    """Returns the column heading for a row's score: "linear", "lowshot 5 per class"."""
    return f"{row['protocol']} {row['labels']}" if row.get("labels") else row["protocol"]


def encoder_name(encoder: str) -> str:
    """Returns the name of an encoder in tables: "trained" for "target"."""
    return ENCODERS.get(encoder, encoder)


def _where(row: Row) -> str:
    return f"{encoder_name(row['encoder'])} {row['pool']} level {row['level']}"


def format_score(row: Row) -> str:
    """Returns top-1 in percent with its 95 % interval: "61.30 (59.1-63.4)"."""
    return f"{100 * row['top1']:.2f}{_interval(row)}"


def _interval(row: Row) -> str:
    """Returns the 95 % interval in brackets; "" if the number of test images is unknown."""
    if "interval" in row:  # few-shot: over episodes
        ends = (row["top1"] - row["interval"], row["top1"] + row["interval"])
    elif row.get("test_size"):
        ends = wilson(row["top1"], row["test_size"])
    else:
        return ""
    low, high = (100 * min(max(end, 0.0), 1.0) for end in ends)
    return f" ({low:.1f}-{high:.1f})"


def tested_on(rows: Sequence[Row]) -> str:
    """Returns the number of test images of the rows: "2,000 test images"."""
    sizes = sorted({row["test_size"] for row in rows if row.get("test_size")})
    many = " or ".join(f"{size:,}" for size in sizes) or "an unknown number of"
    return f"{many} test image{'' if sizes == [1] else 's'}"


def format_tables(rows: list[Row]) -> str:
    """Returns tables of top-1 in percent and of quality, one line per representation."""
    scored = [row for row in rows if "top1" in row]
    quality = [row for row in rows if row["protocol"] == "quality"]
    tables = [_format_scores(scored)] if scored else []
    tables += [_format_quality(quality)] if quality else []
    return "\n\n".join(tables)


def scores_by(rows: Sequence[Row], where: Sequence[str]) -> dict[tuple[Any, ...], dict[str, str]]:
    """Returns formatted scores by column heading, for each combination of the fields `where`."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault(tuple(map(row.get, where)), {})[column(row)] = format_score(row)
    return cells


def _format_scores(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column(row) for row in rows))
    cells = scores_by(trained_first(rows), ("encoder", "pool", "level", "dim"))
    chances = {row["chance"] for row in rows if "chance" in row}
    lines = [f"top-1 in percent on {tested_on(rows)} (with its 95 % interval)"]
    if len(chances) == 1:
        lines.append(f"chance: {100 * chances.pop():.1f} (always the most frequent class)")
    for start in range(0, len(columns), SCORE_COLUMNS):
        names = columns[start : start + SCORE_COLUMNS]
        widths = [max(len(name), *(len(c.get(name, "")) for c in cells.values())) for name in names]
        heads = "".join(f"  {name:>{w}}" for name, w in zip(names, widths, strict=True))
        lines += [""] * bool(start) + [
            f"  {'encoder':<11} {'pool':<8} {'level':>5} {'dim':>5}{heads}"
        ]
        for (encoder, pool, level, dim), scores in cells.items():
            values = (f"  {scores.get(n, ''):>{w}}" for n, w in zip(names, widths, strict=True))
            lines.append(f"{_start(encoder)} {pool:<8} {level!s:>5} {dim:>5}{''.join(values)}")
    notes = [textwrap.fill(text, 80, subsequent_indent="  ") for text in warnings(rows)]
    return "\n".join([*lines, *notes])


def trained_first(rows: Iterable[Row]) -> list[Row]:
    """Returns rows in the order of `ENCODERS`."""
    order = [*ENCODERS]
    return sorted(rows, key=lambda row: order.index(row["encoder"]))


def _start(encoder: str) -> str:
    """Returns the first column of a table; a mark precedes the trained encoder."""
    return f"{'>' if encoder == 'target' else ' '} {encoder_name(encoder):<11}"


def warnings(rows: Sequence[Row]) -> list[str]:
    """Returns one line per row with a setting at an end of its grid, or without convergence."""
    found = []
    for row in rows:
        notes = list(row.get("at_edge", ()))
        if row.get("converged") is False:
            notes.append("the fit did not converge")
        found += [f"{column(row)}, {_where(row)}: {note}" for note in notes]
    return found


def _format_quality(rows: list[Row]) -> str:
    heads = "".join(f" {n:>6}" for n in ("std", "rank", "RankMe", "alpha", "unif", "LiDAR"))
    lines = [f"  {'encoder':<11} {'pool':<8} {'level':>5}{heads}  verdict"]
    for row in trained_first(rows):
        values = "".join(
            f" {'-' if (value := row.get(name)) is None else _six(value):>6}"
            for name in QUALITY_COLUMNS
        )
        verdict = verdict_of(row).partition(" ")[0]  # "partial" for "partial collapse"
        start = f"{_start(row['encoder'])} {row['pool']:<8} {row['level']!s:>5}"
        lines.append(f"{start}{values}  {verdict}")
    return "\n".join(lines)


def _six(value: float) -> str:
    """Returns a number in six characters, unless it is huge."""
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def verdict_of(row: Row) -> str:
    """Returns the verdict on trained features; "baseline" for the encoders of comparison."""
    return row["verdict"] if row["encoder"] in ("target", "online") else "baseline"


def format_seeds(runs: list[list[Row]], *, any_step: bool = False) -> str:
    """Returns mean and standard deviation of each result over several runs, one line each.

    Rows are the same result if they agree in `IDENTITY` and in the numbers of images. The
    fingerprint of the images may differ, because `shapes` depends on the seed. If rows of one run
    agree, the last one counts.

    Args:
      runs: the rows of each run.
      any_step: whether the checkpoints of the runs may have different steps.
    """
    ignored = {"data_fingerprint", "step"} if any_step else {"data_fingerprint"}
    names = (*(name for name in IDENTITY if name not in ignored), "train_size", "test_size")
    scores: dict[tuple[str, ...], dict[int, Row]] = {}
    for number, rows in enumerate(runs):
        for row in rows:
            if "top1" in row:
                key = tuple(str(row.get(name)) for name in names)
                scores.setdefault(key, {})[number] = row
    groups = [list(by_run.values()) for by_run in scores.values()]
    shown = {"protocol", "labels", "encoder", "pool", "level"}  # in every line
    rest = [i for i, name in enumerate(names) if name not in shown]
    lines = [f"over {len(runs)} runs, top-1 in percent (mean +- standard deviation):"]
    for key, rows in zip(scores, groups, strict=True):
        first, values = rows[0], [row["top1"] for row in rows]
        label = (column(first), _where(first))
        alike = [k for k, g in zip(scores, groups, strict=True) if
                 (column(g[0]), _where(g[0])) == label]  # fmt: skip
        more = [f"{names[i]} {key[i]}" for i in rest if len({k[i] for k in alike}) > 1]
        spread = f" +- {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        count = f"{len(values)} run{'s' if len(values) > 1 else ''}"
        lines.append(
            f"{label[0]:<20} {label[1]:<32} {100 * np.mean(values):6.2f}{spread}  "
            f"({', '.join([count, *more])})"
        )
    return "\n".join(lines)


def differing(rows: Sequence[Row]) -> list[str]:
    """Returns the fields of `RARE` in which the rows differ."""
    return [name for name in RARE if len({str(row.get(name)) for row in rows}) > 1]


def scalars(rows: list[Row], *, group: str = "probe") -> dict[str, float]:
    """Returns the best score of each encoder for TensorBoard: "probe/linear_trained"."""
    return {
        f"{group}/{protocol}_{encoder_name(encoder).replace(' ', '_')}": best["top1"]
        for protocol in ("linear", "knn")
        for encoder in ENCODERS
        if (best := best_row(rows, protocol, encoder))
    }


def best_row(rows: Iterable[Row], protocol: str, encoder: str) -> Row | None:
    """Returns the row with the best held-out score, on the newest checkpoint; None without rows.

    Test scores do not decide, not even between equal held-out scores. These are ordered by fewer
    dimensions, then "mean" before "summary" before "concat", then finer level, then fewer blocks.
    """
    judged = [row for row in rows if (row["protocol"], row["encoder"]) == (protocol, encoder)]
    return min(judged, key=_preference, default=None)


def _preference(row: Row) -> tuple[Any, ...]:
    pool, level = str(row["pool"]), str(row["level"])
    return (
        -row["step"],
        -row["chosen"]["val_top1"],
        row["dim"],
        _POOLS.index(pool) if pool in _POOLS else len(_POOLS),
        int(level) if level.isdecimal() else math.inf,
        row.get("num_layers") or 1,
        str(row.get("seed")),
        pool,
        level,
    )


def beats(ours: Row, theirs: Row, margin: float) -> tuple[bool | None, str]:
    """Returns whether `ours` beats `theirs` by more than `margin`, and the numbers.

    `margin` is a difference of top-1, a fraction in [0, 1].

    Returns:
      True if the whole 95 % interval of the difference is above the margin, False if the difference
      is not, None if the test images are too few to decide, or their number is unknown.
    """
    gap = ours["top1"] - theirs["top1"]
    evidence = f"{100 * ours['top1']:.2f} against {100 * theirs['top1']:.2f} %"
    num_ours, num_theirs = ours.get("test_size"), theirs.get("test_size")
    if not num_ours or not num_theirs:
        return (False if gap <= margin else None), f"{evidence}, number of test images unknown"
    low, high = difference(ours["top1"], theirs["top1"], num_ours, num_theirs)
    evidence += (
        f" on {tested_on([ours, theirs])}: {100 * gap:+.2f} points, "
        f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    )
    return (True if low > margin else False if gap <= margin else None), evidence


def format_best(rows: Sequence[Row], protocol: str) -> str | None:
    """Returns the best score of each encoder in one line, for the end of a run."""
    encoders = ("target", "random_init", "pixels")
    best = [row for encoder in encoders if (row := best_row(rows, protocol, encoder))]
    if not best:
        return None
    # Without 95 % intervals, so that the line fits 80 columns. The table above has them.
    return ", ".join(f"{encoder_name(row['encoder'])} {100 * row['top1']:.1f} %" for row in best)


def headline_scores(rows: list[Row]) -> dict[str, float]:
    """Returns eval/linear_top1 (all levels) and eval/linear_top1_level_{l}, target encoder."""
    scores = {}
    for row in rows:
        if (row["encoder"], row["protocol"], row["pool"]) != ("target", "linear", "mean"):
            continue
        name = "eval/linear_top1"
        if row["level"] == "all":
            scores[name] = row["top1"]
        else:
            scores[f"{name}_level_{row['level']}"] = row["top1"]
    if scores:  # without labels there are none
        scores.setdefault("eval/linear_top1", scores.get("eval/linear_top1_level_0", float("nan")))
    return scores
