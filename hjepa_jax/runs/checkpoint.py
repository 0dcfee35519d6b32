"""Saving and restoring runs. The only module that imports Orbax.

A checkpoint is a folder `checkpoints/<step>/` with three items: `state` (the TrainState),
`window` (metrics accumulated since the last log line) and `meta` (config, versions, commit,
fingerprint of the data, scores, and the table of all arrays with their checksums).
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hjepa_jax.config import Config
from hjepa_jax.config.fields import is_a
from hjepa_jax.data.fingerprint import differ
from hjepa_jax.errors import InputError, first_line
from hjepa_jax.method.train_state import TrainState
from hjepa_jax.method.window import LogWindow
from hjepa_jax.runs.array_table import (
    ArrayTable,
    changed,
    crc_checksums,
    describe_arrays,
    differences,
    json_checksum,
    word_checksums,
)
from hjepa_jax.runs.old_biases import with_old_biases, without_old_biases
from hjepa_jax.runs.same_run import Saved, changes, other_networks_or_data
from hjepa_jax.runs.workdir import UNUSABLE, checkpoint_sizes, parse_config
from hjepa_jax.runtime.provenance import source_commit, versions

FORMAT_VERSION = 3
BEST_METRIC = "eval/knn_top1"
MAX_DIGITS = 10  # of a step, which is counted in int32


class DamagedCheckpoint(Exception):
    """A checkpoint that is there but cannot be trusted; the message says why."""


class Checkpoints:
    """The checkpoints of one workdir: the newest few and the best by k-NN.

    Beside the arrays, each holds a table of their shapes, types and checksums: Orbax would restore
    a part of a tree, or bits that have flipped, without a word.

    Only a config that fits a checkpoint reads it: the rate may have changed, the networks not.

    Args:
      workdir: the run's directory.
      config: the run's config, stored in each checkpoint; its `train.keep_checkpoints` says how
        many of the newest are kept.
      data: fingerprint of the training images, stored as well; a differing one warns on restore.
      owner: whether the workdir is locked by this process, so that what an interrupted save left
        behind may go and a damaged checkpoint may be set aside. Of several processes that train
        together all are owners, and save and restore together; others read by themselves, and
        change nothing.
    """

    def __init__(
        self, workdir: pathlib.Path, *, config: Config, data: str | None = None, owner: bool = False
    ):
        self._workdir, self._run_config, self._config = workdir, config, config.to_dict()
        self._data = data
        self._owner, self._open = owner, contextlib.ExitStack()
        self._best = _Best({})
        if jax.process_count() == 1:
            # Otherwise Orbax cuts each full copy into a slice per device, for several hosts to
            # share the writing; compiling the cuts made the first save wait for 20 s.
            one_writer = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
            ocp.type_handlers.register_type_handler(jax.Array, one_writer, override=True)
        latest = preservation_policy.LatestN(config.train.keep_checkpoints)
        self._manager = ocp.CheckpointManager(
            self._directory(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy([latest, self._best]),
                cleanup_tmp_directories=owner,
                create=owner,
                **({} if owner else _alone()),
            ),
            item_names=("state", "window", "meta"),
        )
        self._open.enter_context(_late_reports_ignored())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not KeyboardInterrupt:  # which asks a second time: at once, without the save
            self.close()

    def _directory(self) -> pathlib.Path:
        return (self._workdir / "checkpoints").absolute()

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def find_step(self, which: str) -> int | None:
        """The checkpoint that `which` names: "last" (None: the newest), "best" or a number.

        Raises:
          InputError: when it names none ("--step").
        """
        if which == "last":
            return None
        if which == "best":
            self._read_scores()
            best = self._best.step(self._manager.all_steps())
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
        """Starts saving; training may go on (and donate the state) at once.

        Args:
          state: the state to save.
          window: metrics since the last log line.
          scores: evaluation results at this step; with "eval/knn_top1..." it may become the best.

        Raises:
          InputError: when this save, or the one before, cannot be written ("--workdir").
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = {
            "format_version": FORMAT_VERSION,
            "config": self._config,
            "versions": versions(),
            "commit": source_commit(),
            "data": self._data,
            "scores": scores,
            "arrays": {"state": describe_arrays(state), "window": describe_arrays(window)},
        }
        self._read_scores()  # here: within Orbax's save it would wait for that to end
        self._best.scores[step] = _score(meta)
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    window=ocp.args.StandardSave(window),
                    meta=ocp.args.JsonSave({**meta, "checksum": json_checksum(meta)}),
                ),
            )

    def restore(self, state: TrainState, window: LogWindow) -> tuple[TrainState, LogWindow]:
        """Reads the newest checkpoint that is whole into trees like the ones given.

        Damaged ones after it are named and moved to the folder `damaged` of the workdir.

        Raises:
          InputError: when there is none, or it is of another model or version. Nothing is moved
            then.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, state=state, window=window)
            except DamagedCheckpoint as error:
                print(f"checkpoint {step} is damaged: {error}", file=sys.stderr, flush=True)
                damaged.append(step)
                continue
            for other in damaged:
                self._set_aside(other)
            return restored["state"], restored["window"]
        raise self._nothing_to_read()

    def restore_state(self, state: TrainState, step: int | None = None) -> TrainState:
        """Reads the state alone, of the newest checkpoint or of the one at `step`.

        Fields of `state` that are None are not read, and stay None. Orbax lets one manager read an
        item in one way only: an object of this class handles either whole states or parts.

        Raises:
          InputError: when there is no such checkpoint, or it is damaged, or it is of another model
            or version.
        """
        found = self._find(step)
        try:
            return self._read(found, state=state)["state"]
        except DamagedCheckpoint as error:
            others = [other for other in sorted(self._manager.all_steps()) if other != found]
            rule = f"is damaged ({error}); the others are {others}"
            raise InputError("--step", found, rule) from error

    def meta(self, step: int | None) -> dict[str, Any]:
        """What is kept beside the arrays of a checkpoint (None: the newest), but for their table.

        Raises:
          InputError: when there is no such checkpoint, or it is damaged ("--step").
        """
        found = self._find(step)
        try:
            return {name: value for name, value in self._meta(found).items() if name != "arrays"}
        except DamagedCheckpoint as error:
            raise InputError("--step", found, f"is damaged ({error})") from error

    def _find(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise self._nothing_to_read()
        if step is not None and step not in steps:
            raise InputError("--step", step, f"must be one of the checkpoints, {steps}")
        return steps[-1] if step is None else step

    def _nothing_to_read(self) -> InputError:
        return InputError("--workdir", str(self._workdir), "holds no checkpoint that can be read")

    def newest_saved(self) -> Saved | None:
        """What the newest checkpoint whose meta can be read says of its run; None without one."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            with contextlib.suppress(DamagedCheckpoint, LookupError):
                meta = self._meta(step)
                return Saved(step, meta["config"], meta.get("data"))
        return None

    def _read_scores(self) -> None:
        """Gets to know the scores of checkpoints that another process has saved."""
        for step in sorted(set(self._manager.all_steps()) - self._best.scores.keys()):
            self._best.scores[step] = None
            with contextlib.suppress(DamagedCheckpoint):
                self._best.scores[step] = _score(self._meta(step))

    def _meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with _reading():
            meta = self._manager.restore(step, args=args)["meta"]
        if not isinstance(meta, dict) or not is_a(int, meta.get("format_version")):
            raise DamagedCheckpoint("meta has no format_version")
        checksum = meta.pop("checksum", None)
        if checksum != json_checksum(meta) and meta.get("format_version") != 1:
            raise DamagedCheckpoint("the checksum of meta differs")
        return meta

    def _read(self, step: int, **templates: Any) -> dict[str, Any]:
        """The trees of a checkpoint, like the templates in structure, shapes and types.

        Raises:
          DamagedCheckpoint: when it cannot be read, or not as it was written.
          InputError: when it was written for other trees, or in a format of another version.
        """
        meta = self._meta(step)
        version = meta["format_version"]
        if version > FORMAT_VERSION:
            rule = f"is in format {version}; this version reads up to {FORMAT_VERSION}"
            raise InputError("--step", step, rule)
        self._check_config(step, meta.get("config"))
        if version == 1:  # the window was another then, and there was no table
            tables, kept = {}, {"window"} & set(templates)
        else:
            tables, kept = meta["arrays"], set()
        tables = {
            name: _of_wanted_fields(table, templates.get(name)) for name, table in tables.items()
        }
        older = {
            name: with_old_biases(tree)
            for name, tree in templates.items()
            if name in tables and not differences(tables[name], with_old_biases(tree))
            and differences(tables[name], tree)
        }  # fmt: skip
        templates |= older
        for name, tree in templates.items():
            if name in tables and (differing := differences(tables[name], tree)):
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                rule = f"does not fit this model: {'; '.join(differing[:3])}{more}"
                raise InputError("--step", step, rule)
        if differ(meta.get("data"), self._data):
            message = f"warning: the training images differ from those of step {step} (fingerprint "
            print(f"{message}{meta['data']} -> {self._data})", file=sys.stderr, flush=True)

        args = {name: _restore_args(tree) for name, tree in templates.items() if name not in kept}
        with _reading():
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        for name in args:
            if _missing_fields(templates[name]):  # Orbax returns the others as a dictionary
                found[name] = dataclasses.replace(templates[name], **found[name])
        checksums = crc_checksums if version == 2 else word_checksums
        for name in tables.keys() & args.keys():
            if bad := sorted(changed(tables[name], describe_arrays(found[name], checksums))):
                raise DamagedCheckpoint(f"the checksum of {name} {bad[0]} differs")
        return {
            name: templates[name] if name in kept
            else without_old_biases(found[name]) if name in older
            else found[name]
            for name in templates
        }  # fmt: skip

    def _check_config(self, step: int, saved: Any) -> None:
        """Refuses arrays whose config differs, although their shapes may be the same."""
        try:
            trained = parse_config(saved)
        except UNUSABLE:  # of another version: the table of arrays decides
            return
        if other_networks_or_data(trained, self._run_config):
            rule = (
                f"its config differs from that of the checkpoint at step {step} "
                f"({changes(trained, self._run_config)})"
            )
            raise InputError("--workdir", str(self._workdir), rule)

    def _set_aside(self, step: int) -> None:
        if not self._owner:
            raise InputError("--step", step, "is damaged")
        if jax.process_count() > 1:  # some may have found it whole and wait for the others
            raise InputError("--step", step, "is damaged; resume in one process sets it aside")
        source, folder = self._directory() / str(step), self._workdir / "damaged"
        folder.mkdir(exist_ok=True)
        numbers = itertools.count(1)
        target = folder / str(step)
        while target.exists():
            target = folder / f"{step}_{next(numbers)}"
        source.rename(target)
        self._manager.reload()
        print(f"moved it to {target}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise when they cannot write into one line."""
        try:
            yield
        except Exception as error:  # OSError, ValueError, RuntimeError ..., as the layer has it
            self._manager.reload()
            rule = (
                f"a checkpoint cannot be written ({first_line(error)}); the last good one is "
                f"step {self._manager.latest_step()}"
            )
            raise InputError("--workdir", str(self._workdir), rule) from error

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk.

        Raises:
          InputError: when it cannot be written ("--workdir").
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and releases the directory.

        Raises:
          InputError: when that save cannot be written ("--workdir").
        """
        with self._open, self._writing():
            self._manager.close()


def _missing_fields(tree: Any) -> set[str]:
    """Names of the fields of a TrainState that are None; nothing for any other tree."""
    if not isinstance(tree, TrainState):
        return set()
    return {field.name for field in dataclasses.fields(tree) if getattr(tree, field.name) is None}


def _of_wanted_fields(table: ArrayTable, tree: Any) -> ArrayTable:
    """The entries of a table of arrays that belong to the fields of `tree`."""
    missing = _missing_fields(tree)
    return {path: entry for path, entry in table.items() if _field(path) not in missing}


def _field(path: str) -> str:
    """The field that a path such as ".params['norm']['scale']" begins with."""
    return path.removeprefix(".").partition("[")[0].partition(".")[0]


def _restore_args(tree: Any) -> Any:
    """Asks Orbax for a whole tree, or for the fields of a TrainState that are not None."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    missing = _missing_fields(tree)
    if not missing:
        return ocp.args.StandardRestore(like)
    wanted = {name: value for name, value in vars(like).items() if name not in missing}
    args = ocp.checkpoint_utils.construct_restore_args(wanted)
    return ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)


