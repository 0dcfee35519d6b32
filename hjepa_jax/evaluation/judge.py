"""Evaluates the encoders of a run: every protocol, printed and added to its work directory."""

import dataclasses
import functools
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
from hjepa_jax.evaluation.classifier_file import is_kept, write_classifier
from hjepa_jax.evaluation.feature_cache import FeatureCache, params_digest
from hjepa_jax.evaluation.features import check_levels, embed_pixels, extract_features
from hjepa_jax.evaluation.finetune import FinetuneSettings, finetune
from hjepa_jax.evaluation.known_rows import KnownRows, settings_of
from hjepa_jax.evaluation.labelled import why_no_probe
from hjepa_jax.models.hjepa import HJEPA
from hjepa_jax.runs.newest_checkpoint import NewestCheckpoint
from hjepa_jax.runs.scores import (
    Row,
    may_be_of,
    read_probe_json,
    rows_to_add_to,
    write_probe_json,
)
from hjepa_jax.runtime.provenance import source_digest

# Protocols on pooled features, then protocols that need the encoder's tokens or the encoder itself.
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
    """Runs the protocols, prints tables, and adds each row to probe.json as soon as it is known.

    Rows are reused from probe.json if nothing that they depend on has changed.

    Args:
      workdir: the work directory. Features go to its folder `features`, states of fine-tunings to
        `finetune`, and the fine-tuned encoder with its head to `classifier.npz`.
      config: config of the run.
      model: the networks.
      encoders: parameters by name, see `evaluate_encoders`.
      train: training images of `source`.
      test: test images of `source`.
      source: the data source.
      step: checkpoint step of the trained encoders.
      protocol: the settings; its protocols may be any of `PROTOCOLS`.
      num_layers: number of last blocks that give features.
      keep_features: whether extracted features are cached in the work directory.
      finetune_epochs: length of a fine-tuning, epochs.
    """
    images = fingerprint(train, test=test)
    _warn_of_other_images(workdir / "probe.json", source.name, images)
    num_classes, rows = len(source.info.class_names), list[Row]()
    protocol = _possible(protocol, source, train)
    check_levels(protocol.levels or (), config.model.num_levels)

    path = workdir / "probe.json"
    settings = settings_of(
        protocol, num_layers=num_layers, finetune_epochs=finetune_epochs,
        data=source.name, images=images,
    )  # fmt: skip
    known = KnownRows(path, config, settings, encoders)
    new: list[Row] = []

    def add(made: list[Row]) -> None:
        for row in made:
            layered = row["protocol"] in protocols.PROTOCOLS and row["encoder"] != "pixels"
            row["num_layers"] = num_layers if layered else 1
        new.extend(made)
        write_probe_json(path, made)

    if pooled := tuple(name for name in protocol.protocols if name in protocols.PROTOCOLS):
        rows += protocols.evaluate_encoders(
            build.build_embed_fn(config, model, num_layers=num_layers),
            encoders, train, test, num_classes=num_classes, step=step,
            protocol=dataclasses.replace(protocol, protocols=pooled),
            embed_views=build.build_embed_views_fn(config, model, num_layers=num_layers),
            embed_raw=functools.partial(embed_pixels, image_size=config.data.image_size),
            cache=FeatureCache(workdir / "features") if keep_features else None,
            data=source.name, report=add, known=known,
        )  # fmt: skip
    for encoder, params in {**encoders, "pixels": None}.items():
        common = protocols.origin(encoder, step, protocol.seed, source.name, train, test, images)
        for name in ("attentive", "finetune"):
            if name not in protocol.protocols or (name, encoder) == ("finetune", "pixels"):
                continue
            made_from = known.made_from(name, encoder, common["step"])
            keeps = (name, encoder) == ("finetune", "target")
            found = known.of(name, made_from)
            if found and (not keeps or is_kept(workdir, source.info.class_names, made_from)):
                rows += found
                continue
            print(f"{name}: {encoder} ...", flush=True)
            if name == "attentive":
                embed = jax.jit(build.build_tokens_fn(config, model))
                row = _attentive(embed, encoder, params, train, test, num_classes, protocol)
            else:
                epochs = FinetuneSettings(num_classes, finetune_epochs, seed=protocol.seed)
                row, classifier = _finetune(
                    workdir, config, model, encoder, params, train, test, epochs
                )
                if keeps:
                    write_classifier(workdir, classifier, source.info.class_names, made_from)
            add([{**row, **common, "made_from": made_from}])
            rows += new[-1:]
    # Rows on the current images must be the newest, even if no row was computed.
    newest = read_probe_json(path)
    if lost := [row for row in rows if row not in newest]:
        write_probe_json(path, lost)
    if len(new) < len(rows):
        print(f"{len(rows) - len(new)} of {len(rows)} scores are unchanged in {path}")
    print(results.format_tables(rows), flush=True)
    return rows


