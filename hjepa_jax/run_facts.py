"""What is known of a run, read from its workdir and nowhere else."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from hjepa_jax import build, checkpoint
from hjepa_jax.collapse import PATIENCE, Limits, Spread, find_limits, spread_of, untrained_spread
from hjepa_jax.config import Config
from hjepa_jax.data.fingerprint import fingerprint, other_content, same_content, why_redrawn
from hjepa_jax.data.sources import Source, Split
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import Features, extract_features, representations
from hjepa_jax.evaluation.knn import knn_predict, nearest_rows
from hjepa_jax.evaluation.labelled import MIN_ROWS, hold_out
from hjepa_jax.evaluation.quality import Verdict, collapse_verdict
from hjepa_jax.evaluation.results import Row, read_probe_json, rows_on
from hjepa_jax.history import History, read_history
from hjepa_jax.metrics import FEATURE_ROWS
from hjepa_jax.run import num_params, open_config_source
from hjepa_jax.run_dir import checkpoint_sizes, load_config, lock_owner
from hjepa_jax.run_record import RunRecord, read_record
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
      verdict: whether those of level 0 have collapsed, beside those of the untrained network.
      best: the representation that pictures and predictions are made of, in words.
      best_features: that representation of the held-out images, [Q, D].
      labels, predictions: of the held-out images, [Q]; predicted by k-NN on the best features.
      class_names: by label.
      images: the held-out images, uint8 [Q, H, W, 3].
      neighbours: to the first S of them, those of the bank with the most similar best features,
        uint8 [S, k, H, W, 3].
      same_class: bool [S, k].
      bank_size: how many images they were compared with.
    """

    step: int
    snapshot: Snapshot
    features: dict[str, Float[np.ndarray, "Q _"]]
    verdict: Verdict
    best: str
    best_features: Float[np.ndarray, "Q _"]
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
      status: "finished", "running", "interrupted", "stopped" (a rule of the config ended it), "not
        started", or "unknown" if its number of steps is not known.
      stopped_by: the rule that ended it, and the numbers it looked at; empty for none.
      num_steps, steps_per_epoch: None if an older version wrote the workdir and the data is absent.
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

    @functools.cached_property
    def limits(self) -> Limits:
        """Effective rank and relative std below which features count as collapsed."""
        batch_size = self.config.train.batch_size
        untrained = untrained_spread(self.history.lines, batch_size=batch_size)
        return find_limits(max_rank=self.max_rank, untrained=untrained)

    def signs_in(self, line: dict[str, Any]) -> list[str]:
        """What in one line of the history says that the features have collapsed; else empty.

        Constant features and rounding noise have full rank, so that their spread counts as well.
        """
        found, spread, limits = [], spread_of(line), self.limits
        if spread is None:
            return found
        if (rank := spread.effective_rank) < limits.effective_rank:
            found.append(f"effective rank {rank:.1f} is below {limits.effective_rank:.1f}")
        if (std := spread.relative_std) is not None and std < limits.relative_std:
            found.append(f"relative std {std:.2g} is below {limits.relative_std:.2g}")
        return found

    def signs_in_log(self) -> list[str]:
        """The signs of the newest line, if all of the newest `PATIENCE` lines show some."""
        newest = [x for x in self.history.lines if spread_of(x)][-PATIENCE:]
        return self.signs_in(newest[-1]) if newest and all(map(self.signs_in, newest)) else []

    def signs_of_collapse(self) -> list[str]:
        """What in the log and the newest checkpoint says that the features have collapsed."""
        found, look = self.signs_in_log(), self.look
        if look and look.verdict.label != "healthy":
            found.append(f"{look.verdict.label} at the checkpoint of step {look.step}")
        return found

    def judged(self, protocol: str) -> str:
        """Says at which step the scores of a protocol were made, if the run went on since."""
        scored = [r["step"] for r in self.own_probes
                  if (r["encoder"], r["protocol"]) == ("target", protocol)]  # fmt: skip
        newest, last = max(scored, default=0), self.history.last_step()
        return f", scored at step {newest} of {last}" if scored and newest < last else ""


