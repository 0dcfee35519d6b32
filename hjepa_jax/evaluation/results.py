"""Rows of results: as tables for people, as probe.json for programs, as scalars for TensorBoard."""

import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.intervals import difference, wilson
from hjepa_jax.whole_files import one_at_a_time, replacing

Row = dict[str, Any]

# What tells two results apart; rows that agree in all of these replace each other in probe.json.
IDENTITY = (
    "protocol", "encoder", "level", "pool", "dim", "labels", "step", "seed", "data", "num_layers",
    "data_fingerprint",
)  # fmt: skip
# Those of them that a table has no column for, unless its rows differ in one.
RARE = ("data", "seed", "num_layers")
# Order of features that were equally good on held-out images; see `best_row`.
_POOLS = ("mean", "summary", "concat")
QUALITY_COLUMNS = ("relative_std", "effective_rank", "rankme", "alpha_req", "uniformity", "lidar")


def column(row: Row) -> str:
    """Heading under which a row's score stands: "linear", "lowshot 5", "fewshot 1"."""
    return f"{row['protocol']} {row['labels']}" if row.get("labels") else row["protocol"]


def format_row(row: Row) -> str:
    """One result in words, for a line while the next is being computed."""
    if row["protocol"] == "quality":
        score = f"rank {row['effective_rank']:.1f} of {row['max_rank']}: {row['verdict']}"
    else:
        score = f"{100 * row['top1']:6.2f} %{_spread(row)}"
    return "\n".join([f"{column(row):<20} {_where(row):<32} {score}", *warnings([row])])


def _where(row: Row) -> str:
    return f"{row['encoder']} {row['pool']} level {row['level']}"


def _spread(row: Row) -> str:
    for name in ("top1_std", "interval"):
        if name in row:
            return f" +- {100 * row[name]:.2f}"
    return ""


def format_score(row: Row) -> str:
    """Top-1 in percent with its 95 % interval: "61.30 (59.1-63.4)"."""
    return f"{100 * row['top1']:.2f}{_interval(row)}"


def _interval(row: Row) -> str:
    """The 95 % interval in brackets; empty if the row does not say how many images there were."""
    if "interval" in row:  # of episodes, few-shot's own
        ends = (row["top1"] - row["interval"], row["top1"] + row["interval"])
    elif row.get("test_size"):
        ends = wilson(row["top1"], row["test_size"])
    else:
        return ""
    low, high = (100 * min(max(end, 0.0), 1.0) for end in ends)
    return f" ({low:.1f}-{high:.1f})"


def tested_on(rows: Sequence[Row]) -> str:
    """The numbers of test images behind the rows: "2,000 test images"."""
    sizes = sorted({row["test_size"] for row in rows if row.get("test_size")})
    many = " or ".join(f"{size:,}" for size in sizes) or "an unknown number of"
    return f"{many} test image{'' if sizes == [1] else 's'}"


def format_tables(rows: list[Row]) -> str:
    """Top-1 in percent, a line per encoder and representation; then the quality of each."""
    scored = [row for row in rows if "top1" in row]
    quality = [row for row in rows if row["protocol"] == "quality"]
    tables = [_format_scores(scored)] if scored else []
    tables += [_format_quality(quality)] if quality else []
    return "\n\n".join(tables)


def _format_scores(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column(row) for row in rows))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["encoder"], row["pool"], row["level"], row["dim"])
        cells.setdefault(key, {})[column(row)] = format_score(row)
    widths = [max(map(len, [name, *(c.get(name, "") for c in cells.values())])) for name in columns]
    heads = "".join(f"  {name:>{w}}" for name, w in zip(columns, widths, strict=True))
    lines = [
        f"top-1 in percent on {tested_on(rows)} (with its 95 % interval)",
        f"{'encoder':<12} {'pool':<8} {'level':>5} {'dim':>5}{heads}",
    ]
    for (encoder, pool, level, dim), scores in cells.items():
        values = "".join(
            f"  {scores.get(name, ''):>{w}}" for name, w in zip(columns, widths, strict=True)
        )
        lines.append(f"{encoder:<12} {pool:<8} {level!s:>5} {dim:>5}{values}")
    return "\n".join([*lines, *warnings(rows)])


