"""Writes the report of a run that is finished, interrupted or still training.

  python -m hjepa_jax.report DIR [DIR2 ...] [--output=DIR] [--noimages]

Writes report.md, report.html (a single file) and figures/ to DIR. For several work directories it
writes a comparison to --output. Every number comes from metrics.jsonl, probe.json, config.json or
the newest checkpoint.
"""

import pathlib

from absl import flags

from hjepa_jax import cli
from hjepa_jax.runtime.paths import local_path

_WORKDIR = cli.define_workdirs()
_OUTPUT = flags.DEFINE_string("output", None, "Where to write (the workdir; for several, report).")
_IMAGES = flags.DEFINE_bool("images", True, "Read checkpoint and images too, not only numbers.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax.reporting import publish
    from hjepa_jax.runs.workdir import load_config, writing
    from hjepa_jax.runtime.backend import select_platform

    workdirs = cli.workdirs(_WORKDIR.value)
    output = workdirs[0] if len(workdirs) == 1 else pathlib.Path("report")
    if _OUTPUT.value is not None:
        output = local_path("--output", _OUTPUT.value)
    config = load_config(workdirs[0])
    select_platform(_PLATFORM.value or config.platform)
    with writing(output, "--output" if _OUTPUT.value else "--workdir"):
        for path in publish.write_report(workdirs, output, images=_IMAGES.value):
            print(path)


if __name__ == "__main__":
    cli.run(main)
