"""A checkpoint of a computation that can resume, such as fine-tuning."""

import contextlib
import pathlib
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from hjepa_jax.runs.checkpoint import late_errors_ignored, reading
from hjepa_jax.runs.checkpoint_meta import DamagedCheckpoint


class NewestCheckpoint:
    """Keeps the newest of a series of trees, so that an interrupted computation can resume.

    Args:
      directory: the folder to write; made at once.
    """

    def __init__(self, directory: pathlib.Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )
        self._open = contextlib.ExitStack()
        self._open.enter_context(late_errors_ignored())

    def restore(self, state: Any) -> Any:
        """Returns the newest tree, like `state`; `state` itself if no intact tree exists.

        A damaged tree is named on stderr and deleted.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            with reading():
                return self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except DamagedCheckpoint as error:
            where = f"{self._manager.directory}/{step}"
            print(f"{where} is damaged and deleted: {error}", file=sys.stderr, flush=True)
            self._manager.delete(step)
            return state

    def save(self, step: int, state: Any) -> None:
        """Starts to save `state`. The previous tree is deleted when this one is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits for the current save and releases the directory."""
        with self._open:
            self._manager.close()