def warnings(rows: Sequence[Row]) -> list[str]:
    """A line for each row whose best setting is an end of those tried, or that did not converge."""
    found = []
    for row in rows:
        notes = list(row.get("at_edge", ()))
        if row.get("converged") is False:
            notes.append("the fit did not converge")
        found += [f"{column(row)}, {_where(row)}: {note}" for note in notes]
    return found


def _format_quality(rows: list[Row]) -> str:
    heads = "".join(f" {name:>14}" for name in QUALITY_COLUMNS)
    lines = [f"{'encoder':<12} {'pool':<8} {'level':>5} {'dim':>5}{heads}  verdict"]
    for row in rows:
        values = "".join(
            f" {row[name]:>14.3f}" if row.get(name) is not None else f" {'-':>14}"
            for name in QUALITY_COLUMNS
        )
        start = f"{row['encoder']:<12} {row['pool']:<8} {row['level']!s:>5} {row['dim']:>5}"
        lines.append(f"{start}{values}  {row['verdict']}")
    return "\n".join(lines)


def format_seeds(runs: list[list[Row]]) -> str:
    """Mean and standard deviation of the same result over several runs, one line each.

    Rows count as the same result if they agree in all of `IDENTITY`, but for the fingerprint of the
    images (`shapes` are other ones for each seed), and in the numbers of images.
    Of rows that agree within one run, the last counts.
    """
    identity = (name for name in IDENTITY if name != "data_fingerprint")
    names = (*identity, "train_size", "test_size")
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


def read_probe_json(path: pathlib.Path) -> list[Row]:
    """The rows of a probe.json; none where there is no such file, or it is none.

    If a data set has changed, rows about its images as they were before are left out.
    """
    try:
        rows = _read_rows(path)
    except (OSError, ValueError):
        return []
    return [row for row in rows if _is_current(row, _newest_images(rows))]


def may_be_of(row: Row, data: str, images: str) -> bool:
    """Whether a row does not contradict that its data set `data` has the fingerprint `images`.

    Rows of older versions name no fingerprint.
    """
    return row["data"] != data or row.get("data_fingerprint") in (None, images)


def _is_current(row: Row, newest: dict[str, str]) -> bool:
    data = row["data"]
    return data not in newest or may_be_of(row, data, newest[data])


def _newest_images(rows: Iterable[Row]) -> dict[str, str]:
    """For each data set the fingerprint that its last row names."""
    return {row["data"]: row["data_fingerprint"] for row in rows if row.get("data_fingerprint")}


