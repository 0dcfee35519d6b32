"""train_and_evaluate(config, workdir): build, restore, loop, log, probe, save."""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time
import zlib
from types import FrameType
from typing import Any

import jax
import numpy as np

from hjepa_jax import build, cluster, metrics
from hjepa_jax.alarms import Alarms
from hjepa_jax.checkpoint import BEST_METRIC, Checkpoints
from hjepa_jax.config import Config, validate
from hjepa_jax.data.pipeline import BatchOrder
from hjepa_jax.data.sources import Source, Split, fingerprint, first_line
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import extract_features
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.protocols import Protocol
from hjepa_jax.evaluation.results import headline_scores
from hjepa_jax.judge import judge_run
from hjepa_jax.logging import Progress, RunLogger, SilentLogger, StepTimer, peak_memory_bytes
from hjepa_jax.platform import current_rules, select_platform
from hjepa_jax.run import (
    Run,
    build_run,
    locked,
    num_params,
    open_config_source,
    prepare_workdir,
    writing,
)
from hjepa_jax.showcase import Showcase
from hjepa_jax.train_state import TrainState

# Neighbours of the k-NN score during training; the protocol at the end chooses k by itself.
ONLINE_KNN_K = 20


class Interrupted(Exception):
    """The run was asked to stop by `signum`; its state at `step` is saved."""

    def __init__(self, signum: int, step: int):
        self.signum, self.step = signum, step
        super().__init__(f"{signal.Signals(signum).name} at step {step}")


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Trains, or goes on with, the run in `workdir`, and probes it at the end.

    Of several processes (`cluster.member`) all call it; the first alone writes, and probes when the
    others have left.

    Args:
      config: a complete config.
      workdir: the run's directory; made if need be.

    Returns:
      The rows of probe.json; none when `eval.probe_at_end` is off, or not in the first process.

    Raises:
      InputError: for input that the user can correct.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    validate(config)
    backend = select_platform(config.platform, cpu_devices=config.parallel.cpu_devices)
    source = open_config_source(config)
    run = build_run(config, source)
    with cluster.first_process_first():
        train, test = source.load()
    if len(train.images) != source.info.num_train:  # a folder's files that are no images
        counts = {"num_train": len(train.images), "num_test": len(test.images)}
        source = dataclasses.replace(source, info=dataclasses.replace(source.info, **counts))
        run = build_run(config, source)
    _check_same_everywhere(config, train)
    with contextlib.ExitStack() as held, writing(workdir):

        def claim() -> None:
            prepare_workdir(config, workdir)
            held.enter_context(locked(workdir))

        cluster.by_first(claim)
        try:
            rows = _train_and_judge(run, source, train, test, workdir, backend)
        except InputError as error:  # too many steps that are not finite, a collapse, a full disk
            cluster.leave(str(error))
            _report(config, workdir, (train, test))
            raise
        _report(config, workdir, (train, test))
        return rows


def _check_same_everywhere(config: Config, train: Split) -> None:
    """Processes that compute different things would wait for each other, or worse, would not."""
    shared = config.to_dict()
    del shared["data"]["dir"]  # each machine may have its own
    for field, value in (("--config", shared), ("data.source", fingerprint(train))):
        digest = zlib.crc32(json.dumps(value).encode()) >> 1
        cluster.check_same(field, config.data.source if field != "--config" else "", digest)


def _report(config: Config, workdir: pathlib.Path, splits: tuple[Split, Split]) -> None:
    """Writes the run's report. Whatever goes wrong with it, the run has ended as it has."""
    if not config.log.report or not cluster.is_first():
        return
    try:
        from hjepa_jax.publish import write_report  # matplotlib takes its time to load

        write_report([workdir], workdir, splits=splits)
    except Exception as error:
        message = f"warning: no report could be written: {first_line(error)}; try python -m"
        print(f"{message} hjepa_jax.report --workdir={workdir}", file=sys.stderr, flush=True)


