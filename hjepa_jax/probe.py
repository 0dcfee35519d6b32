"""Judges the encoder of a finished or running workdir.

  python -m hjepa_jax.probe --workdir=DIR [--protocols=linear,knn] [--encoders=target,random_init]
    [--step=N] [--seed=0]

Prints a table and writes DIR/probe.json. Raw pixels are always among the rows.
"""

import pathlib

from absl import flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_PROTOCOLS = flags.DEFINE_list("protocols", ["linear", "knn"], "Probes to run.")
_ENCODERS = flags.DEFINE_list("encoders", ["target", "random_init"], "Also: online.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to judge (the newest).", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the hold-out on which the probes choose.")


def main() -> None:
    """Runs the command."""
    from hjepa_jax import build, checkpoint, run
    from hjepa_jax.evaluation import protocols
    from hjepa_jax.platform import select_platform

    _check_names("--protocols", _PROTOCOLS.value, protocols.PROTOCOLS)
    _check_names("--encoders", _ENCODERS.value, (*protocols.TRAINED_ENCODERS, "random_init"))
    workdir = pathlib.Path(_WORKDIR.value)
    config = run.load_config(workdir)
    select_platform(config.platform)
    source = run.open_config_source(config)
    built = run.build_run(config, source)
    initial, _ = built.create()
    checkpoints = checkpoint.Checkpoints(workdir, config=config)
    state = checkpoints.restore_state(initial, _STEP.value)
    checkpoints.close()

    params = {
        "target": state.target_params,
        "online": state.params["context_encoder"],
        "random_init": initial.target_params,
    }
    train, test = source.load()
    protocols.evaluate_and_write(
        workdir,
        build.build_embed_fn(config, built.model),
        {name: params[name] for name in _ENCODERS.value},
        train,
        test,
        num_classes=len(source.info.class_names),
        step=int(state.step),
        protocols=tuple(_PROTOCOLS.value),
        num_val=config.eval.num_val,
        seed=_SEED.value,
        batch_size=config.eval.batch_size,
    )


def _check_names(flag: str, names: list[str], options: tuple[str, ...]) -> None:
    for name in names:
        if name not in options:
            raise InputError(flag, name, f"must be some of {', '.join(options)}")


if __name__ == "__main__":
    cli.run(main)