def _read_rows(path: pathlib.Path) -> list[Row]:
    """Raises OSError when the file cannot be read, ValueError when it is no probe.json."""
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)["results"]
        if isinstance(rows, list) and all(map(_is_complete, rows)):
            return rows
    except (LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("not the rows of results")


def _is_complete(row: Row) -> bool:
    """Whether a row has what tables and verdicts are made of."""
    needed = {"protocol", "encoder", "step", "pool", "level", "dim", "data"}
    if not needed <= row.keys():
        return False
    if row["protocol"] == "quality":
        return "verdict" in row
    scores = [row["top1"]]
    if row["protocol"] in ("linear", "knn"):
        scores.append(row["chosen"]["val_top1"])
    return all(0 <= score <= 1 for score in scores)


def rows_to_add_to(path: pathlib.Path) -> list[Row]:
    """The rows of a probe.json that may be written; none where there is no such file.

    Raises:
      InputError: when what is there is no probe.json ("probe.json", or what the file is called).
      OSError: when it cannot be read.
    """
    try:
        return _read_rows(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        rule = f"must hold results, as this program writes them ({error}); move it away"
        raise InputError(path.name, str(path), rule) from error


def write_probe_json(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Adds rows to {"results": rows}, in place of older rows of the same identity; whole or not.

    Rows about a data set as it was before it changed stay, and come first. Processes that add to
    one file wait for each other.

    Raises:
      InputError: see `rows_to_add_to`.
      OSError: when it cannot be read or written.
    """
    with one_at_a_time(path.parent):
        every = (*rows_to_add_to(path), *rows)
        merged: dict[tuple[str, ...], Row] = {}
        for row in every:
            if row.get("data_fingerprint"):  # it replaces a row of an older version
                merged.pop(_identity({**row, "data_fingerprint": None}), None)
            merged[_identity(row)] = row
        newest = _newest_images(every)
        ordered = sorted(merged.values(), key=lambda row: _is_current(row, newest))
        text = json.dumps({"results": ordered}, indent=1, allow_nan=False)
        with replacing(path) as file:
            file.write(f"{text}\n".encode())


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in IDENTITY)


def rows_on(data: str, rows: Iterable[Row]) -> list[Row]:
    """Those on one data set, such as the run's own, with the seed of the first of them.

    Seeds hold out other images: scores that they choose do not compare.
    """
    found = [row for row in rows if row.get("data") == data]
    return [row for row in found if row.get("seed") == found[0].get("seed")]


def differing(rows: Sequence[Row]) -> list[str]:
    """Which of `RARE` the rows differ in: without these two results would look like one."""
    return [name for name in RARE if len({str(row.get(name)) for row in rows}) > 1]


def scalars(rows: list[Row], *, group: str = "probe") -> dict[str, float]:
    """Scores by name, for TensorBoard: "probe/linear/target_mean_level_0"."""
    found = {}
    for row in rows:
        where = f"{row['encoder']}_{row['pool']}_level_{row['level']}"
        name = column(row).replace(" ", "_").replace("%", "percent")
        if "top1" in row:
            found[f"{group}/{name}/{where}"] = row["top1"]
        else:
            found |= {
                f"{group}/{metric}/{where}": row[metric]
                for metric in QUALITY_COLUMNS
                if row.get(metric) is not None
            }
    return found


def best_row(rows: Iterable[Row], protocol: str, encoder: str) -> Row | None:
    """The row of the features that were best on held-out training images; None if not judged.

    Of several checkpoints the newest counts. Features that are equally good there are told apart
    by what they are, never by their test score: the fewer dimensions, then "mean" before
    "summary" before "concat", then the finer level, then the features of fewer blocks.

    Args:
      rows: on one data set.
      protocol: "linear" or "knn".
      encoder: whose features.
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
    """Whether `ours` is better than `theirs` by more than `margin`, with the numbers that say so.

    Args:
      ours: a row of results.
      theirs: the row to compare it with.
      margin: of top-1, fraction in [0, 1].

    Returns:
      True if the whole 95 % interval of the difference lies above the margin; False if the
      difference itself does not; None if the test images are too few to tell, or if a row does not
      say how many there were.
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
    """The best score of each encoder in one line, for the box at the end of a run."""
    encoders = ("target", "random_init", "pixels")
    best = [row for encoder in encoders if (row := best_row(rows, protocol, encoder))]
    if not best:
        return None
    # Their 95 % intervals are in the table above the box, which fits a terminal of 80 columns.
    return ", ".join(
        f"{row['encoder'].replace('_', '-')} {100 * row['top1']:.1f} %" for row in best
    )


def headline_scores(rows: list[Row]) -> dict[str, float]:
    """eval/linear_top1 (all levels) and eval/linear_top1_level_{l} of the target encoder."""
    scores = {}
    for row in rows:
        if (row["encoder"], row["protocol"], row["pool"]) != ("target", "linear", "mean"):
            continue
        name = "eval/linear_top1"
        if row["level"] == "all":
            scores[name] = row["top1"]
        else:
            scores[f"{name}_level_{row['level']}"] = row["top1"]
    scores.setdefault("eval/linear_top1", scores.get("eval/linear_top1_level_0", float("nan")))
    return scores
