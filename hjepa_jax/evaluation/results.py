"""Rows of results: as tables for people, as probe.json for programs, as scalars for TensorBoard."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hjepa_jax.errors import InputError
from hjepa_jax.whole_files import one_at_a_time, replacing

Row = dict[str, Any]

# What tells two results apart; rows that agree in all of these replace each other in probe.json.
IDENTITY = (
    "protocol", "encoder", "level", "pool", "dim", "labels", "step", "seed", "data", "num_layers",
    "data_fingerprint",
)  # fmt: skip
# Those of them that a table has no column for, unless its rows differ in one.
RARE = ("data", "seed", "num_layers")
QUALITY_COLUMNS = ("relative_std", "effective_rank", "rankme", "alpha_req", "uniformity", "lidar")


def column(row: Row) -> str:
    """Heading under which a row's score stands: "linear", "lowshot 5", "fewshot 1"."""
    return f"{row['protocol']} {row['labels']}" if row.get("labels") else row["protocol"]


def format_row(row: Row) -> str:
    """One result in words, for a line while the next is being computed."""
    where = f"{row['encoder']} {row['pool']} level {row['level']}"
    if row["protocol"] == "quality":
        score = f"rank {row['effective_rank']:.1f} of {row['max_rank']}: {row['verdict']}"
    else:
        score = f"{100 * row['top1']:6.2f} %{_spread(row)}"
    return f"{column(row):<20} {where:<32} {score}"


def _spread(row: Row) -> str:
    for name in ("top1_std", "interval"):
        if name in row:
            return f" +- {100 * row[name]:.2f}"
    return ""


def format_tables(rows: list[Row]) -> str:
    """Top-1 in percent, a line per encoder and representation; then the quality of each."""
    scored = [row for row in rows if "top1" in row]
    quality = [row for row in rows if row["protocol"] == "quality"]
    tables = [_format_scores(scored)] if scored else []
    tables += [_format_quality(quality)] if quality else []
    return "\n\n".join(tables)


def _format_scores(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column(row) for row in rows))
    widths = [max(8, len(name)) for name in columns]
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["encoder"], row["pool"], row["level"], row["dim"])
        cells.setdefault(key, {})[column(row)] = row["top1"]
    heads = "".join(f"  {name:>{w}}" for name, w in zip(columns, widths, strict=True))
    lines = [f"{'encoder':<12} {'pool':<8} {'level':>5} {'dim':>5}{heads}"]
    for (encoder, pool, level, dim), scores in cells.items():
        values = "".join(
            f"  {100 * scores[name]:>{w}.2f}" if name in scores else "  " + " " * w
            for name, w in zip(columns, widths, strict=True)
        )
        lines.append(f"{encoder:<12} {pool:<8} {level!s:>5} {dim:>5}{values}")
    return "\n".join(lines)


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
    """Mean and standard deviation of the same result over several runs, one line each."""
    scores: dict[tuple[Any, ...], list[float]] = {}
    for row in (row for rows in runs for row in rows if "top1" in row):
        key = (column(row), row["encoder"], row["pool"], row["level"])
        scores.setdefault(key, []).append(row["top1"])
    lines = [f"over {len(runs)} runs, top-1 in percent (mean +- standard deviation):"]
    for (name, encoder, pool, level), values in scores.items():
        std = np.std(values, ddof=1) if len(values) > 1 else float("nan")
        where = f"{encoder} {pool} level {level}"
        mean = 100 * np.mean(values)
        lines.append(f"{name:<20} {where:<32} {mean:6.2f} +- {100 * std:.2f}  ({len(values)} runs)")
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


def best_score(rows: list[Row], protocol: str, encoder: str) -> float | None:
    """Top-1 of the features that were best on held-out training images; None where not judged.

    Of several checkpoints the newest counts.

    Args:
      rows: on one data set.
      protocol: "linear" or "knn".
      encoder: whose features.
    """
    scores = [
        (row["step"], row["chosen"]["val_top1"], row["top1"])
        for row in rows
        if row["protocol"] == protocol and row["encoder"] == encoder
    ]
    return max(scores)[2] if scores else None


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
