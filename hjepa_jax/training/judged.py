"""The images for the k-NN score and the probes of a run: `eval.data`, or its training data."""

from typing import NamedTuple

from hjepa_jax.config import Config
from hjepa_jax.data.base import Source, Split
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.labelled import MIN_ROWS, why_no_probe
from hjepa_jax.evaluation.protocols import check_classes
from hjepa_jax.runs.run import open_config_source
from hjepa_jax.runtime import cluster


class Judged(NamedTuple):
    """The images for k-NN and probes; they may differ from the images to train on."""

    source: Source
    train: Split
    test: Split
    has_classes: bool


def load_judged(config: Config, source: Source, train: Split, test: Split) -> Judged:
    """Loads the images for k-NN and probes: `eval.data`, or the images of the run.

    Raises:
      InputError: the probes at the end cannot use the images ("data.source", "eval.data").
    """
    name = config.eval.data
    if not (config.eval.probe_at_end or config.eval.every_epochs):
        return Judged(source, train, test, has_classes=False)
    try:
        if name is not None:
            with cluster.first_process_first():
                source = open_config_source(config, source=name, quiet=not cluster.is_first())
                train, test = source.load()
        why = why_no_probe(train, source.info.class_names)
        if why and name is not None:
            raise InputError("eval.data", name, f"{why}: probes need at least two")
        if not why:
            _check_judgeable(config, source, train)
    except InputError as error:
        if name is None:
            raise
        where = "" if error.value == name else f"{error.value} "
        raise InputError("eval.data", name, where + error.rule) from error
    if why and cluster.is_first():
        line = "no k-NN score during training and no probe of labels; eval.data names labelled ones"
        print(f"{source.name} {why}: {line}", flush=True)
    return Judged(source, train, test, has_classes=not why)


def _check_judgeable(config: Config, source: Source, train: Split) -> None:
    """Refuses data that the probes at the end cannot use, before hours of training."""
    if config.eval.probe_at_end:
        check_classes(source.name, train.labels, len(source.info.class_names))
    if len(train.images) < MIN_ROWS:
        rule = f"must have at least {MIN_ROWS} training images with labels, to hold some out"
        raise InputError("data.source", source.name, rule)
