"""Trains runs that differ in a few fields, and compares them in a table.

  hjepa sweep shapes_tiny --vary=optim.learning_rate=1e-3,4e-3
    [--vary=FIELD=V1,V2 ...] [--seeds=0,1,2] [--workdir=DIR] [--num_fit=N]
    [--dry_run] [--config.FIELD=VALUE ...]

All combinations of the varied values are trained, one run after the other, each with each seed. The
same command resumes and leaves out what is done. Each run has a work directory in DIR. Scores are
taken on held-out training images, and no test image is read: `hjepa probe` judges the run that you
choose. A config file may have named rows, ROWS = {NAME: {FIELD: VALUE}}; --rows selects some.
"""

import ast
import re
import runpy
import shlex
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli
from hjepa_jax.command_line import config_path_of
from hjepa_jax.config.fields import MAX_NUMBER
from hjepa_jax.errors import InputError, Interrupted
from hjepa_jax.hints import config_types, did_you_mean, field_like
from hjepa_jax.runtime.paths import local_path

_CONFIG = cli.define_config()
_VARY = flags.DEFINE_multi_string("vary", [], "FIELD=V1,V2: a field and its values.")
_SEEDS = flags.DEFINE_list("seeds", None, "Values of seed (default: the config's).")
_ROWS = flags.DEFINE_list("rows", None, "Some of the rows of the config file (default: all).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Holds all runs (runs/sweep_<config name>).")
_NUM_FIT = flags.DEFINE_integer(
    "num_fit", None, "Images that probes fit at most (default: all but the held-out).", 5
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs; train and write nothing.")


def main() -> None:
    """Runs the command."""
    path = config_path_of(config_flags.get_config_filename(flags.FLAGS["config"]))
    default = f"runs/sweep_{cli.config_name(path)}"
    folder = local_path("--workdir", default if _WORKDIR.value is None else _WORKDIR.value)
    seeds = [_CONFIG.value.seed] if _SEEDS.value is None else _numbers(_SEEDS.value)

    from hjepa_jax.data.class_list import resolve_class_list
    from hjepa_jax.training import sweep

    resolve_class_list(_CONFIG.value, path)
    rows = _rows(_named_rows(path), [_values(text) for text in _VARY.value])
    runs = sweep.members(_CONFIG.value, rows, seeds, folder)
    if _DRY_RUN.value:
        lines = [(str(run.workdir), sweep.state_of(run, _NUM_FIT.value)) for run in runs]
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name:<{width}}  {state}" for name, state in lines))
        return
    try:
        failed = sweep.run_sweep(runs, _NUM_FIT.value, lambda text: print(text, flush=True))
    except Interrupted as stop:
        where = shlex.quote(str(folder))
        print(f"{stop}: saved in {where}; run the same command to go on", file=sys.stderr)
        sys.exit(stop.status)
    if done := [run for run in runs if sweep.state_of(run, _NUM_FIT.value) == "done"]:
        table, results = sweep.format_sweep(done, _NUM_FIT.value), folder / "sweep.csv"
        sweep.write_csv(done, _NUM_FIT.value, results)
        print(f"\n{table}\n\neach run: {results}\ncurves:   tensorboard --logdir {folder}")
    if failed:
        cli.fail(f"{len(failed)} of {len(runs)} runs failed, see above: {'; '.join(failed)}")


def _named_rows(path: str) -> dict[str, Any]:
    """Returns the rows of the config file that `--rows` selects; without ROWS one unnamed row."""
    from hjepa_jax.training import sweep

    rows = runpy.run_path(path.partition(":")[0]).get("ROWS", {"": {}})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise InputError("--config", path, "must have ROWS of the form {NAME: {FIELD: VALUE}}")
    for name in _ROWS.value or ():
        if name not in rows:
            raise InputError("--rows", name, f"must be some of {', '.join(rows)}")
    chosen = rows if _ROWS.value is None else {name: rows[name] for name in _ROWS.value}
    for name, changes in chosen.items():
        if (start := changes.get(sweep.START)) in rows.keys() - chosen.keys():
            raise InputError(
                "--rows", name, f"starts from the row {start}, which must be named too"
            )
    return chosen


def _rows(
    named: dict[str, dict[str, Any]], varied: list[tuple[str, list[Any]]]
) -> dict[str, dict[str, Any]]:
    """Returns each named row with each combination of the varied values."""
    from hjepa_jax.training import sweep

    fields = [field for field, _ in varied]
    for field in fields:
        if fields.count(field) > 1 or any(field in changes for changes in named.values()):
            raise InputError("--vary", field, "is given twice, or is a field of the config's ROWS")
    rows = {}
    for name, changes in named.items():
        for suffix, values in sweep.grid(varied).items():
            own = {**changes, **values}
            if (start := changes.get(sweep.START)) in named:
                own[sweep.START] = ",".join(filter(None, (start, suffix)))
            rows[",".join(filter(None, (name, suffix)))] = own
    return rows


def _numbers(texts: list[str]) -> list[int]:
    seeds = [int(text) if text.isdecimal() else -1 for text in texts]
    if len({*seeds}) < len(seeds) or not all(0 <= seed <= MAX_NUMBER for seed in seeds or [-1]):
        raise InputError("--seeds", ",".join(texts), "must be different whole numbers from 0 on")
    return seeds


def _values(text: str) -> tuple[str, list[Any]]:
    """Returns the field and the values of "FIELD=V1,V2"; tuples are written in parentheses."""
    field, _, values = text.partition("=")
    field = field.removeprefix("config.")
    if field not in (known := config_types()):
        hint = did_you_mean("", field_like(field))
        raise InputError("--vary", text, f"{field} is not a field of a config{hint}")
    found = [_value(known[field], part) for part in re.split(r",(?![^()]*\))", values)]
    if field == "seed" or not values or len({*map(repr, found)}) < len(found):
        rule = "must be FIELD=V1,V2 with different values; seeds are given by --seeds"
        raise InputError("--vary", text, rule)
    return field, found


def _value(kind: Any, text: str) -> Any:
    """Returns a value of a field; `validate` refuses other types later."""
    words = {"true": True, "false": False, "None": None} | ({} if kind is str else {"none": None})
    if text in words:
        return words[text]
    try:
        return float(ast.literal_eval(text)) if kind is float else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


if __name__ == "__main__":
    cli.run(main)
