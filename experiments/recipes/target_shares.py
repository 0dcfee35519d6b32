"""What decides the targets of a run: the place of a patch, its image, or both together.

  python experiments/recipes/target_shares.py RUN_WORKDIR

Of 256 training images, without augmentation: per level the shares of the targets' variance that
the mean at a place and the mean of an image have, for the newest checkpoint and for random-init.
"""

import pathlib
import sys

import jax
import numpy as np

from hjepa_jax.data.augment import normalize
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.workdir import load_config

NUM_IMAGES = 256


def main() -> None:
    """Prints a line per encoder and level."""
    workdir = pathlib.Path(sys.argv[1])
    config = load_config(workdir)
    model, state, initial = load_state(workdir)
    train, _ = open_config_source(config).load()
    c = config.data
    shape = (NUM_IMAGES, c.image_size, c.image_size, 3)
    images = jax.image.resize(train.images[:NUM_IMAGES].astype(np.float32), shape, "linear")
    pixels = normalize(images / 255.0, tuple(c.mean), tuple(c.std))

    @jax.jit
    def targets(params):
        variables = {"params": {"context_encoder": params}}
        return tuple(model.apply(variables, pixels, method="targets").levels.values())

    for name, params in (("trained", state.target_params), ("random-init", initial.target_params)):
        for level, x in enumerate(np.asarray(x, np.float64) for x in targets(params)):
            whole = x.var(axis=(0, 1)).sum()
            place, image = (x.mean(axis=axis).var(axis=0).sum() / whole for axis in (0, 1))
            print(
                f"{name}, level {level}: place {place:.2f}, image {image:.2f}, "
                f"both together {1 - place - image:.2f}"
            )


if __name__ == "__main__":
    main()
