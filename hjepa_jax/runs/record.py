"""run.json: facts of a run that are not in its config, written at every start.

A report reads them, because the data of a copied work directory may be absent. A resumed run
compares them with the data that it loads.
"""

import dataclasses
import json
import pathlib
from typing import Any

from hjepa_jax.config import Config
from hjepa_jax.config.build import Schedules
from hjepa_jax.config.fields import is_a
from hjepa_jax.data.base import Source
from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.provenance import command

NAME = "run.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The data and the length of a run.

    Attributes:
      num_images: number of training images.
      num_steps: optimizer updates of the whole run.
      steps_per_epoch: optimizer updates per epoch.
      class_names: indexed by label.
      data: "source" as the config spells it, "fingerprint" of the training images, "num_train" and
        "num_test" (labelled images), "image_shape", and "dtype" of the pixels.
      preprocessing: "image_size" in pixels (or [height, width]); "mean" and "std" per channel of
        pixels in [0, 1].
      command: command line of the newest start; "" if unknown.
    """

    num_images: int
    num_steps: int
    steps_per_epoch: int
    class_names: tuple[str, ...]
    data: dict[str, Any]
    preprocessing: dict[str, Any]
    command: str = ""

    @property
    def fingerprint(self) -> str | None:
        """Returns the fingerprint of the training images."""
        return self.data.get("fingerprint")


def make_record(
    config: Config, source: Source, schedules: Schedules, *, fingerprint: str
) -> RunRecord:
    """Returns the record of a run that starts now."""
    info, c = source.info, config.data
    image_size = c.image_size if isinstance(c.image_size, int) else list(c.image_size)
    return RunRecord(
        num_images=source.num_images,
        num_steps=schedules.num_steps,
        steps_per_epoch=schedules.steps_per_epoch,
        class_names=tuple(info.class_names),
        data={
            "source": c.source,
            "fingerprint": fingerprint,
            "num_train": info.num_train,
            "num_test": info.num_test,
            "image_shape": list(info.image_shape),
            "dtype": info.dtype,
        },
        preprocessing={"image_size": image_size, "mean": list(c.mean), "std": list(c.std)},
        command=command(),
    )


def write_record(workdir: pathlib.Path, record: RunRecord) -> None:
    """Writes run.json, unless it already holds this record.

    Raises:
      OSError: if it cannot be written.
    """
    if read_record(workdir) == record:
        return
    text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(record)}, indent=2)
    with replacing(workdir / NAME) as file:
        file.write(f"{text}\n".encode())


def read_record(workdir: pathlib.Path) -> RunRecord | None:
    """Returns the record of the run in `workdir`; None if there is no valid one."""
    try:
        found = json.loads((workdir / NAME).read_text(encoding="utf-8"))
        if found.pop("format_version") != FORMAT_VERSION:
            return None
        counts = [found[name] for name in ("num_images", "num_steps", "steps_per_epoch")]
        if not all(is_a(int, n) and n > 0 for n in counts):
            return None
        return RunRecord(**{**found, "class_names": tuple(map(str, found["class_names"]))})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
