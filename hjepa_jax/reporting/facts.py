"""Facts about a run, read from its work directory and, for pictures, its data."""

import dataclasses
import datetime
import functools
import pathlib
from typing import Any

import jax
import optax

from hjepa_jax.config import Config, build
from hjepa_jax.data.base import Split
from hjepa_jax.data.fingerprint import fingerprint, other_content, same_content, why_redrawn
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.collapse import (
    PATIENCE,
    Limits,
    find_limits,
    spread_of,
    untrained_spread,
)
from hjepa_jax.method.window import FEATURE_ROWS
from hjepa_jax.reporting.look import Look, look_at
from hjepa_jax.runs.checkpoint_meta import read_newest_meta
from hjepa_jax.runs.history import History, read_history
from hjepa_jax.runs.lock import lock_owner
from hjepa_jax.runs.record import RunRecord, read_record
from hjepa_jax.runs.run import num_params, open_config_source
from hjepa_jax.runs.scores import Row, read_probe_json, rows_on, steps_if_outdated
from hjepa_jax.runs.workdir import checkpoint_sizes, load_config


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run as its work directory describes it.

    Attributes:
      name: name of the work directory.
      workdir: path of the work directory, as given by the user.
      config: config with which the run was started last.
      history: its metrics.jsonl.
      probes: rows of its probe.json, on any data.
      status: "finished", "running", "interrupted", "stopped" (by a rule of the config), "not
        started", or "unknown" if the number of steps is not known.
      stopped_by: the rule that ended the run, with its numbers; "" if none did.
      num_steps, steps_per_epoch: None if unknown, because run.json is missing.
      params: number of parameters by part.
      checkpoints: bytes by step.
      meta: origin of the newest checkpoint; empty without a checkpoint.
      look: None if the checkpoint or the images are missing; `no_look` says why.
      width: width of the encoder.
      has_classes: whether labels of several classes judge the run; True if unknown.
      command: command line of its newest start; "" if unknown.
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
    has_classes: bool
    command: str

    @property
    def own_probes(self) -> list[Row]:
        """Rows of one seed on the data set that the run is evaluated on; see `rows_on`."""
        return rows_on(self.config.eval.data or self.config.data.source, self.probes)

    @property
    def ended(self) -> str:
        """Returns the date of the newest log line; "" if unknown."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return ""
        when = datetime.datetime.fromtimestamp(path.stat().st_mtime)
        return f"{when:%Y-%m-%d %H:%M}"

    @property
    def device_memory(self) -> int | None:
        """Returns the bytes of memory of the device of the run; None if unknown."""
        memory = self.meta.get("versions", {}).get("device memory", "")
        return int(memory) if memory.isdecimal() else None

    @property
    def max_rank(self) -> int:
        """Returns the largest possible value of train/effective_rank."""
        batch = min(self.config.train.batch_size, FEATURE_ROWS)
        return min(batch * (FEATURE_ROWS // batch) - 1, self.width)

    @functools.cached_property
    def limits(self) -> Limits:
        """Effective rank and relative std below which features count as collapsed."""
        batch_size = self.config.train.batch_size
        untrained = untrained_spread(self.history.lines, batch_size=batch_size)
        return find_limits(max_rank=self.max_rank, untrained=untrained)

    def signs_in(self, line: dict[str, Any]) -> list[str]:
        """Returns the signs of a collapse in one line of the history.

        The standard deviation is needed as well, because constant features with rounding noise have
        full rank.
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
        """Returns the signs in the newest line, if each of the last `PATIENCE` lines has signs."""
        newest = [x for x in self.history.lines if spread_of(x)][-PATIENCE:]
        return self.signs_in(newest[-1]) if newest and all(map(self.signs_in, newest)) else []

    def signs_of_collapse(self) -> list[str]:
        """Returns the signs of a collapse in the log and in the newest checkpoint."""
        found, look = self.signs_in_log(), self.look
        if look and look.verdict.label != "healthy":
            found.append(f"{look.verdict.label} at the checkpoint of step {look.step}")
        return found

    def judged(self, protocol: str) -> str:
        """Returns the step of the scores of a protocol in words; "" if it is the newest step."""
        outdated = steps_if_outdated(self.own_probes, protocol, self.history.last_step())
        return f", scored at {outdated}" if outdated else ""


