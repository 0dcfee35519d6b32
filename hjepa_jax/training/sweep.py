"""Trains runs that differ in a few fields, one after the other, and compares them.

Runs are compared on held-out training images (`evaluation.held_out`). The test images are reserved
for the run that is finally chosen.
"""

import copy
import csv
import dataclasses
import io
import itertools
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import ttest_ind

from hjepa_jax.config import Config
from hjepa_jax.config.defaults import differing_fields
from hjepa_jax.config.fields import RULES, field_types
from hjepa_jax.config.validation import validate
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.evaluation.held_out import FILE, data_name, fitted_and_scored, held_out_rows
from hjepa_jax.evaluation.results import encoder_name
from hjepa_jax.runs.checkpoint_meta import read_newest_meta, read_saved
from hjepa_jax.runs.history import read_history
from hjepa_jax.runs.record import read_record
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.scores import Row, read_probe_json
from hjepa_jax.runs.seeds import differences
from hjepa_jax.runs.workdir import (
    checkpoint_sizes,
    load_config,
    with_recorded_start,
    writing,
)
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.paths import expand_paths
from hjepa_jax.training.train import train_and_evaluate

Changes = Mapping[str, Any]  # values by dotted field
START = "train.init_from"  # in a sweep it may also name an earlier row
ENCODERS, PROTOCOLS = ("target", "random_init", "pixels"), {"linear": "linear", "knn": "k-NN"}
SCORED = tuple(itertools.product(PROTOCOLS, ENCODERS))
POOL = "concat"  # the features that are scored
NAME, SCORE = 28, 13  # widths of the columns of names and scores, characters


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      row: name of its settings.
      seed: its seed.
      changes: its settings, as fields and values.
      config: its config.
      workdir: its directory.
    """

    row: str
    seed: int
    changes: Changes
    config: Config
    workdir: pathlib.Path


def grid(varied: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, Changes]:
    """Returns all combinations of the values of some fields, by a name such as "depth=3"."""
    short = [field.rpartition(".")[2] for field, _ in varied]
    names = [s if short.count(s) == 1 else f for s, (f, _) in zip(short, varied, strict=True)]
    found = {}
    for values in itertools.product(*(values for _, values in varied)):
        name = ",".join(f"{n}={v}" for n, v in zip(names, values, strict=True)).replace(" ", "")
        found[name] = dict(zip((field for field, _ in varied), values, strict=True))
    return found


def members(
    config: Config, rows: Mapping[str, Changes], seeds: Sequence[int], folder: pathlib.Path
) -> list[Member]:
    """Returns the runs of a sweep, seed after seed.

    Args:
      config: the config that all rows change.
      rows: changes by the name of a row. `train.init_from` may name an earlier row: the run starts
        from the parameters of its run with the same seed.
      seeds: values of `seed`.
      folder: receives a work directory for each run.

    Raises:
      InputError: a config is invalid, or two runs would have the same directory ("--workdir").
    """
    found: dict[pathlib.Path, Member] = {}
    for seed in seeds:
        before: dict[str, str] = {}
        for row, changes in rows.items():
            own = copy.deepcopy(config)  # keeps the types of fields
            own.eval.probe_at_end = own.log.report = False
            start = {START: before[changes[START]]} if changes.get(START) in before else {}
            for field, value in {**changes, **start, "seed": seed}.items():
                _set(own, field, value)
            validate(own)
            name = re.sub(r"[()' ]", "", f"{row or 'run'},seed={seed}")
            workdir = folder / re.sub(r"[^\w.,=+-]+", "_", name)
            if workdir in found:
                rule = f"would hold two runs: {found[workdir].row}, and {row} with seed {seed}"
                raise InputError("--workdir", str(workdir), rule)
            before[row] = str(workdir)
            found[workdir] = Member(row, seed, changes, expand_paths(own.lock()), workdir)
    return list(found.values())


def _set(config: Config, field: str, value: Any) -> None:
    """Sets a field; raises InputError for a value of another type."""
    try:
        config.update_from_flattened_dict({field: value})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        known = field_types(config)
        rule = RULES[known[field]] if field in known else "is not a field of a config"
        raise InputError(field, value, rule) from error


def state_of(member: Member, num_fit: int | None) -> str:
    """Returns "done", "to do", "step N of M", "to score" or "holds another config"."""
    workdir, record = member.workdir, read_record(member.workdir)
    steps = max(checkpoint_sizes(workdir), default=0)
    if not steps or record is None:
        return "to do"
    config = with_recorded_start(member.config, workdir, read_saved(workdir))
    if differing_fields(load_config(workdir), config):
        return "holds another config"
    if steps < record.num_steps:
        return f"step {steps} of {record.num_steps}"
    return "done" if rows_of(member, num_fit).keys() == {*SCORED} else "to score"


def rows_of(member: Member, num_fit: int | None) -> dict[tuple[str, str], Row]:
    """Returns the scores of a run's newest checkpoint, by protocol and encoder.

    Scores of other features, images or numbers of images are omitted.
    """
    config, newest = member.config, max(checkpoint_sizes(member.workdir), default=0)
    made_of = {
        "pool": POOL,
        "data": data_name(config),
        "num_val": config.eval.num_val,
        "num_fit": num_fit,
    }
    return {
        (row["protocol"], row["encoder"]): row
        for row in read_probe_json(member.workdir / FILE)
        if made_of.items() <= row.items()
        and row["step"] == (newest if row["encoder"] == "target" else 0)
    }


def run_sweep(runs: Sequence[Member], num_fit: int | None, say: Callable[[str], None]) -> list[str]:
    """Trains and scores the runs that are not done.

    If a run fails, the error is printed and the next run begins.

    Args:
      runs: the runs.
      num_fit: maximum number of images that probes fit; None = all that are not scored.
      say: prints a line.

    Returns:
      The names of the runs that failed.

    Raises:
      InputError: if the images have no labels ("data.source"), or too few are fitted ("--num_fit").
      Interrupted: on a signal, after saving.
    """
    for member in {(m.config.data.source, m.config.eval.data): m for m in runs}.values():
        _check_labels(member.config, num_fit)
    failed = []
    for number, member in enumerate(runs, start=1):
        name = f"{member.row} seed {member.seed}".strip()
        head = f"run {number} of {len(runs)}: {name}"
        try:
            if state_of(member, num_fit) == "done":
                say(f"{head}: done already")
                continue
            say(f"\n{head}")
            train_and_evaluate(member.config, member.workdir)
            baselines = member.workdir.parent / "baselines.json"
            held_out_rows(member.workdir, num_fit, pools=(POOL,), baselines=baselines)
        except (InputError, RuntimeError) as error:  # RuntimeError: out of device memory
            print(f"error: {first_line(error)}", file=sys.stderr, flush=True)
            failed.append(name)
        jax.clear_caches()  # frees memory; the cache on disk keeps what runs share
    return failed


def _check_labels(config: Config, num_fit: int | None) -> None:
    """Refuses images without classes, and too few images to fit, before hours of training."""
    source = open_config_source(config, source=config.eval.data, quiet=True)
    if len(source.info.class_names) < 2:
        rule = "has no classes, and runs are compared by probes; eval.data names labelled images"
        raise InputError("data.source", source.name, rule)
    if num_fit is not None:
        train, _ = source.load()
        fit, _ = fitted_and_scored(len(train.images), config.eval.num_val, num_fit)
        missing = np.setdiff1d(np.arange(len(source.info.class_names)), train.classes[fit])
        if len(missing):
            name = source.info.class_names[missing[0]]
            raise InputError("--num_fit", num_fit, f"leaves no image of class {name} to fit")


def format_sweep(runs: Sequence[Member], num_fit: int | None) -> str:
    """Returns a table for each protocol: a row for each setting, with mean and standard deviation.

    If runs of one row differ in more than the seed, each gets its own line without a mean. All runs
    must be done.
    """
    scores = {m.workdir: rows_of(m, num_fit) for m in runs}
    sizes = sorted({row["test_size"] for rows in scores.values() for row in rows.values()})

    def top1(member: Member, protocol: str, encoder: str) -> float:
        return 100 * scores[member.workdir][protocol, encoder]["top1"]

    images = " or ".join(f"{size:,}" for size in sizes)
    lines, notes, marked = [], list[str](), False
    for protocol, title in PROTOCOLS.items():
        heads = "".join(f"{encoder_name(encoder):>{SCORE}}" for encoder in ENCODERS)
        lines += [f"{title}, top-1 in percent on {images} held-out training images"]
        lines += [f"  {'row':<{NAME}}{'seeds':>6}{heads}"]
        first = [top1(m, protocol, "target") for m in runs if m.row == runs[0].row]
        for name, group in _grouped(runs, notes):
            values = {e: [top1(member, protocol, e) for member in group] for e in ENCODERS}
            marks = _differs(values["target"], first)
            marked |= marks
            cells = [_mean(v) for v in values.values()]
            cells[0] = f"*{cells[0]}" if marks else cells[0]
            shown = [] if len(name) < NAME else [f"  {name}"]
            start = name if len(name) < NAME else ""
            row = "".join(f"{cell:>{SCORE}}" for cell in cells)
            lines += [*shown, f"  {start:<{NAME}}{len(group):>6}{row}"]
        lines.append("")
    lines.append("Features: all levels and summary tokens. +-: standard deviation over the seeds.")
    if marked:
        lines.append("*: differs from the first row (Welch's t-test, p < 0.05).")
    return "\n".join([*lines, *dict.fromkeys(notes)])


def _grouped(runs: Sequence[Member], notes: list[str]) -> Iterable[tuple[str, Sequence[Member]]]:
    """Yields the runs of each row, or each run alone if they differ in more than the seed."""
    for name in dict.fromkeys(member.row for member in runs):
        group = [member for member in runs if member.row == name]
        steps = [max(checkpoint_sizes(member.workdir)) for member in group]
        records = [read_record(member.workdir) for member in group]
        images = [record.fingerprint if record else None for record in records]
        configs = [_comparable_config(member) for member in group]
        if len(group) > 1 and (why := differences(configs, steps, images)):
            notes.append(f"no mean for {name}: {why}")
            for member in group:
                yield f"{name} seed {member.seed}".strip(), [member]
        else:
            yield name or "as configured", group


def _comparable_config(member: Member) -> Config:
    """Returns the recorded config of a run; if it starts from a row, with the name of that row."""
    config = load_config(member.workdir)
    if START in member.changes:
        _set(config, START, member.changes[START])
    return config


def _mean(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _differs(values: Sequence[float], others: Sequence[float]) -> bool:
    """Returns whether two means differ significantly; False for a single seed."""
    if min(len(values), len(others)) < 2 or values == others:
        return False
    test: Any = ttest_ind(values, others, equal_var=False)
    return bool(test.pvalue < 0.05)


def write_csv(runs: Sequence[Member], num_fit: int | None, path: pathlib.Path) -> None:
    """Writes a CSV line per run: settings, scores, rank, speed, origin. All runs must be done."""
    names = {"_".join(key): key for key in SCORED}
    heads = ["row", "seed", "settings", "num_fit", "step", *names, "effective_rank",
             "images_per_sec", "commit", "device", "workdir"]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for member in runs:
        scores = rows_of(member, num_fit)
        meta = read_newest_meta(member.workdir)
        history = read_history(member.workdir / "metrics.jsonl")
        speeds = history.series("perf/images_per_sec")[1]
        settings = " ".join(f"{field}={value}" for field, value in member.changes.items())
        writer.writerow([
            member.row, member.seed, settings, num_fit or "all",
            max(checkpoint_sizes(member.workdir)),
            *(f"{100 * scores[key]['top1']:.2f}" for key in names.values()),
            f"{history.last('train/effective_rank') or float('nan'):.1f}",
            f"{statistics.median(speeds) if len(speeds) else float('nan'):.0f}",
            meta["commit"] or "", meta["versions"]["device"], member.workdir,
        ])  # fmt: skip
    with writing(path.parent), replacing(path) as file:
        file.write(text.getvalue().encode())
