"""Reads and writes `probe.json`, the rows of results of a work directory."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from hjepa_jax.errors import InputError
from hjepa_jax.runtime.files import one_at_a_time, replacing

Row = dict[str, Any]

# The identity of a result. A new row replaces an old one if they agree in all of these.
IDENTITY = (
    "protocol", "encoder", "level", "pool", "dim", "labels", "step", "seed", "data", "num_layers",
    "data_fingerprint",
)  # fmt: skip


def read_probe_json(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a probe.json; none if there is no valid file.

    If a data set has changed, rows about its old images are left out.
    """
    try:
        rows = _read_rows(path)
    except (OSError, ValueError):
        return []
    return [row for row in rows if _is_current(row, _newest_images(rows))]


def may_be_of(row: Row, data: str, images: str) -> bool:
    """Returns whether a row is about another data set, or about these images of `data`."""
    return row["data"] != data or row.get("data_fingerprint") == images


def _is_current(row: Row, newest: dict[str, str]) -> bool:
    data = row["data"]
    return data not in newest or may_be_of(row, data, newest[data])


def _newest_images(rows: Iterable[Row]) -> dict[str, str]:
    """Returns the fingerprint in the last row of each data set."""
    return {row["data"]: row["data_fingerprint"] for row in rows if row.get("data_fingerprint")}


def _read_rows(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a probe.json.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is no probe.json.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)["results"]
        if isinstance(rows, list) and all(map(_is_complete, rows)):
            return rows
    except (LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("not the rows of results")


def _is_complete(row: Row) -> bool:
    """Returns whether a row has everything that tables and verdicts need."""
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
    """Returns the rows of a probe.json that is about to be written; none if there is no file.

    Raises:
      InputError: if the file holds no results (the field is the name of the file).
      OSError: if it cannot be read.
    """
    try:
        return _read_rows(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        rule = f"must hold results, as this program writes them ({error}); move it away"
        raise InputError(path.name, str(path), rule) from error


def write_probe_json(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Adds rows to a probe.json, {"results": rows}; they replace rows with the same identity.

    Rows about old images of a data set stay, and come first. The file is replaced atomically.
    Processes that add to the same file wait for each other.

    Raises:
      InputError: see `rows_to_add_to`.
      OSError: if it cannot be read or written.
    """
    with one_at_a_time(path.parent):
        every = (*rows_to_add_to(path), *rows)
        merged = {tuple(str(row.get(name)) for name in IDENTITY): row for row in every}
        newest = _newest_images(every)
        ordered = sorted(merged.values(), key=lambda row: _is_current(row, newest))
        text = json.dumps({"results": ordered}, indent=1, allow_nan=False)
        with replacing(path) as file:
            file.write(f"{text}\n".encode())


def rows_on(data: str, rows: Iterable[Row]) -> list[Row]:
    """Returns the rows on one data set that have the same seed as the first such row.

    Each seed holds out other images, so scores of different seeds are not comparable.
    """
    found = [row for row in rows if row.get("data") == data]
    return [row for row in found if row.get("seed") == found[0].get("seed")]


def steps_if_outdated(rows: Iterable[Row], protocol: str, last_step: int) -> str:
    """Returns "step N of M" if the run has made more steps since its newest score; else "".

    Args:
      rows: results on one data set.
      protocol: name of the probe.
      last_step: M, the newest step of the run.
    """
    wanted = ("target", protocol)
    scored = [row["step"] for row in rows if (row["encoder"], row["protocol"]) == wanted]
    newest = max(scored, default=last_step)
    return f"step {newest} of {last_step}" if newest < last_step else ""
