"""Scores of a run on held-out training images, for comparing settings.

Probes are fitted on some training images, hyper-parameters included, and scored on others. The test
images are not used, so that they do not influence the choice of settings.
"""

import functools
import pathlib

import numpy as np
from jaxtyping import Int

from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Split
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.evaluation.features import POOLS, embed_pixels
from hjepa_jax.evaluation.known_rows import KnownRows, settings_of
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.protocols import Protocol, check_classes, evaluate_encoders
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runs.scores import Row, write_probe_json
from hjepa_jax.runs.workdir import load_config

FILE = "held_out.json"  # in the work directory; written like probe.json


def fitted_and_scored(
    num_images: int, num_val: int, num_fit: int | None
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " V"]]:
    """Returns the rows that probes fit and the rows that score them; the same for every seed.

    Args:
      num_images: number of training images.
      num_val: number of rows to score, at most a fifth of the images.
      num_fit: F, the maximum number of rows to fit; None = all that are not scored.
    """
    fit, scored = hold_out(num_images, num_val=num_val)
    return np.sort(np.random.default_rng(0).permutation(fit)[:num_fit]), scored


def data_name(config: Config) -> str:
    """Returns the field `data` of rows on held-out images."""
    return f"{config.eval.data or config.data.source}, training images"


def held_out_rows(
    workdir: pathlib.Path,
    num_fit: int | None,
    *,
    pools: tuple[str, ...] = POOLS,
    baselines: pathlib.Path | None = None,
) -> list[Row]:
    """Scores the newest checkpoint, the untrained network and raw pixels; writes held_out.json.

    Args:
      workdir: directory of the run.
      num_fit: maximum number of images that the probes fit; None = all that are not scored.
      pools: features to judge.
      baselines: a file that keeps rows of the untrained network and of raw pixels, for other runs
        with the same networks and images; None = none.

    Returns:
      Rows of the protocols linear and k-NN; each has the fields `num_fit` and `num_val`.

    Raises:
      InputError: without a run, or without labels ("data.source").
    """
    config = load_config(workdir)
    model, state, initial = load_state(workdir)
    source = open_config_source(config, source=config.eval.data)
    train, _ = source.load()
    check_classes(source.name, train.labels, len(source.info.class_names))
    parts = fitted_and_scored(len(train.images), config.eval.num_val, num_fit)
    fit, scored = (Split(train.images[rows], train.classes[rows]) for rows in parts)
    protocol = Protocol(pools=pools, num_val=config.eval.num_val, batch_size=config.eval.batch_size)
    encoders = {"target": state.target_params, "random_init": initial.target_params}
    data, known = data_name(config), None
    if baselines is not None:
        images = fingerprint(fit, test=scored)
        known = KnownRows(
            baselines, config, settings_of(protocol, data=data, images=images), encoders
        )
    rows = evaluate_encoders(
        build.build_embed_fn(config, model), encoders, fit, scored,
        num_classes=len(source.info.class_names), step=int(state.step), protocol=protocol,
        embed_raw=functools.partial(embed_pixels, image_size=config.data.image_size),
        data=data, known=known,
    )  # fmt: skip
    rows = [row | {"num_fit": num_fit, "num_val": config.eval.num_val} for row in rows]
    write_probe_json(workdir / FILE, rows)
    if baselines is not None:
        write_probe_json(baselines, (row for row in rows if row["encoder"] != "target"))
    return rows
