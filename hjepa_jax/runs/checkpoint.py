"""Saves and restores the checkpoints of a run. Only this module and `newest_checkpoint` use Orbax.

A checkpoint is a folder `checkpoints/<step>/` with three items: `state` (the TrainState), `window`
(the metrics since the last log line) and `meta` (see `checkpoint_meta`).
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hjepa_jax.config import Config
from hjepa_jax.data.fingerprint import differ
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow
from hjepa_jax.runs.best import KeepBest, read_score
from hjepa_jax.runs.checkpoint_meta import (
    DamagedCheckpoint,
    check_arrays,
    check_config,
    check_shapes,
    make_meta,
    missing_fields,
    no_checkpoint,
    read_meta,
)

MAX_DIGITS = 10  # digits of a step, which is an int32


class Checkpoints:
    """The checkpoints of one work directory: the newest few and the best by k-NN.

    Args:
      workdir: the run's directory.
      config: the run's config, stored in each checkpoint. Only a run with the same networks and
        data can read it. `train.keep_checkpoints` is the number of newest checkpoints to keep.
      data: fingerprint of the training images, stored in each checkpoint. Reading one with another
        fingerprint prints a warning.
      owner: whether this process holds the lock of the work directory. Only an owner deletes the
        rest of an interrupted save and sets damaged checkpoints aside. Processes that train
        together are all owners, and save and restore together.
    """

    def __init__(
        self, workdir: pathlib.Path, *, config: Config, data: str | None = None, owner: bool = False
    ):
        self._workdir, self._config, self._data = workdir, config, data
        self._owner, self._open, self._best = owner, contextlib.ExitStack(), KeepBest()
        if owner and jax.process_count() == 1:  # Orbax logs a warning, so readers leave it out
            # By default Orbax slices each full copy, one slice per device, so that several hosts
            # share the writing. Compiling the slices delayed the first save by 20 s.
            one_writer = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
            ocp.type_handlers.register_type_handler(jax.Array, one_writer, override=True)
        latest = preservation_policy.LatestN(config.train.keep_checkpoints)
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy([latest, self._best]),
                cleanup_tmp_directories=owner,
                create=owner,
                **({} if owner else _without_other_processes()),
            ),
            item_names=("state", "window", "meta"),
        )
        self._open.enter_context(late_errors_ignored())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not KeyboardInterrupt:  # the second Ctrl-C: do not wait for the save
            self.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def find_step(self, which: str) -> int | None:
        """Returns the step of the checkpoint that `which` names; None for the newest.

        Args:
          which: "last", "best" (by k-NN) or the step of a checkpoint.

        Raises:
          InputError: if `which` is none of these, or no checkpoint has a score ("--step").
        """
        if which == "last":
            return None
        if which == "best":
            self._read_scores()
            best = self._best.best_step(self._manager.all_steps())
            if best is None:
                rule = "needs a checkpoint with a k-NN score (eval.every_epochs)"
                raise InputError("--step", which, rule)
            score = self._best.scores[best]
            assert score is not None
            print(f"step {best} is the best: {score.metric} {100 * score.value:.2f} %", flush=True)
            return best
        if not which.isdecimal() or len(which) > MAX_DIGITS:
            raise InputError("--step", which, "must be last, best or the step of a checkpoint")
        return int(which)

    def save(self, state: TrainState, window: LogWindow, *, scores: dict[str, float]) -> None:
        """Starts a save. Training may continue, and donate the state, at once.

        Args:
          state: the state to save.
          window: metrics since the last log line.
          scores: evaluation results at this step. With a k-NN score it may become the best.

        Raises:
          InputError: if this save, or the one before, cannot be written ("--workdir").
        """
        step, trees = int(state.step), {"state": state, "window": window}
        if step in self._manager.all_steps():
            return
        meta = make_meta(self._config.to_dict(), self._data, scores, trees)
        self._read_scores()  # before the save: Orbax reads nothing until it has ended
        self._best.scores[step] = read_score(meta)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._writing():
            args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
            self._manager.save(step, args=args)

    def restore(self, state: TrainState, window: LogWindow) -> tuple[TrainState, LogWindow]:
        """Reads the newest intact checkpoint into trees like `state` and `window`.

        Newer damaged checkpoints are named on stderr and moved to the folder `damaged`.

        Raises:
          InputError: if there is no intact checkpoint, or it has another config, shapes or format.
            Nothing is moved in that case.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, state=state, window=window)
            except DamagedCheckpoint as error:
                print(f"checkpoint {step} is damaged: {error}", file=sys.stderr, flush=True)
                damaged.append(step)
                continue
            for other in damaged:
                self._set_aside(other)
            return found["state"], found["window"]
        raise no_checkpoint(self._workdir)

    def restore_state(self, state: TrainState, step: int | None = None) -> TrainState:
        """Reads the state alone, from the newest checkpoint or from the one at `step`.

        Fields of `state` that are None are not read and stay None. An Orbax manager supports only
        one way of reading an item: use one `Checkpoints` for whole states, another one for parts.

        Raises:
          InputError: if there is no such checkpoint, or it is damaged, or it has another config,
            shapes or format.
        """
        found = self._find(step)
        try:
            return self._read(found, state=state)["state"]
        except DamagedCheckpoint as error:
            others = [other for other in sorted(self._manager.all_steps()) if other != found]
            rule = f"is damaged ({error}); the others are {others}"
            raise InputError("--step", found, rule) from error

    def wait(self) -> None:
        """Blocks until the current save, if any, is on disk.

        Raises:
          InputError: if it cannot be written ("--workdir").
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the current save and releases the directory.

        Raises:
          InputError: if that save cannot be written ("--workdir").
        """
        with self._open, self._writing():
            self._manager.close()

    def _find(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise no_checkpoint(self._workdir)
        if step is not None and step not in steps:
            raise InputError("--step", step, f"must be one of the checkpoints, {steps}")
        return steps[-1] if step is None else step

    def _read_scores(self) -> None:
        """Reads the scores of checkpoints that another process has saved."""
        for step in sorted(set(self._manager.all_steps()) - self._best.scores.keys()):
            self._best.scores[step] = None
            with contextlib.suppress(DamagedCheckpoint):
                self._best.scores[step] = read_score(read_meta(self._workdir, step))

    def _read(self, step: int, **templates: Any) -> dict[str, Any]:
        """Reads items of a checkpoint into trees like the templates.

        Raises:
          DamagedCheckpoint: if it cannot be read, or differs from what was written.
          InputError: if it has another config, shapes or format.
        """
        meta = read_meta(self._workdir, step)
        check_config(self._workdir, step, meta["config"], self._config)
        check_shapes(step, meta["arrays"], templates)
        if differ(meta["data"], self._data):
            message = f"warning: the training images differ from those of step {step} (fingerprint "
            print(f"{message}{meta['data']} -> {self._data})", file=sys.stderr, flush=True)
        args = {name: _restore_args(tree) for name, tree in templates.items()}
        with reading():
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        for name, tree in templates.items():
            if missing_fields(tree):  # Orbax returns the other fields as a dictionary
                found[name] = dataclasses.replace(tree, **found[name])
            check_arrays(name, meta["arrays"][name], found[name])
        return found

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to the folder `damaged`."""
        if not self._owner:
            raise InputError("--step", step, "is damaged")
        if jax.process_count() > 1:  # other processes may have read it and wait for this one
            raise InputError("--step", step, "is damaged; resume in one process sets it aside")
        folder = self._workdir / "damaged"
        folder.mkdir(exist_ok=True)
        names = itertools.chain([f"{step}"], (f"{step}_{n}" for n in itertools.count(1)))
        target = next(folder / name for name in names if not (folder / name).exists())
        (self._workdir / "checkpoints" / str(step)).rename(target)
        self._manager.reload()
        print(f"moved it to {target}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any error of Orbax and TensorStore in writing into one InputError."""
        try:
            yield
        except Exception as error:  # OSError, ValueError, RuntimeError ...: each layer has its own
            self._manager.reload()
            rule = (
                f"a checkpoint cannot be written ({first_line(error)}); the last good one is "
                f"step {self._manager.latest_step()}"
            )
            raise InputError("--workdir", str(self._workdir), rule) from error


def _restore_args(tree: Any) -> Any:
    """Returns Orbax's arguments for a whole tree, or for the fields of a state that are present."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    missing = missing_fields(tree)
    if not missing:
        return ocp.args.StandardRestore(like)
    wanted = {name: value for name, value in vars(like).items() if name not in missing}
    args = ocp.checkpoint_utils.construct_restore_args(wanted)
    return ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)


def _without_other_processes() -> dict[str, Any]:
    """Returns options of a manager that waits for no other process."""
    if jax.process_count() == 1:
        return {}
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return {"multiprocessing_options": alone}


@contextlib.contextmanager
def late_errors_ignored() -> Iterator[None]:
    """Hides one error: TensorStore reports to an event loop that Orbax has already closed."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns any error of Orbax and TensorStore on damaged files into DamagedCheckpoint."""
    try:
        yield
    except Exception as error:
        raise DamagedCheckpoint(first_line(error)) from error
