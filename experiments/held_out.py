"""The probe table of a run on held-out training images: to compare, or long before a run's end.

  PYTHONPATH=. python experiments/held_out.py runs/X      # prints it, writes runs/X/held_out.json

The protocol of `hjepa_jax.probe`, with the split of `sweep.py`: probes fit and choose on some
training images, and are scored on `eval.num_val` others, never on test images.
"""

import argparse
import pathlib

from experiments.sweep import fitted_and_scored
from hjepa_jax import cli
from hjepa_jax.config import build
from hjepa_jax.data.base import Split
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.protocols import Protocol, evaluate_encoders
from hjepa_jax.evaluation.results import format_tables
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.scores import Row, write_probe_json
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import select_platform


def held_out_rows(workdir: pathlib.Path, num_fit: int | None) -> list[Row]:
    """Returns a row per probe and representation: newest target encoder, random-init and pixels."""
    config = load_config(workdir)
    select_platform(config.platform)
    model, state, initial = load_state(workdir)
    source = open_config_source(config)
    train, _ = source.load()
    parts = fitted_and_scored(len(train.labels), config.eval.num_val, num_fit)
    return evaluate_encoders(
        build.build_embed_fn(config, model),
        {"target": state.target_params, "random_init": initial.target_params},
        *(Split(train.images[rows], train.labels[rows]) for rows in parts),
        num_classes=len(source.info.class_names),
        step=int(state.step),
        protocol=Protocol(num_val=config.eval.num_val, batch_size=config.eval.batch_size),
        data=f"{config.data.source}, training images",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--num_fit", type=int, default=12_000, help="images that probes fit")
    args = parser.parse_args()
    rows = held_out_rows(args.workdir, args.num_fit)
    write_probe_json(args.workdir / "held_out.json", rows)
    print(format_tables(rows))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        cli.fail(str(error))