def _possible(protocol: protocols.Protocol, source: Source, train: Split) -> protocols.Protocol:
    """Returns the settings, without the protocols that need labels if there are none."""
    if why := why_no_probe(train, source.info.class_names):
        print(f"{source.name} {why}: no probe of labels, only the protocol quality", flush=True)
        return dataclasses.replace(protocol, protocols=("quality",))
    protocols.check_classes(source.name, train.labels, len(source.info.class_names))
    return protocol


def _warn_of_other_images(path: pathlib.Path, data: str, images: str) -> None:
    """Refuses a probe.json that cannot be extended; warns about rows on other images."""
    others = [row for row in rows_to_add_to(path) if not may_be_of(row, data, images)]
    if others:
        message = f"probe.json holds {len(others)} rows of {data} with other images than it has now"
        print(f"{message}; reports leave them out", file=sys.stderr, flush=True)


def _attentive(
    embed: Any,
    encoder: str,
    params: Any,
    train: Split,
    test: Split,
    num_classes: int,
    protocol: protocols.Protocol,
) -> Row:
    """Returns the row of the attentive probe."""
    tokens, test_tokens = (
        extract_features(
            embed, params, split.images, batch_size=protocol.batch_size,
            what=f"{encoder} tokens, {name}",
        )["tokens"]
        for name, split in (("train", train), ("test", test))
    )  # fmt: skip
    result = attentive_probe(
        tokens, train.classes, test_tokens, test.classes,
        num_classes=num_classes, num_val=protocol.num_val, seed=protocol.seed,
        what=f"{encoder} attentive probe",
    )  # fmt: skip
    return {
        "protocol": "attentive",
        "level": 0,
        "pool": "tokens",
        "dim": tokens.shape[2],
        "top1": result.top1,
        "chosen": {
            "learning_rate": result.chosen_learning_rate,
            "weight_decay": result.chosen_weight_decay,
            "val_top1": max(result.val_top1),
        },
        "at_edge": list(result.at_edge),
    }


def _finetune(
    workdir: pathlib.Path,
    config: Config,
    model: HJEPA,
    encoder: str,
    params: Any,
    train: Split,
    test: Split,
    settings: FinetuneSettings,
) -> tuple[Row, Any]:
    """Returns row and parameters of a fine-tuning; "random_init" is training from scratch."""
    augment, network = build.build_augment(config), model.context_encoder
    made_from = " ".join(
        [source_digest(), fingerprint(train), params_digest(params)]
        + [repr(part) for part in (settings, augment, network)]
    )
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    newest = NewestCheckpoint(workdir / "finetune" / f"{encoder}_{digest}")
    try:
        scores, classifier = finetune(
            network, params, train, test, settings,
            augment=augment, preprocess=build.build_preprocess(config),
            checkpoints=newest, what=f"{encoder} fine-tuning",
        )  # fmt: skip
    finally:
        newest.close()
    row = {
        "protocol": "finetune",
        "level": 0,
        "pool": "mean",
        "dim": network.width,
        "labels": f"{settings.num_epochs:g} epochs",
        **scores,
        "settings": dataclasses.asdict(settings),
        "chosen": {},
    }
    return row, classifier
