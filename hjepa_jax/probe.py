"""Evaluates the encoder of a run, or of several runs with different seeds.

  python -m hjepa_jax.probe DIR [DIR2 ...]
    [--protocols=linear,knn,lowshot,fewshot,quality,attentive,finetune]
    [--encoders=target,online,random_init] [--levels=all|0,1]
    [--pools=mean,summary,concat]
    [--step=last|best|N] [--num_layers=1] [--data=SOURCE] [--seed=0]

Prints tables, adds rows to DIR/probe.json and scalars to TensorBoard. There are always rows for raw
pixels. Runs that differ only in their seed also get means and standard deviations. Extracted
features are cached in DIR/features. The run may still be training.
"""

import pathlib
from typing import Any

from absl import flags

from hjepa_jax import cli
from hjepa_jax.config.fields import MAX_NUMBER
from hjepa_jax.errors import InputError
from hjepa_jax.runtime.paths import expand_source, expanded

# An ml_collections.ConfigDict. Importing the type from hjepa_jax.config would load JAX before the
# flags are checked.
Config = Any

_WORKDIR = cli.define_workdirs()
_PROTOCOLS = flags.DEFINE_list("protocols", ["linear", "knn"], "Probes to run.")
_ENCODERS = flags.DEFINE_list("encoders", ["target", "random_init"], "Also: online.")
_LEVELS = flags.DEFINE_list("levels", ["all"], "Levels to judge, 0 the finest; or all.")
_POOLS = flags.DEFINE_list("pools", ["mean", "summary", "concat"], "Features to judge.")
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to judge: last, best (by k-NN) or a step.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 1, "How many of the last blocks give features.")
_DATA = flags.DEFINE_string("data", None, "Judge on another data set: a data.source.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps prepared data.")
_SHOTS = flags.DEFINE_list("lowshot_labels", None, "Labels per class, or fractions such as 0.01.")
_FEWSHOT = flags.DEFINE_list("fewshot_shots", ["1", "5"], "Examples per class in an episode.")
_FINETUNE = flags.DEFINE_float("finetune_epochs", 20.0, "Length of a fine-tuning.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the hold-out, of draws and episodes.", lower_bound=0, upper_bound=MAX_NUMBER
)
_KEEP = flags.DEFINE_bool("keep_features", True, "Keep extracted features in the workdir.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax.evaluation import features, judge, protocols, results
    from hjepa_jax.runs import seeds
    from hjepa_jax.runs.record import read_record
    from hjepa_jax.runs.workdir import load_config

    _check_names("--protocols", _PROTOCOLS.value, judge.PROTOCOLS)
    _check_names("--encoders", _ENCODERS.value, (*protocols.TRAINED_ENCODERS, "random_init"))
    _check_names("--pools", _POOLS.value, features.POOLS)
    if not 0 < _FINETUNE.value < float("inf"):
        raise InputError("--finetune_epochs", _FINETUNE.value, "must be a number above 0")
    workdirs = cli.workdirs(_WORKDIR.value)
    options = {
        "protocols": tuple(_PROTOCOLS.value),
        "levels": None if _LEVELS.value == ["all"] else _numbers("--levels", _LEVELS.value),
        "pools": tuple(_POOLS.value),
        "lowshot_labels": _numbers("--lowshot_labels", _SHOTS.value) if _SHOTS.value else None,
        "fewshot_shots": _numbers("--fewshot_shots", _FEWSHOT.value),
        "seed": _SEED.value,
    }
    configs = [load_config(workdir) for workdir in workdirs]  # check all before any work
    source = None if _DATA.value is None else expand_source("--data", _DATA.value)
    runs = [
        _judge(workdir, config, source, options)
        for workdir, config in zip(workdirs, configs, strict=True)
    ]
    if len(runs) > 1:
        # Each run has its own best step. Any other step must be the same in all runs.
        any_step = _STEP.value == "best"
        steps = None if any_step else [rows[0]["step"] for rows in runs]
        records = [read_record(workdir) for workdir in workdirs]
        images = [record.fingerprint if record else None for record in records]
        differing = seeds.differences(configs, steps, images)
        if differing:
            print(f"\nno mean: {differing}")
        else:
            print("\n" + results.format_seeds(runs, any_step=any_step))


def _judge(
    workdir: pathlib.Path, config: Config, data: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Evaluates one run: prints its tables, adds rows to its probe.json and returns them.

    Args:
      workdir: the run's directory.
      config: the run's config.
      data: data source to evaluate on; None = eval.data of the run, or its data.source.
      options: fields of `Protocol`.
    """
    from hjepa_jax.data.fingerprint import fingerprint, why_redrawn
    from hjepa_jax.evaluation import results
    from hjepa_jax.evaluation.judge import judge_run
    from hjepa_jax.evaluation.protocols import Protocol
    from hjepa_jax.runs import run
    from hjepa_jax.runs.checkpoint_meta import read_newest_meta
    from hjepa_jax.runs.load import load_state
    from hjepa_jax.runs.logger import write_tensorboard
    from hjepa_jax.runs.workdir import writing
    from hjepa_jax.runtime.backend import select_platform

    select_platform(_PLATFORM.value or config.platform)
    model, state, initial = load_state(workdir, _STEP.value)
    params = {
        "target": state.target_params,
        "online": state.params["context_encoder"],
        "random_init": initial.target_params,
    }
    data_dir = None if _DATA_DIR.value is None else expanded("--data_dir", _DATA_DIR.value)
    data = data or config.eval.data
    source = run.open_config_source(config, source=data, data_dir=data_dir)
    step = int(state.step)
    print(f"{workdir}: step {step}, {source.name}", flush=True)
    train, test = source.load()
    if config.data.source == "shapes" and data in (None, "shapes"):
        trained_on = read_newest_meta(workdir).get("data")
        if rule := why_redrawn("shapes", trained_on, fingerprint(train)):
            raise InputError("--workdir", str(workdir), rule)
    judged = {name: params[name] for name in _ENCODERS.value}
    num_val, batch_size = config.eval.num_val, config.eval.batch_size
    protocol = Protocol(num_val=num_val, batch_size=batch_size, **options)
    with writing(workdir):
        rows = judge_run(
            workdir, config, model, judged, train, test, source=source, step=step,
            protocol=protocol, num_layers=_NUM_LAYERS.value, keep_features=_KEEP.value,
            finetune_epochs=_FINETUNE.value,
        )  # fmt: skip
        if config.log.tensorboard:
            group = "probe" if data in (None, config.eval.data) else f"probe_{source.name}"
            texts = {group: f"```\n{results.format_tables(rows)}\n```"}
            write_tensorboard(workdir, step, results.scalars(rows, group=group), texts)
    return rows


def _check_names(flag: str, names: list[str], options: tuple[str, ...]) -> None:
    for name in names or [""]:
        if name not in options:
            raise InputError(flag, name, f"must be some of {', '.join(options)}")


def _numbers(flag: str, values: list[str]) -> tuple[int | float, ...]:
    """Returns whole numbers, or fractions if the flag allows them."""
    numbers = []
    for value in values or [""]:
        try:
            number = float(value)
            whole = int(number)
        except (ValueError, OverflowError):
            raise InputError(flag, value, "must be numbers, separated by commas") from None
        is_fraction = flag == "--lowshot_labels" and 0 < number < 1
        is_count = number == whole and number >= (0 if flag == "--levels" else 1)
        if not (is_fraction or is_count):
            raise InputError(
                flag, value, "must be whole numbers, or fractions where they make sense"
            )
        numbers.append(number if is_fraction else whole)
    return tuple(numbers)


if __name__ == "__main__":
    cli.run(main)