def read_facts(
    workdir: pathlib.Path, *, images: bool, splits: tuple[Split, Split] | None = None
) -> Facts:
    """Reads a workdir: finished, interrupted, or of a run that goes on.

    Nothing is downloaded: a run whose data is not here is described without pictures.

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
    look, meta, record, reason = None, {}, read_record(workdir), ""
    if not sizes:
        reason = "there is no checkpoint yet"
    elif not images:
        reason = "not asked for (--noimages)"
    try:
        if sizes:
            meta = checkpoint.read_meta(workdir)
    except InputError as error:
        reason = str(error)
    if record and other_content(meta.get("data"), record.fingerprint):
        record = None  # of another run, or of other images than the newest checkpoint
    num_images = record.num_images if record else None
    if images:
        try:
            source = open_config_source(config, may_download=False)
            found, look = _see(workdir, config, model, source, record, splits, look=bool(sizes))
            num_images = num_images or found
        except InputError as error:
            reason = str(error)
    num_steps, steps_per_epoch = _length(config, record, num_images, history, probes)
    facts = Facts(
        name=workdir.resolve().name,
        workdir=workdir,
        config=config,
        history=history,
        probes=probes,
        status=_status(workdir, history, num_steps),
        stopped_by="",
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        params={**params, "target_encoder": num_params(state.target_params)},
        checkpoints=sizes,
        meta=meta,
        look=look,
        no_look=reason,
        width=model.context_encoder.width,
    )
    rule = _stopped_by(facts) if facts.status == "interrupted" else ""
    return dataclasses.replace(facts, status="stopped", stopped_by=rule) if rule else facts


def _see(
    workdir: pathlib.Path,
    config: Config,
    model: Any,
    source: Source,
    record: RunRecord | None,
    splits: tuple[Split, Split] | None,
    *,
    look: bool,
) -> tuple[int, Look | None]:
    """The number of training images, and what the newest checkpoint makes of some of them.

    Args:
      workdir: the run's directory.
      config: its config.
      model: its networks.
      source: of its data.
      record: its run.json, if there is one.
      splits: the run's images, where they are in memory.
      look: whether there is a checkpoint to look at.

    Raises:
      InputError: if images or checkpoint cannot be read, or the images are not those of the run.
    """
    if not look:
        return source.num_images, None
    train, _ = splits or source.load()
    if record and splits is None:
        images = fingerprint(train, source.records)
        if not same_content(images, record.fingerprint):
            rule = "holds other images than the run was trained on"
            if why_redrawn(config.data.source, record.fingerprint, images):
                rule = "was redrawn since this run was trained"
            raise InputError("data.source", config.data.source, rule)
    # Without a folder's files that are no images.
    num_images = len(train.images) if source.records is None else source.num_images
    return num_images, _look(workdir, config, model, train, source.info.class_names)


def _length(
    config: Config,
    record: RunRecord | None,
    num_images: int | None,
    history: History,
    probes: list[Row],
) -> tuple[int | None, int | None]:
    """Steps of the run and of an epoch; None for what is not known.

    run.json has both. Without one, the data or the probes may tell the number of images. If they
    do not, the scores that a run logs after its last step still tell where it ended.
    """
    if record:
        return record.num_steps, record.steps_per_epoch
    if num_images is None:
        num_images = _probed_size(config, rows_on(config.data.source, probes))
    if num_images:
        try:
            schedules = build.build_schedules(config, num_images)
            return schedules.num_steps, schedules.steps_per_epoch
        except InputError:  # the data is no longer what was trained on
            pass
    ended = bool(history.lines) and "eval/linear_top1" in history.lines[-1]
    return config.train.num_steps or (history.last_step() if ended else None), None


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
    if not history.lines:
        return "not started"
    if num_steps is None:
        return "unknown"
    return "finished" if history.last_step() >= num_steps else "interrupted"


def _stopped_by(facts: Facts) -> str:
    """The rule of the config that ended a run which is not at its last step; empty for none."""
    c, count = facts.config.train, facts.history.last("train/nonfinite_steps") or 0
    if count > c.max_nonfinite_steps:
        return f"more than train.max_nonfinite_steps={c.max_nonfinite_steps} were left out"
    signs = facts.signs_in_log()
    return (
        f"train.on_collapse=stop: {'; '.join(signs)}" if c.on_collapse == "stop" and signs else ""
    )


def _look(
    workdir: pathlib.Path, config: Config, model: Any, train: Split, class_names: tuple[str, ...]
) -> Look:
    _, state, initial = checkpoint.load_state(workdir)
    snapshot = jax.jit(build.build_snapshot_fn(config, model))
    embed = jax.jit(build.build_embed_fn(config, model))
    bank, queries = hold_out(len(train.images), num_val=config.eval.num_val)
    bank, queries = (
        rows[:: max(1, math.ceil(len(rows) / count))]
        for rows, count in ((bank, BANK_SIZE), (queries, NUM_QUERIES))
    )

    def features(params: Any, rows: Any) -> dict[str, Any]:
        batch_size = config.eval.batch_size
        return extract_features(embed, params, train.images[rows], batch_size=batch_size)

    bank_x, query_x = (features(state.target_params, rows) for rows in (bank, queries))
    untrained = features(initial.target_params, queries)["level_0"]
    name, best_bank, best_queries = _best_features(bank_x, query_x, train.labels[bank])
    (predictions,) = knn_predict(
        best_bank, train.labels[bank], best_queries, ks=[min(KNN_K, len(bank))],
        num_classes=int(train.labels.max()) + 1,
    )  # fmt: skip
    shown, k = best_queries[:NUM_SHOWN], min(NUM_NEIGHBOURS, len(bank))
    found = bank[nearest_rows(best_bank, shown, k=k)]
    return Look(
        step=int(state.step),
        snapshot=jax.device_get(
            snapshot(state.params, state.target_params, fixed_images(train.images))
        ),
        features=query_x,
        verdict=_verdict(query_x["level_0"], untrained),
        best=name,
        best_features=best_queries,
        labels=train.labels[queries],
        predictions=predictions,
        class_names=class_names,
        images=train.images[queries],
        neighbours=train.images[found],
        same_class=train.labels[found] == train.labels[queries[:NUM_SHOWN]][:, None],
        bank_size=len(bank),
    )


def _best_features(
    bank_x: Features, query_x: dict[str, Float[np.ndarray, "Q _"]], bank_y: Int[np.ndarray, " n"]
) -> tuple[str, Float[np.ndarray, "n D"], Float[np.ndarray, "Q D"]]:
    """The representation with the best k-NN score: in words, of the bank and of the queries.

    A fifth of the bank is scored beside the rest of it, so that the queries decide nothing.
    Equal scores go to the first of `representations`, which has the fewest dimensions.
    """
    of_bank, of_queries = (representations(x) for x in (bank_x, query_x))
    best, best_score = 0, -1.0
    fit = val = np.arange(len(bank_y))
    if len(bank_y) >= MIN_ROWS:
        fit, val = hold_out(len(bank_y), num_val=len(bank_y))  # a fifth at most
    for i, (_, _, x) in enumerate(of_bank):
        (predicted,) = knn_predict(
            x[fit], bank_y[fit], x[val], ks=[min(KNN_K, len(fit))],
            num_classes=int(bank_y.max()) + 1,
        )  # fmt: skip
        if (score := float((predicted == bank_y[val]).mean())) > best_score:
            best, best_score = i, score
    pool, level, x = of_bank[best]
    levels = "all levels" if level == "all" else f"level {level}"
    name = {
        "mean": f"{levels}, mean over patches",
        "summary": "summary tokens",
        "concat": f"{levels} and summary tokens",
    }[pool]
    return name, x, of_queries[best][2]


def _verdict(x: Float[np.ndarray, "Q _"], untrained: Float[np.ndarray, "Q _"]) -> Verdict:
    """Whether features have collapsed, beside those of the untrained network."""
    found, before = collapse_verdict(x), collapse_verdict(untrained)
    spread, start = (Spread(v.effective_rank, v.relative_std) for v in (found, before))
    limits = find_limits(max_rank=found.max_rank, untrained=start)
    return Verdict(
        label=limits.label(spread),
        relative_std=found.relative_std,
        effective_rank=found.effective_rank,
        max_rank=found.max_rank,
        min_relative_std=limits.relative_std,
        min_rank_fraction=limits.effective_rank / found.max_rank,
    )