def read_facts(
    workdir: pathlib.Path, *, images: bool, splits: tuple[Split, Split] | None = None
) -> Facts:
    """Reads the work directory of a run that is finished, interrupted or still training.

    Nothing is downloaded: if its data is missing, the run is described without pictures.

    Args:
      workdir: the work directory.
      images: whether to read the newest checkpoint and the training images.
      splits: images of the run, if they are in memory.

    Raises:
      InputError: the directory holds no run of this version ("--workdir").
    """
    config = load_config(workdir)
    history = read_history(workdir / "metrics.jsonl")
    probes = read_probe_json(workdir / "probe.json")
    model = build.build_model(config)
    state = jax.eval_shape(build.build_create_state(config, model, optax.identity()))
    params = {name: num_params(tree) for name, tree in sorted(state.params.items())}
    sizes = checkpoint_sizes(workdir)
    meta, reason = _read_meta(workdir, sizes, images)
    record = read_record(workdir)
    if record and other_content(meta.get("data"), record.fingerprint):
        record = None  # belongs to another run, or to other images
    look = None
    if images and sizes:
        try:
            look = _see(workdir, config, model, record, splits)
        except InputError as error:
            reason = str(error)
    num_steps = record.num_steps if record else config.train.num_steps
    facts = Facts(
        name=workdir.resolve().name,
        workdir=workdir,
        config=config,
        history=history,
        probes=probes,
        status=_status(workdir, history, num_steps),
        stopped_by="",
        num_steps=num_steps,
        steps_per_epoch=record.steps_per_epoch if record else None,
        params={**params, "target_encoder": num_params(state.target_params)},
        checkpoints=sizes,
        meta=meta,
        look=look,
        no_look=reason,
        width=model.context_encoder.width,
        has_classes=not record or len(record.class_names) > 1 or config.eval.data is not None,
        command=record.command if record else "",
    )
    rule = _stopped_by(facts) if facts.status == "interrupted" else ""
    return dataclasses.replace(facts, status="stopped", stopped_by=rule) if rule else facts


def _read_meta(
    workdir: pathlib.Path, sizes: dict[int, int], images: bool
) -> tuple[dict[str, Any], str]:
    """Returns the origin of the newest checkpoint, and the reason why there are no pictures."""
    if not sizes:
        return {}, "there is no checkpoint yet"
    try:
        return read_newest_meta(workdir), "" if images else "not asked for (--noimages)"
    except InputError as error:
        return {}, str(error)


def _see(
    workdir: pathlib.Path,
    config: Config,
    model: Any,
    record: RunRecord | None,
    splits: tuple[Split, Split] | None,
) -> Look:
    """Applies the newest checkpoint to training images.

    Raises:
      InputError: images or checkpoint cannot be read, or the run used other images.
    """
    source = open_config_source(config, may_download=False)
    train, _ = splits or source.load()
    if record and splits is None:
        images = fingerprint(train, source.records)
        if not same_content(images, record.fingerprint):
            rule = "holds other images than the run was trained on"
            if why_redrawn(config.data.source, record.fingerprint, images):
                rule = "was redrawn since this run was trained"
            raise InputError("data.source", config.data.source, rule)
    return look_at(workdir, config, model, train, source.info.class_names)


def _status(workdir: pathlib.Path, history: History, num_steps: int | None) -> str:
    if lock_owner(workdir):
        return "running"
    if not history.lines:
        return "not started"
    if num_steps is None:
        return "unknown"
    return "finished" if history.last_step() >= num_steps else "interrupted"


def _stopped_by(facts: Facts) -> str:
    """Returns the rule of the config that ended a run before its last step; "" if none did."""
    c, count = facts.config.train, facts.history.last("train/nonfinite_steps") or 0
    if count > c.max_nonfinite_steps:
        return f"more than train.max_nonfinite_steps={c.max_nonfinite_steps} were left out"
    signs = facts.signs_in_log()
    return (
        f"train.on_collapse=stop: {'; '.join(signs)}" if c.on_collapse == "stop" and signs else ""
    )