@dataclasses.dataclass(frozen=True)
class _Score:
    """The k-NN score of a checkpoint.

    Attributes:
      value: top-1 accuracy on held-out training images, of the features that do best.
      metric: its name in the log, which says of which features.
      protocol: how many images were held out, and how many they were compared with. Scores of
        different protocols do not compare.
    """

    value: float
    metric: str
    protocol: tuple[Any, Any]


def _score(meta: dict[str, Any]) -> _Score | None:
    """The score in the meta of a checkpoint; None if it was not evaluated."""
    try:
        found = [
            (value, name)
            for name, value in meta["scores"].items()
            if name.startswith(BEST_METRIC) and is_a(float, value)
        ]
        evaluation = meta["config"]["eval"]
        protocol = (evaluation["num_val"], evaluation["knn_bank_size"])
        return _Score(*max(found), protocol) if found else None
    except (LookupError, TypeError, AttributeError):
        return None


@dataclasses.dataclass
class _Best:
    """Tells Orbax to keep the best checkpoint of each protocol (a `PreservationPolicy`).

    Orbax's own policy goes by metrics that it forgets with the process.

    Attributes:
      scores: of each step that has been looked at; None if it has none.
    """

    scores: dict[int, _Score | None]

    def step(self, steps: Iterable[int]) -> int | None:
        """The best of these steps by the protocol of the newest score; None if none has a score.

        Of equal ones the newest.
        """
        best = list(self._best_by_protocol(steps).values())
        return best[-1] if best else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of the checkpoints is the best of its protocol."""
        best = self._best_by_protocol(info.step for info in checkpoints)
        return [info.step in best.values() for info in checkpoints]

    def _best_by_protocol(self, steps: Iterable[int]) -> dict[tuple[Any, Any], int]:
        """The best step of each protocol, protocols in the order of their newest scores."""
        scored = {step: score for step in sorted(steps) if (score := self.scores.get(step))}
        newest = {score.protocol: step for step, score in scored.items()}
        return {
            protocol: max((s.value, step) for step, s in scored.items() if s.protocol == protocol)[
                1
            ]
            for protocol in sorted(newest, key=lambda protocol: newest[protocol])
        }


def _alone() -> dict[str, Any]:
    """Options of a manager that waits for no other process."""
    if jax.process_count() == 1:
        return {}
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    return {"multiprocessing_options": alone}


@contextlib.contextmanager
def _late_reports_ignored() -> Iterator[None]:
    """Lets go of one complaint: TensorStore still reports to a reader that has given up."""
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
def _reading() -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise on damaged files into DamagedCheckpoint."""
    try:
        yield
    except Exception as error:
        raise DamagedCheckpoint(first_line(error)) from error


class NewestCheckpoint:
    """Keeps the newest of a succession of trees, for work that is to survive an interruption.

    Args:
      directory: made at once.
    """

    def __init__(self, directory: pathlib.Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )
        self._open = contextlib.ExitStack()
        self._open.enter_context(_late_reports_ignored())

    def restore(self, state: Any) -> Any:
        """The newest tree, like `state`; `state` itself where nothing whole was saved.

        What is damaged is named and deleted.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            with _reading():
                return self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except DamagedCheckpoint as error:
            where = f"{self._manager.directory}/{step}"
            print(f"{where} is damaged and deleted: {error}", file=sys.stderr, flush=True)
            self._manager.delete(step)
            return state

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state`; what was kept before goes when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits for the save under way and releases the directory."""
        with self._open:
            self._manager.close()


def read_saved(workdir: pathlib.Path, config: Config) -> Saved | None:
    """What the newest checkpoint whose meta can be read says of its run; None without one.

    Args:
      workdir: the run's directory, which need not exist.
      config: any config.
    """
    if not checkpoint_sizes(workdir):
        return None
    checkpoints = Checkpoints(workdir, config=config)
    try:
        return checkpoints.newest_saved()
    finally:
        checkpoints.close()