def _train_and_judge(
    run: Run, source: Source, train: Split, test: Split, workdir: pathlib.Path, backend: str
) -> list[dict[str, Any]]:
    """What `train_and_evaluate` does once everything is built and the workdir is ours."""
    config = run.config
    checkpoints = Checkpoints(workdir, config=config, data=fingerprint(train), owner=True)
    state, window = run.create()
    if checkpoints.latest_step() is not None:
        state, window = checkpoints.restore(state, window)
    logger = SilentLogger()
    if cluster.is_first():
        tensorboard, step = config.log.tensorboard, int(state.step)
        logger = RunLogger(workdir, tensorboard=tensorboard, resume_step=step)
    try:
        try:
            state = _Loop(run, train, checkpoints, logger, backend).run(state, window)
            encoders = {"target": state.target_params, "random_init": run.create()[0].target_params}
            encoders = run.placement.local(encoders)
        finally:
            checkpoints.close()
        cluster.leave()
        if not config.eval.probe_at_end or not cluster.is_first():
            return []
        print("probes, chosen on held-out training images, scored on the test images:", flush=True)
        rows = judge_run(
            workdir,
            config,
            run.model,
            encoders,
            train,
            test,
            source=source,
            step=int(state.step),
            protocol=Protocol(num_val=config.eval.num_val, batch_size=config.eval.batch_size),
        )
        logger.scalars(int(state.step), headline_scores(rows))
        return rows
    finally:
        logger.close()


