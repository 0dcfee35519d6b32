"""The training loop: runs steps, and regularly logs, evaluates, draws pictures and saves."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hjepa_jax.config import build
from hjepa_jax.data.base import Split
from hjepa_jax.data.order import BatchOrder, ResidentBatches
from hjepa_jax.data.records import Records, report_skipped, unreadable_errors
from hjepa_jax.data.rows import spread_rows
from hjepa_jax.errors import InputError, Interrupted, first_line
from hjepa_jax.evaluation.features import Features, extract_features
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow, reset_averages
from hjepa_jax.reporting.showcase import Showcase
from hjepa_jax.runs.best import BEST_METRIC
from hjepa_jax.runs.checkpoint import Checkpoints
from hjepa_jax.runs.history import read_lines
from hjepa_jax.runs.logger import RunLogger
from hjepa_jax.runs.progress import Progress, StepTimer, peak_memory_bytes
from hjepa_jax.runs.run import Program, Run
from hjepa_jax.runs.workdir import writing
from hjepa_jax.runtime import cluster
from hjepa_jax.runtime.host_memory import return_unused_memory
from hjepa_jax.training.alarms import Alarms, spread, summarize
from hjepa_jax.training.stop_signals import StopSignals

# Maximum number of queued calls: keeps the device busy and Ctrl-C quick.
MAX_CALLS_UNDER_WAY = 2

# Share of the machine's memory. If the process holds more, freed memory is returned.
_FULL = 0.5

# Number of neighbours of the k-NN score during training. The final probe chooses its own.
ONLINE_KNN_K = 20


class Loop:
    """Runs steps, and regularly logs, evaluates and saves."""

    def __init__(
        self,
        run: Run,
        workdir: pathlib.Path,
        train: Split,
        images: Callable[[], Any],
        records: Records | None,
        checkpoints: Checkpoints,
        logger: RunLogger,
        program: Program | None,
        *,
        judged: Split | None,
    ):
        c, steps_per_epoch = run.config, run.schedules.steps_per_epoch
        self._run, self._config, self._schedules = run, c, run.schedules
        self._images = images  # returns the images to train on; `train` is only for pictures
        self._checkpoints, self._logger = checkpoints, logger
        self._judged = judged  # labelled images for k-NN; None = no k-NN
        self._workdir, self._records = workdir, records
        self._unreadable: set[int] = set()  # unreadable rows that this process has found
        self._program = program
        num_images = len(train.images) if records is None else len(records)
        self._order = BatchOrder(num_images, c.train.batch_size, c.seed)
        self._progress = Progress(run.schedules.num_steps, steps_per_epoch)
        self._timer = StepTimer()
        self._alarms = Alarms(
            max_nonfinite_steps=c.train.max_nonfinite_steps,
            on_collapse=c.train.on_collapse,
            say=self._progress.note,
            newest_checkpoint=checkpoints.latest_step,
            batch_size=c.train.batch_size,
        )
        self._embed = jax.jit(build.build_embed_fn(c, run.model))
        self._save_every = c.train.checkpoint_every_steps or max(
            1, round(c.train.checkpoint_every_epochs * steps_per_epoch)
        )
        # 0 = never; rounded up to whole steps.
        self._eval_every = 0
        if judged is not None:
            self._eval_every = math.ceil(c.eval.every_epochs * steps_per_epoch)
        shows_every = c.log.figures_every_epochs if c.log.tensorboard else 0
        self._show_every = math.ceil(shows_every * steps_per_epoch)
        self._showcase = Showcase(
            run, train.images, logger, name="/".join(workdir.resolve().parts[-2:])
        )

    def run(self, state: TrainState, window: LogWindow, begin: Callable[[], None]) -> TrainState:
        """Runs from the state's step to the last one.

        Args:
          state: the state to start from.
          window: metrics since the last log line.
          begin: called in all processes before the first step.

        Raises:
          Interrupted: if a signal stops the run.
          InputError: if too many steps are not finite, the features collapse, the images cannot be
            read or the work directory cannot be written.
        """
        num_steps, step = self._schedules.num_steps, int(state.step)
        if self._program is None:
            begin()
            print(f"already trained: step {step} of {num_steps}")
            return state
        with writing(self._workdir):
            self._remember(step)
        run_steps, size = self._program
        begin()
        cluster.meet()  # processes may take different times to compile
        place = self._run.placement
        numbers = place.put(self._schedules.numbers, place.whole)
        with self._batches(step, size) as batches, StopSignals() as stop:
            if step == 0:
                with writing(self._workdir):
                    self._introduce(state, window)
            self._timer.restart()
            under_way: collections.deque[Any] = collections.deque()
            while step < num_steps:
                count = min(size, self._next_stop(step) - step)
                self._wait(state, under_way)
                before = time.perf_counter()
                images, index = self._take(batches, step, count)
                data_wait = time.perf_counter() - before
                state, window = run_steps(state, window, images, index, np.int32(count), numbers)
                under_way.append(state.step + 0)  # a copy, because the next call donates the state
                step += count
                self._timer.add_steps(count, data_wait)
                self._tick(window, step)
                return_unused_memory(above=0.0 if self._logs_at(step) else _FULL)
                signum = self._agreed(stop.signum, step)
                with writing(self._workdir):
                    window = self._end_call(state, window, step, signum)
                if signum:
                    raise Interrupted(signum, step)
            if signum := self._agreed(stop.signum, step):  # received during the last save
                raise Interrupted(signum, step)
        self._progress.end()
        return state

    def _tick(self, window: LogWindow, step: int) -> None:
        """Shows step and loss between two log lines, if the progress line is due."""
        if self._progress.is_due() and not self._logs_at(step):
            # Waits for the queued steps. The mean is computed on the host, because processes do not
            # reach this point at the same step.
            with np.errstate(invalid="ignore"):  # NaN without a finite step
                loss = float(jax.device_get(window.averages.loss).compute())
            self._show_progress(step, loss, self._timer.rates(self._config.train.batch_size))

    def _show_progress(self, step: int, loss: float, rates: dict[str, float]) -> None:
        speed = {name: rates[f"perf/{name}"] for name in ("images_per_sec", "steps_per_sec")}
        self._progress.show(step, loss=loss, **speed)

    def _wait(self, state: TrainState, under_way: collections.deque[Any]) -> None:
        """Waits until another call may be queued on the device."""
        if self._records is not None:  # limits the number of streamed batches on the device
            jax.block_until_ready(state)
            under_way.clear()
        elif len(under_way) == MAX_CALLS_UNDER_WAY:
            jax.block_until_ready(under_way.popleft())

    def _remember(self, step: int) -> None:
        """Passes the log up to `step` to the alarms, in every process."""
        lines = read_lines(self._workdir / "metrics.jsonl")
        self._alarms.remember(itertools.takewhile(lambda line: line["step"] <= step, lines))

    def _introduce(self, state: TrainState, window: LogWindow) -> None:
        """Sends texts and the pictures of step 0 to TensorBoard, which loads slowly."""
        if self._config.log.tensorboard and cluster.is_first():
            what = " and drawing the first pictures" if self._show_every else ""
            print(f"opening TensorBoard's files{what} ...", flush=True)
        self._showcase.introduce(state)
        if self._show_every:
            local = self._run.placement.local(dataclasses.replace(state, opt_state=None))
            if cluster.is_first():
                self._showcase.show(local, window)
        cluster.meet()  # the other processes wait for process 0 here, not inside a step

    def _agreed(self, signum: int | None, step: int) -> int | None:
        """Returns the signal that stops the run at this step, or None.

        Several processes may receive a signal at different steps. So they agree on it at log lines,
        where they synchronise anyway.
        """
        if jax.process_count() > 1 and not self._logs_at(step):
            return None
        return cluster.largest(signum or 0) or None

    def _logs_at(self, step: int) -> bool:
        return step % self._config.log.every_steps == 0 or step == self._schedules.num_steps

    @contextlib.contextmanager
    def _batches(self, step: int, size: int) -> Iterator[Any]:
        """Yields the source of batches from `step` on, for calls of up to `size` steps."""
        place, records, c = self._run.placement, self._records, self._config
        shape = self._run.batch_shape
        if records is None:
            found = self._images()
            num_bytes = found.nbytes
            if jax.device_count() > 1 and num_bytes >= 2**30:
                each = f"{num_bytes / 2**30:.1f} GiB on each of {jax.device_count()} devices"
                print(f"training images: {each}", flush=True)
            images = place.put(found, place.whole)
            put = functools.partial(place.put, shardings=place.batches_of(shape))
            yield ResidentBatches(images, self._order, size=size, batch_shape=shape, put=put)
            return
        from hjepa_jax.data import streaming  # grain loads slowly

        decoded = streaming.read_batches(
            records,
            self._order,
            step,
            self._schedules.num_steps,
            num_workers=c.data.num_workers,
            num_parts=c.optim.accumulation_steps,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )
        put = functools.partial(place.put_own_batches, batch_shape=shape)
        batches = streaming.StreamedBatches(decoded, size=size, put=put)
        self._unreadable = batches.unreadable
        try:
            yield batches
        finally:
            batches.close()
            errors = unreadable_errors(records, batches.unreadable)
            what = f"{len(records)} images (the next was trained on instead)"
            report_skipped(c.data.source, errors, what)

    def _take(self, batches: Any, step: int, count: int) -> tuple[Any, Any]:
        try:
            return batches.take(step, count)
        except OSError as error:
            rule = f"can no longer be read ({first_line(error)})"
            raise InputError("data.source", self._config.data.source, rule) from error

    def _next_stop(self, step: int) -> int:
        """Returns the next step after which the host logs, saves, evaluates or shows."""
        periods = (
            self._config.log.every_steps, self._save_every, self._eval_every, self._show_every,
        )  # fmt: skip
        stops = [step + period - step % period for period in periods if period]
        return min(*stops, self._schedules.num_steps)

    def _end_call(
        self, state: TrainState, window: LogWindow, step: int, signum: int | None
    ) -> LogWindow:
        """Logs, evaluates, saves and draws pictures if due; returns the next metrics window."""
        last = step == self._schedules.num_steps
        if self._logs_at(step):
            window = self._log(window, step)
        evaluates = self._eval_every and (step % self._eval_every == 0 or last)
        saves = step % self._save_every == 0 or last or evaluates or signum
        shows = self._show_every and (step % self._show_every == 0 or last)
        if evaluates or saves or shows:
            jax.block_until_ready(state)  # queued steps count as training time
            self._check_finite(window, step)  # before a save replaces a good checkpoint
        paused = time.perf_counter()
        scores = self._evaluate(state, step) if evaluates else {}
        self._logger.end_line()
        if saves:
            self._checkpoints.save(state, window, scores=scores)
            if last or signum:
                self._checkpoints.wait()
        if shows and not signum:
            self._show(state, window, step)
        self._timer.add_pause(time.perf_counter() - paused)
        return window

    def _ema_momentum(self, step: int) -> dict[str, float]:
        if self._config.model.target == "online":  # without an EMA
            return {}
        return {"train/ema_momentum": float(self._schedules.ema_momentum_fn(step))}

    def _check_finite(self, window: LogWindow, step: int) -> None:
        """Calls `Alarms.check_finite`; logs the count if this ends the run."""
        try:
            self._alarms.check_finite(window, step)
        except InputError:
            self._logger.scalars(step, {"train/nonfinite_steps": int(window.nonfinite.count)})
            raise

    def _show(self, state: TrainState, window: LogWindow, step: int) -> None:
        # All processes must make the same decision, because all must gather the parameters.
        if not cluster.largest(cluster.is_first() and self._showcase.can_show(step)):
            return
        state = self._run.placement.local(dataclasses.replace(state, opt_state=None))
        if cluster.is_first():
            self._showcase.show(state, window)

    def _log(self, window: LogWindow, step: int) -> LogWindow:
        """Logs the window's metrics and checks them; returns an empty window."""
        batch_size = self._config.train.batch_size
        verdict = spread(window, step=step, batch_size=batch_size)
        values = summarize(window, verdict)
        rates = self._timer.rates(batch_size)
        unreadable = 0 if self._records is None else cluster.total(len(self._unreadable))
        if verdict:
            self._progress.rank = verdict.effective_rank
        self._show_progress(step, values["loss"], rates)
        self._logger.scalars(
            step,
            {
                **{f"train/{k}": v for k, v in values.items() if math.isfinite(v)},
                "train/nonfinite_steps": int(window.nonfinite.count),
                "train/learning_rate": float(self._schedules.learning_rate_fn(step)),
                "train/weight_decay": float(self._schedules.weight_decay_fn(step)),
                **self._ema_momentum(step),
                **({"train/unreadable_images": unreadable} if unreadable else {}),
                **rates,
                "perf/peak_memory_bytes": peak_memory_bytes(jax.local_devices()[0]),
            },
        )
        self._check_finite(window, step)
        self._alarms.check_targets(values)
        if verdict:
            self._alarms.check_spread(verdict, step)
        self._timer.restart()
        place = self._run.placement
        return place.put(reset_averages(window), place.whole)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the k-NN accuracy of the target encoder on held-out images of `eval.data`.

        Features: level 0 (mean over patches) and the summary tokens.
        """
        c, judged = self._config.eval, self._judged
        assert judged is not None
        images, labels = judged.images, judged.classes
        bank, queries = hold_out(len(images), num_val=c.num_val)
        bank = spread_rows(bank, c.knn_bank_size)
        params = self._run.placement.local(state.target_params)
        metric_of = {"level_0": BEST_METRIC}
        if self._config.model.num_summary_tokens:
            metric_of["summary"] = f"{BEST_METRIC}_summary"

        def features(rows: Any) -> Features:
            found = extract_features(self._embed, params, images[rows], batch_size=c.batch_size)
            return {name: found[name] for name in metric_of}

        of_bank = cluster.divided(features, bank)
        own = queries[jax.process_index() :: jax.process_count()]
        of_own = features(own) if len(own) else {}  # with few images, some processes have none
        scores = {}
        for name, metric in metric_of.items():
            num_right = 0
            if of_own:
                (predictions,) = knn_predict(
                    of_bank[name],
                    labels[bank],
                    of_own[name],
                    ks=[min(ONLINE_KNN_K, len(bank))],
                    num_classes=int(labels.max()) + 1,
                )
                num_right = int(np.sum(predictions == labels[own]))
            scores[metric] = cluster.total(num_right) / len(queries)
        self._progress.knn = max(scores.values())
        self._logger.scalars(step, scores)
        told = ", ".join(
            f"{100 * scores[metric]:.1f} % ({name.replace('_', ' ')})"
            for name, metric in metric_of.items()
        )
        whose = c.data or "training"
        self._progress.note(f"k-NN on held-out {whose} images at step {step}: {told}")
        return scores
