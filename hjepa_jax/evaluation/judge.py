"""Judges the encoders of a run: every protocol, told on the terminal and kept in its workdir."""

import dataclasses
import hashlib
import pathlib
import sys
from typing import Any

import jax

from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Source, Split
from hjepa_jax.data.fingerprint import fingerprint
from hjepa_jax.evaluation import protocols, results
from hjepa_jax.evaluation.attentive import attentive_probe
from hjepa_jax.evaluation.features import (
    FeatureCache,
    check_levels,
    extract_features,
    params_digest,
)
from hjepa_jax.evaluation.finetune import FinetuneSettings, finetune
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.runs.newest_checkpoint import NewestCheckpoint
from hjepa_jax.runs.scores import Row, may_be_of, rows_to_add_to, write_probe_json
from hjepa_jax.runtime.provenance import source_digest

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
) -> list[Row]:
    """Runs the protocols, prints rows and tables, and adds each row to probe.json as it is done.

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
      OSError: when the workdir cannot be written.
    """
    wanted, rows = protocol.protocols, []
    images = fingerprint(train, test=test)
    # A file that cannot be added to is refused at once.
    before = rows_to_add_to(workdir / "probe.json")
    if others := [r for r in before if not may_be_of(r, source.name, images)]:
        message = f"probe.json holds {len(others)} rows of {source.name} with other images than it"
        print(f"{message} has now; reports leave them out", file=sys.stderr, flush=True)
    num_classes = len(source.info.class_names)
    protocols.check_classes(source.name, train.labels, num_classes)
    check_levels(protocol.levels or (), config.model.num_levels)
    embed = build.build_embed_fn(config, model, num_layers=num_layers)
    augment = build.build_augment(config)

    def add(row: Row) -> None:
        layered = row["protocol"] in protocols.PROTOCOLS and row["encoder"] != "pixels"
        row["num_layers"] = num_layers if layered else 1
        rows.append(row)
        print(results.format_row(row), flush=True)
        write_probe_json(workdir / "probe.json", [row])

    plain = tuple(name for name in wanted if name in protocols.PROTOCOLS)
    if plain:
        protocols.evaluate_encoders(
            embed,
            encoders,
            train,
            test,
            num_classes=num_classes,
            step=step,
            protocol=dataclasses.replace(protocol, protocols=plain),
            embed_views=build.build_embed_views_fn(config, model, num_layers=num_layers),
            cache=FeatureCache(workdir / "features") if keep_features else None,
            data=source.name,
            report=add,
        )

    for encoder, params in {**encoders, "pixels": None}.items():
        common = protocols.origin(encoder, step, protocol.seed, source.name, train, test, images)
        if "attentive" in wanted:
            embed_tokens = jax.jit(build.build_tokens_fn(config, model))
            tokens, test_tokens = (
                extract_features(
                    embed_tokens, params, split.images, batch_size=protocol.batch_size,
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
            del tokens, test_tokens  # gigabytes, before the next encoder's
            scored = {"top1": result.top1, "chosen": chosen, "at_edge": list(result.at_edge)}
            add({"protocol": "attentive", **where, **scored, **common})
        if "finetune" in wanted and encoder != "pixels":  # random-init: training from scratch
            settings = FinetuneSettings(num_classes, finetune_epochs, seed=protocol.seed)
            made_from = " ".join(
                [source_digest(), fingerprint(train), params_digest(params)]
                + [repr(part) for part in (settings, augment, model.context_encoder)]
            )
            made_from = hashlib.sha256(made_from.encode()).hexdigest()
            newest = NewestCheckpoint(workdir / "finetune" / f"{encoder}_{made_from[:16]}")
            try:
                scores = finetune(
                    model.context_encoder, params, train, test, settings,
                    augment=augment, preprocess=build.build_preprocess(config),
                    checkpoints=newest, what=f"{encoder} fine-tuning",
                )  # fmt: skip
            finally:
                newest.close()
            where = {"level": 0, "pool": "mean", "dim": model.context_encoder.width}
            where["labels"] = f"{finetune_epochs:g} epochs"
            how = {"settings": dataclasses.asdict(settings), "chosen": {}}
            add({"protocol": "finetune", **where, **scores, **how, **common})
    print(results.format_tables(rows))
    return rows
