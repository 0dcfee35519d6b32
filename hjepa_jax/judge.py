"""Judges the encoders of a run: the protocol, told on the terminal and kept in its workdir."""

import pathlib
from typing import Any

from hjepa_jax import __version__, build
from hjepa_jax.config import Config
from hjepa_jax.data.sources import Source, Split
from hjepa_jax.evaluation import results
from hjepa_jax.evaluation.features import FeatureCache
from hjepa_jax.evaluation.protocols import Protocol, evaluate_encoders
from hjepa_jax.models.hjepa import HJEPA


def judge_run(
    workdir: pathlib.Path,
    config: Config,
    model: HJEPA,
    encoders: dict[str, Any],
    splits: tuple[Split, Split],
    *,
    source: Source,
    step: int,
    protocol: Protocol,
    num_layers: int = 1,
    keep_features: bool = True,
) -> list[results.Row]:
    """Runs the protocol, prints rows and tables, and adds the rows to probe.json.

    Args:
      workdir: the run's directory; features are kept in its folder `features`.
      config: the run's config.
      model: the networks.
      encoders: parameters by name, see `evaluate_encoders`.
      splits: train and test.
      source: where they are from.
      step: checkpoint step of the trained encoders.
      protocol: what to run.
      num_layers: how many of the last blocks give features.
      keep_features: whether extracted features are kept for the next time.

    Raises:
      InputError: see `evaluate_encoders`.
    """
    version = f"{__version__} {config.data.image_size} {config.seed} {num_layers}"
    rows = evaluate_encoders(
        build.build_embed_fn(config, model, num_layers=num_layers),
        encoders,
        *splits,
        num_classes=len(source.info.class_names),
        step=step,
        protocol=protocol,
        embed_views=build.build_embed_views_fn(config, model, num_layers=num_layers),
        cache=FeatureCache(workdir / "features", version=version) if keep_features else None,
        data=source.name,
        report=lambda row: print(results.format_row(row), flush=True),
    )
    rows = [{**row, "num_layers": num_layers} for row in rows]
    print(results.format_tables(rows))
    results.write_probe_json(workdir / "probe.json", rows)
    return rows
