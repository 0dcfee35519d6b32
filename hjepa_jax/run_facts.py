"""What is known of a run, read from its workdir and nowhere else."""

import contextlib
import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from hjepa_jax import build, checkpoint
from hjepa_jax.config import Config
from hjepa_jax.data.sources import Split
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.knn import knn_predict, nearest_rows
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.quality import (
    MIN_RANK_FRACTION,
    MIN_RELATIVE_STD,
    Verdict,
    collapse_verdict,
)
from hjepa_jax.evaluation.results import Row, read_probe_json, rows_on
from hjepa_jax.history import History, read_history
from hjepa_jax.metrics import FEATURE_ROWS
from hjepa_jax.run import num_params, open_config_source
from hjepa_jax.run_dir import checkpoint_sizes, load_config, lock_owner
from hjepa_jax.snapshot import Snapshot, fixed_images

# Training images whose features a report looks at: those compared with, and held-out ones.
BANK_SIZE, NUM_QUERIES = 2000, 500
KNN_K = 20
NUM_NEIGHBOURS, NUM_SHOWN = 6, 6


@dataclasses.dataclass(frozen=True)
class Look:
    """What the newest checkpoint makes of some training images.

    Attributes:
      step: of the checkpoint.
      snapshot: of a few images.
      features: by name, of the held-out images, [Q, D].
      verdict: whether those of level 0 have collapsed.
      labels, predictions: of the held-out images, [Q]; by k-NN on level 0.
      class_names: by label.
      images: the held-out images, uint8 [Q, H, W, 3].
      neighbours: to the first S of them, those of the bank with the most similar features, uint8
        [S, k, H, W, 3].
      same_class: bool [S, k].
      bank_size: how many images they were compared with.
    """

    step: int
    snapshot: Snapshot
    features: dict[str, Float[np.ndarray, "Q _"]]
    verdict: Verdict
    labels: Int[np.ndarray, " Q"]
    predictions: Int[np.ndarray, " Q"]
    class_names: tuple[str, ...]
    images: Any
    neighbours: Any
    same_class: Any
    bank_size: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run as its workdir shows it.

    Attributes:
      name: of the workdir.
      workdir: as the user spells it.
      config: with which the run went on last.
      history: its metrics.jsonl.
      probes: the rows of its probe.json, on whatever data.
      status: "finished", "running", "interrupted", "stopped" (a rule of the config ended it) or
        "not started".
      stopped_by: the rule that ended it, and the numbers it looked at; empty for none.
      num_steps, steps_per_epoch: None where the number of training images is not known.
      params: number of parameters by part.
      checkpoints: bytes by step.
      meta: what the newest checkpoint says of its origin; empty without one.
      look: None where there is no checkpoint, or its images are not to be had; `no_look` says why.
      width: of the encoder.
    """

    name: str
    workdir: pathlib.Path
    config: Config
    history: History
    probes: list[Row]
    status: str
    stopped_by: str
    num_steps: int | None
    steps_per_epoch: int | None
    params: dict[str, int]
    checkpoints: dict[int, int]
    meta: dict[str, Any]
    look: Look | None
    no_look: str
    width: int

    @property
    def own_probes(self) -> list[Row]:
        """The rows on the data set that the run was trained on, of one seed; see `rows_on`."""
        return rows_on(self.config.data.source, self.probes)

    @property
    def device_memory(self) -> int | None:
        """Bytes of memory that the run could have; None where its device does not tell."""
        memory = self.meta.get("versions", {}).get("device memory", "")
        return int(memory) if memory.isdecimal() else None

    @property
    def max_rank(self) -> int:
        """Largest value that train/effective_rank can have."""
        batch = min(self.config.train.batch_size, FEATURE_ROWS)
        return min(batch * (FEATURE_ROWS // batch) - 1, self.width)

    @property
    def min_rank(self) -> float:
        """Effective rank below which features count as collapsed."""
        return MIN_RANK_FRACTION * self.max_rank

    def signs_of_collapse(self, line: dict[str, Any] | None = None) -> list[str]:
        """What says that the target features have collapsed, with the thresholds; else empty.

        Constant features and rounding noise have full rank, so that their spread counts as well.

        Args:
          line: of the history, maybe without the numbers; None for the newest that has them, and
            the newest checkpoint.
        """
        found, look = [], self.look if line is None else None
        if line is None:
            with_rank = (x for x in reversed(self.history.lines) if "train/effective_rank" in x)
            line = next(with_rank, {})
        rank, std = line.get("train/effective_rank"), line.get("train/relative_std")
        if rank is not None and rank < self.min_rank:
            found.append(f"effective rank {rank:.1f} is below {self.min_rank:.1f}")
        if std is not None and std < MIN_RELATIVE_STD:
            found.append(f"relative std {std:.2g} is below {MIN_RELATIVE_STD}")
        if look and look.verdict.label != "healthy":
            found.append(f"{look.verdict.label} at the checkpoint of step {look.step}")
        return found


def read_facts(
    workdir: pathlib.Path, *, images: bool, splits: tuple[Split, Split] | None = None
) -> Facts:
    """Reads a workdir: finished, interrupted, or of a run that goes on.

    Args:
      workdir: the run's directory.
      images: whether to read the newest checkpoint and the training images.
      splits: the run's images, where they are in memory.

    Raises:
      InputError: when the directory holds no run of this version ("--workdir").
    """
    config = load_config(workdir)
    history = read_history(workdir / "metrics.jsonl")
    probes = read_probe_json(workdir / "probe.json")
    model = build.build_model(config)
    state = jax.eval_shape(build.build_create_state(config, model, optax.identity()))
    params = {name: num_params(tree) for name, tree in sorted(state.params.items())}
    sizes = checkpoint_sizes(workdir)
    look, meta, num_images, reason = None, {}, None, ""
    if not sizes:
        reason = "there is no checkpoint yet"
    elif not images:
        reason = "not asked for (--noimages)"
    try:
        if sizes:
            meta = checkpoint.read_meta(workdir)
        if images:
            source = open_config_source(config)
            num_images = source.num_images
            if sizes:
                train, _ = splits or source.load()
                if source.records is None:  # without a folder's files that are no images
                    num_images = len(train.images)
                look = _look(workdir, config, model, train, source.info.class_names)
    except InputError as error:
        reason = str(error)
    if num_images is None:
        num_images = _probed_size(config, rows_on(config.data.source, probes))
    schedules = None
    with contextlib.suppress(InputError):  # the data is no longer what was trained on
        schedules = build.build_schedules(config, num_images) if num_images else None
    num_steps = schedules.num_steps if schedules else config.train.num_steps
    facts = Facts(
        name=workdir.resolve().name,
        workdir=workdir,
        config=config,
        history=history,
        probes=probes,
        status=_status(workdir, history, num_steps),
        stopped_by="",
        num_steps=num_steps,
        steps_per_epoch=schedules.steps_per_epoch if schedules else None,
        params={**params, "target_encoder": num_params(state.target_params)},
        checkpoints=sizes,
        meta=meta,
        look=look,
        no_look=reason,
        width=model.context_encoder.width,
    )
    rule = _stopped_by(facts) if facts.status == "interrupted" else ""
    return dataclasses.replace(facts, status="stopped", stopped_by=rule) if rule else facts


def _probed_size(config: Config, probes: list[Row]) -> int | None:
    """Number of training images that probes on the run's data have seen, where it is that of all.

    None where the run may be streamed: probes then see `max_labelled` of them, or another split.
    """
    c = config.data
    size = next((row["train_size"] for row in probes if "train_size" in row), None)
    streamed = c.streaming == "always" or c.train_split is not None
    may_be = c.streaming == "auto" and size == c.max_labelled
    return None if streamed or may_be else size


def _status(workdir: pathlib.Path, history: History, num_steps: int | None) -> str:
    if lock_owner(workdir):
        return "running"
    if num_steps and history.last_step() >= num_steps:
        return "finished"
    return "interrupted" if history.lines else "not started"


def _stopped_by(facts: Facts) -> str:
    """The rule of the config that ended a run which is not at its last step; empty for none."""
    c, count = facts.config.train, facts.history.last("train/nonfinite_steps") or 0
    if count > c.max_nonfinite_steps:
        return f"more than train.max_nonfinite_steps={c.max_nonfinite_steps} were left out"
    signs = facts.signs_of_collapse(facts.history.lines[-1])
    return (
        f"train.on_collapse=stop: {'; '.join(signs)}" if c.on_collapse == "stop" and signs else ""
    )


def _look(
    workdir: pathlib.Path, config: Config, model: Any, train: Split, class_names: tuple[str, ...]
) -> Look:
    _, state, _ = checkpoint.load_state(workdir)
    snapshot = jax.jit(build.build_snapshot_fn(config, model))
    embed = jax.jit(build.build_embed_fn(config, model))
    bank, queries = hold_out(len(train.images), num_val=config.eval.num_val)
    bank, queries = (
        rows[:: max(1, math.ceil(len(rows) / count))]
        for rows, count in ((bank, BANK_SIZE), (queries, NUM_QUERIES))
    )
    bank_x, query_x = (
        extract_features(
            embed, state.target_params, train.images[rows], batch_size=config.eval.batch_size
        )
        for rows in (bank, queries)
    )
    k = min(KNN_K, len(bank))
    (predictions,) = knn_predict(
        bank_x["level_0"], train.labels[bank], query_x["level_0"], ks=[k],
        num_classes=int(train.labels.max()) + 1,
    )  # fmt: skip
    found = bank[
        nearest_rows(
            bank_x["level_0"], query_x["level_0"][:NUM_SHOWN], k=min(NUM_NEIGHBOURS, len(bank))
        )
    ]
    return Look(
        step=int(state.step),
        snapshot=jax.device_get(
            snapshot(state.params, state.target_params, fixed_images(train.images))
        ),
        features=query_x,
        verdict=collapse_verdict(query_x["level_0"]),
        labels=train.labels[queries],
        predictions=predictions,
        class_names=class_names,
        images=train.images[queries],
        neighbours=train.images[found],
        same_class=train.labels[found] == train.labels[queries[:NUM_SHOWN]][:, None],
        bank_size=len(bank),
    )
