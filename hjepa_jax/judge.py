"""Judges the encoders of a run: every protocol, told on the terminal and kept in its workdir."""

import dataclasses
import pathlib
from typing import Any

import jax

from hjepa_jax import __version__, build
from hjepa_jax.checkpoint import NewestCheckpoint
from hjepa_jax.config import Config
from hjepa_jax.data.sources import Source, Split, fingerprint
from hjepa_jax.evaluation import protocols, results
from hjepa_jax.evaluation.attentive import attentive_probe
from hjepa_jax.evaluation.features import FeatureCache, extract_features
from hjepa_jax.evaluation.finetune import FinetuneSettings, finetune
from hjepa_jax.models.hjepa import HJEPA

# Those of plain features, and those that need the encoder's tokens or the encoder itself.
PROTOCOLS = (*protocols.PROTOCOLS, "attentive", "finetune")


def judge_run(
    workdir: pathlib.Path,
    config: Config,
    model: HJEPA,
    encoders: dict[str, Any],
    train: Split,
    test: Split,
    *,
    source: Source,
    step: int,
    protocol: protocols.Protocol,
    num_layers: int = 1,
    keep_features: bool = True,
    finetune_epochs: float = 20.0,
) -> list[results.Row]:
    """Runs the protocols, prints rows and tables, and adds the rows to probe.json.

    Args:
      workdir: the run's directory; features are kept in its folder `features`, fine-tunings in
        `finetune`.
      config: the run's config.
      model: the networks.
      encoders: parameters by name, see `evaluate_encoders`.
      train: training images of `source`.
      test: its test images.
      source: where they are from.
      step: checkpoint step of the trained encoders.
      protocol: what to run; its protocols may be any of `PROTOCOLS`.
      num_layers: how many of the last blocks give features.
      keep_features: whether extracted features are kept for the next time.
      finetune_epochs: length of a fine-tuning.

    Raises:
      InputError: see `evaluate_encoders`.
    """
    wanted, rows = protocol.protocols, []
    num_classes = len(source.info.class_names)

    def add(row: results.Row) -> None:
        row["num_layers"] = num_layers
        rows.append(row)
        print(results.format_row(row), flush=True)

    plain = tuple(name for name in wanted if name in protocols.PROTOCOLS)
    if plain:
        version = f"{__version__} {config.data.image_size} {config.seed} {num_layers}"
        protocols.evaluate_encoders(
            build.build_embed_fn(config, model, num_layers=num_layers),
            encoders,
            train,
            test,
            num_classes=num_classes,
            step=step,
            protocol=dataclasses.replace(protocol, protocols=plain),
            embed_views=build.build_embed_views_fn(config, model, num_layers=num_layers),
            cache=FeatureCache(workdir / "features", version=version) if keep_features else None,
            data=source.name,
            report=add,
        )

    for encoder, params in {**encoders, "pixels": None}.items():
        common = {
            "encoder": encoder,
            "step": step if encoder in protocols.TRAINED_ENCODERS else 0,
            "seed": protocol.seed,
            "data": source.name,
            "train_size": len(train.labels),
            "test_size": len(test.labels),
        }
        if "attentive" in wanted:
            embed = jax.jit(build.build_tokens_fn(config, model))
            tokens, test_tokens = (
                extract_features(
                    embed, params, split.images, batch_size=protocol.batch_size,
                    what=f"{encoder} tokens, {name}",
                )["tokens"]
                for name, split in (("train", train), ("test", test))
            )  # fmt: skip
            result = attentive_probe(
                tokens, train.labels, test_tokens, test.labels,
                num_classes=num_classes, num_val=protocol.num_val, seed=protocol.seed,
                what=f"{encoder} attentive probe",
            )  # fmt: skip
            chosen = {
                "learning_rate": result.chosen_learning_rate,
                "weight_decay": result.chosen_weight_decay,
                "val_top1": max(result.val_top1),
            }
            where = {"level": 0, "pool": "tokens", "dim": tokens.shape[2]}
            add({"protocol": "attentive", **where, "top1": result.top1, "chosen": chosen, **common})
        if "finetune" in wanted and encoder != "pixels":  # random-init: training from scratch
            settings = FinetuneSettings(num_classes, finetune_epochs, seed=protocol.seed)
            name = f"{encoder}_{common['step']}_{fingerprint(train)}_{finetune_epochs:g}"
            newest = NewestCheckpoint(workdir / "finetune" / f"{name}_{protocol.seed}")
            try:
                scores = finetune(
                    model.context_encoder, params, train, test, settings,
                    augment=build.build_augment(config), preprocess=build.build_preprocess(config),
                    checkpoints=newest, what=f"{encoder} fine-tuning",
                )  # fmt: skip
            finally:
                newest.close()
            where = {"level": 0, "pool": "mean", "dim": model.context_encoder.width}
            how = {"settings": dataclasses.asdict(settings), "chosen": {}}
            add({"protocol": "finetune", **where, **scores, **how, **common})
    print(results.format_tables(rows))
    results.write_probe_json(workdir / "probe.json", rows)
    return rows
