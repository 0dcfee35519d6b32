"""The probe table of a run on held-out training images: to compare, or long before a run's end.

  PYTHONPATH=. python experiments/held_out.py runs/X      # prints it, writes runs/X/held_out.json

The protocol of `hjepa_jax.probe`, scored on the images that `hjepa sweep` holds out.
"""

import argparse
import pathlib

from hjepa_jax import cli
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.held_out import held_out_rows
from hjepa_jax.evaluation.results import format_tables
from hjepa_jax.runs.workdir import load_config
from hjepa_jax.runtime.backend import select_platform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--num_fit", type=int, default=12_000, help="images that probes fit")
    args = parser.parse_args()
    select_platform(load_config(args.workdir).platform)
    print(format_tables(held_out_rows(args.workdir, args.num_fit)))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        cli.fail(str(error))
