"""Rows of results on disk: `probe.json` of a work directory."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.files import one_at_a_time, replacing

Row = dict[str, Any]


# What tells two results apart; rows that agree in all of these replace each other in probe.json.
IDENTITY = (
    "protocol", "encoder", "level", "pool", "dim", "labels", "step", "seed", "data", "num_layers",
    "data_fingerprint",
)  # fmt: skip


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
