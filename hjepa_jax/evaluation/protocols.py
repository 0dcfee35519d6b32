"""The evaluation protocol: which encoders, which features, which probes, and how to tell of it.

Every probe of the trained encoder stands beside the same probe of a randomly initialised encoder
and of the raw pixels: a number means little without the two.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hjepa_jax.data.sources import Split
from hjepa_jax.evaluation.features import EmbedFn, embed_pixels, extract_features, representations
from hjepa_jax.evaluation.knn import DEFAULT_KS, knn_probe
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.linear import DEFAULT_L2_GRID, linear_probe

PROTOCOLS = ("linear", "knn")
TRAINED_ENCODERS = ("target", "online")


def evaluate_encoders(
    embed: EmbedFn,
    encoders: dict[str, Any],
    train: Split,
    test: Split,
    *,
    num_classes: int,
    step: int,
    protocols: tuple[str, ...] = PROTOCOLS,
    num_val: int = 5000,
    seed: int = 0,
    batch_size: int = 256,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Runs every protocol on every representation of every encoder, and of the raw pixels.

    Args:
      embed: `embed(encoder_params, uint8 images)`, a dict of features by name.
      encoders: parameters by name: "target", "online", "random_init".
      train: the whole training set; the hold-out for choosing is taken from it.
      test: the test set, which is scored once per row.
      num_classes: number of classes.
      step: checkpoint step of the trained encoders.
      protocols: some of `PROTOCOLS`.
      num_val: training images on which hyper-parameters are chosen.
      seed: of that hold-out.
      batch_size: images per call of `embed`.
      report: called with each row as it is done.

    Returns:
      One row per result, with its whole protocol.
    """
    embed, rows = jax.jit(embed), []
    for encoder, params in {**encoders, "pixels": None}.items():
        fn = jax.jit(embed_pixels) if encoder == "pixels" else embed
        train_x, test_x = (
            representations(extract_features(fn, params, split.images, batch_size=batch_size))
            for split in (train, test)
        )
        for (pool, level, x), (_, _, y) in zip(train_x, test_x, strict=True):
            for protocol in protocols:
                scored = _score(
                    protocol, (x, train.labels, y, test.labels),
                    num_classes=num_classes, num_val=num_val, seed=seed,
                )  # fmt: skip
                row = {
                    "protocol": protocol,
                    "encoder": encoder,
                    "level": level,
                    "pool": pool,
                    "dim": x.shape[1],
                    **scored,
                    "step": step if encoder in TRAINED_ENCODERS else 0,
                    "seed": seed,
                    "train_size": len(train.labels),
                    "test_size": len(test.labels),
                }
                rows.append(row)
                report(row)
    return rows


def evaluate_and_write(workdir: pathlib.Path, *args: Any, **options: Any) -> list[dict[str, Any]]:
    """`evaluate_encoders`, told on the terminal row by row and as a table; writes probe.json."""
    options["report"] = lambda row: print(format_row(row), flush=True)
    rows = evaluate_encoders(*args, **options)
    print(format_table(rows))
    write_probe_json(workdir / "probe.json", rows)
    return rows


def _score(protocol: str, data: tuple[np.ndarray, ...], **options: Any) -> dict[str, Any]:
    if protocol == "linear":
        # Half of the penalties where the features are wide, raw pixels above all: time is D x G.
        grid = DEFAULT_L2_GRID[:: 1 if data[0].shape[1] <= 1024 else 2]
        result = linear_probe(*data, l2_grid=grid, **options)
        chosen = {"l2": result.chosen_l2}
    else:
        fit, _ = hold_out(len(data[0]), num_val=options["num_val"], seed=options["seed"])
        result = knn_probe(*data, ks=[k for k in DEFAULT_KS if k <= len(fit)], **options)
        chosen = {"k": result.chosen_k}
    return {"top1": result.top1, "chosen": {**chosen, "val_top1": max(result.val_top1)}}


def write_probe_json(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes {"results": rows}, whole or not at all."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def format_row(row: dict[str, Any]) -> str:
    """One result in words, for a line while the next is being computed."""
    where = f"{row['encoder']} {row['pool']} level {row['level']}"
    return f"{row['protocol']:<7} {where:<32} {100 * row['top1']:6.2f} %"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Top-1 in percent: a line per encoder and representation, a column per protocol."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["encoder"], row["pool"], row["level"], row["dim"])
        cells.setdefault(key, {})[row["protocol"]] = row["top1"]
    header = f"{'encoder':<12} {'pool':<8} {'level':>5} {'dim':>5}"
    lines = [header + "".join(f" {protocol:>8}" for protocol in protocols)]
    for (encoder, pool, level, dim), scores in cells.items():
        line = f"{encoder:<12} {pool:<8} {level!s:>5} {dim:>5}"
        values = (f"{100 * scores[p]:8.2f}" if p in scores else " " * 8 for p in protocols)
        lines.append(line + "".join(f" {value}" for value in values))
    return "\n".join(lines)


def headline_scores(rows: list[dict[str, Any]]) -> dict[str, float]:
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