class _Loop:
    """Dispatches steps, and at their times logs, evaluates and saves."""

    def __init__(
        self,
        run: Run,
        train: Split,
        checkpoints: Checkpoints,
        logger: RunLogger,
        backend: str,
    ):
        c, steps_per_epoch = run.config, run.schedules.steps_per_epoch
        self._run, self._config, self._schedules = run, c, run.schedules
        self._train, self._checkpoints, self._logger = train, checkpoints, logger
        self._backend = backend
        self._order = BatchOrder(len(train.images), c.train.batch_size, c.seed)
        self._progress = Progress(run.schedules.num_steps, steps_per_epoch)
        self._timer = StepTimer()
        self._alarms = Alarms(
            max_nonfinite_steps=c.train.max_nonfinite_steps,
            on_collapse=c.train.on_collapse,
            say=self._progress.note,
            newest_checkpoint=checkpoints.latest_step,
        )
        self._embed = jax.jit(build.build_embed_fn(c, run.model))
        self._save_every = c.train.checkpoint_every_steps or max(
            1, round(c.train.checkpoint_every_epochs * steps_per_epoch)
        )
        # 0 for never; a fraction of a short epoch is still one step.
        self._eval_every = math.ceil(c.eval.every_epochs * steps_per_epoch)
        shows_every = c.log.figures_every_epochs if c.log.tensorboard else 0
        self._show_every = math.ceil(shows_every * steps_per_epoch)
        self._showcase = Showcase(run, train.images, logger)

    def run(self, state: TrainState, window: metrics.LogWindow) -> TrainState:
        """Runs from the state's step to the last one.

        Raises:
          Interrupted: when a signal asked for it.
        """
        num_steps, step = self._schedules.num_steps, int(state.step)
        if step >= num_steps:
            print(f"already trained: step {step} of {num_steps}")
            return state
        rules = current_rules()
        size = min(self._config.train.steps_per_call, num_steps) if rules.loops else 1
        started = time.perf_counter()
        run_steps = self._run.lower(steps_per_call=size, donate=rules.donates).compile()
        place = self._run.placement
        images = place.put(self._train.images, place.whole)
        print(
            f"{num_params(state.params):,} trainable parameters on {self._backend}"
            + (f" ({rules})" if str(rules) else "")
            + f", compiled in {time.perf_counter() - started:.1f} s, "
            + (f"going on at step {step}" if step else "starting"),
            flush=True,
        )
        if step == 0:
            self._showcase.introduce(state)
            if self._show_every:
                self._show(state, window)
        cluster.meet()  # compiling and drawing take each process its own time
        with _StopSignals() as stop:
            self._timer.restart()
            while step < num_steps:
                count = min(size, self._next_stop(step) - step)
                before = time.perf_counter()
                index = place.put(self._order.batches(step, count, size=size), place.batches)
                data_wait = time.perf_counter() - before
                state, window = run_steps(state, window, images, index, np.int32(count))
                step += count
                self._timer.add_steps(count, data_wait)
                signum = self._agreed(stop.signum, step)
                window = self._end_call(state, window, step, signum)
                if signum and step < num_steps:
                    raise Interrupted(signum, step)
        self._progress.end()
        return state

    def _agreed(self, signum: int | None, step: int) -> int | None:
        """The signal on which the run stops at this step, read once: what comes later can wait.

        Of several processes some may have got it earlier than others. They ask each other where
        they meet anyway, at the lines of the log.
        """
        if jax.process_count() > 1 and step % self._config.log.every_steps:
            return None
        return cluster.largest(signum or 0) or None

    def _next_stop(self, step: int) -> int:
        """The next step after which the host has something to do."""
        periods = (
            self._config.log.every_steps, self._save_every, self._eval_every, self._show_every,
        )  # fmt: skip
        stops = [step + period - step % period for period in periods if period]
        return min(*stops, self._schedules.num_steps)

    def _end_call(
        self, state: TrainState, window: metrics.LogWindow, step: int, signum: int | None
    ) -> metrics.LogWindow:
        """Logs, evaluates and saves where `step` asks for it; returns the window to go on with."""
        last = step == self._schedules.num_steps
        if step % self._config.log.every_steps == 0 or last:
            window = self._log(window, step)
        evaluates = self._eval_every and (step % self._eval_every == 0 or last)
        saves = step % self._save_every == 0 or last or evaluates or signum
        shows = self._show_every and (step % self._show_every == 0 or last)
        if evaluates or saves or shows:
            jax.block_until_ready(state)  # the steps under way belong to training time
            self._alarms.check_finite(window, step)  # before a save could replace a good one
        paused = time.perf_counter()
        scores = self._evaluate(state, step) if evaluates else {}
        self._logger.end_line()
        if saves:
            self._checkpoints.save(state, window, scores=scores)
            if last or signum:
                self._checkpoints.wait()
        if shows and not signum:
            self._show(state, window)
        self._timer.add_pause(time.perf_counter() - paused)
        return window

    def _show(self, state: TrainState, window: metrics.LogWindow) -> None:
        state = self._run.placement.local(dataclasses.replace(state, opt_state=None))
        if cluster.is_first():
            self._showcase.show(state, window)

    def _log(self, window: metrics.LogWindow, step: int) -> metrics.LogWindow:
        """Writes the window's metrics, and says what is wrong with them."""
        batch_size = self._config.train.batch_size
        verdict = metrics.spread(window, step=step, batch_size=batch_size)
        values = metrics.summarize(window, verdict)
        rates = self._timer.rates(batch_size)
        self._logger.scalars(
            step,
            {
                **{f"train/{k}": v for k, v in values.items() if math.isfinite(v)},
                "train/nonfinite_steps": int(window.nonfinite.count),
                "train/learning_rate": float(self._schedules.learning_rate_fn(step)),
                "train/weight_decay": float(self._schedules.weight_decay_fn(step)),
                "train/ema_momentum": float(self._schedules.ema_momentum_fn(step)),
                **rates,
                "perf/peak_memory_bytes": peak_memory_bytes(jax.local_devices()[0]),
            },
        )
        self._progress.show(
            step,
            loss=values["loss"],
            images_per_sec=rates["perf/images_per_sec"],
            steps_per_sec=rates["perf/steps_per_sec"],
        )
        self._alarms.check_finite(window, step)
        if verdict:
            self._alarms.check_spread(verdict, step)
        self._timer.restart()
        place = self._run.placement
        return place.put(metrics.reset_averages(window), place.whole)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """k-NN accuracy on held-out training images: target encoder, level 0, mean pool."""
        c, (images, labels) = self._config.eval, (self._train.images, self._train.labels)
        bank, queries = hold_out(len(images), num_val=c.num_val)
        bank = bank[:: max(1, len(bank) // c.knn_bank_size)][: c.knn_bank_size]
        params = self._run.placement.local(state.target_params)

        def features(rows: Any) -> Any:
            chosen = images[rows]
            return extract_features(self._embed, params, chosen, batch_size=c.batch_size)["level_0"]

        own = queries[jax.process_index() :: jax.process_count()]
        (predictions,) = knn_predict(
            cluster.divided(features, bank),
            labels[bank],
            features(own),
            ks=[min(ONLINE_KNN_K, len(bank))],
            num_classes=int(labels.max()) + 1,
        )
        correct = cluster.all_rows(np.array([np.sum(predictions == labels[own])], np.int32))
        top1 = float(correct.sum() / len(queries))
        self._logger.scalars(step, {BEST_METRIC: top1})
        self._progress.note(f"k-NN on held-out training images at step {step}: {100 * top1:.1f} %")
        return {BEST_METRIC: top1}


class _StopSignals:
    """Within the context SIGINT and SIGTERM ask to stop, by `signum`; a second SIGINT kills."""

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[signum] = signal.signal(signum, self._handle)
            except ValueError:  # not the main thread: signals are not ours to handle
                break
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        print("\nstopping after this step; once more (Ctrl-C) to stop at once", flush=True)
