"""The command `hjepa`; also `python -m hjepa_jax`.

  hjepa COMMAND [flags]    hjepa COMMAND --help    hjepa --version

Each command is also a module: `hjepa probe` is `python -m hjepa_jax.probe`,
`hjepa train` is `python -m hjepa_jax.main`.
"""

import importlib
import sys

import hjepa_jax
from hjepa_jax import cli

# Command -> its module and one line for the help page.
COMMANDS = {
    "train": ("main", "train the run that a config describes, or resume it"),
    "config": ("show_config", "print every field of a config with its meaning"),
    "sweep": ("sweep", "train runs that differ in a few fields, and compare them"),
    "probe": ("probe", "judge the encoder of a run"),
    "report": ("report", "write report.md and report.html of a run"),
    "embed": ("embed", "write the features of images into a file"),
    "export": ("export", "write the encoder of a run for use elsewhere"),
    "convert": ("convert", "make a work directory of a published encoder"),
    "selftest": ("selftest", "compare the accelerator with the CPU"),
}


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--version", "version"):
        print(hjepa_jax.__version__)
    elif name in ("", "help", "-h", "--help"):
        lines = [f"  {command:10}{text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join([(__doc__ or "").strip(), "", "Commands:", *lines]))
    elif name not in COMMANDS:
        cli.fail(f"{name!r}: must be one of {', '.join(COMMANDS)}; hjepa --help describes them")
    else:
        module = importlib.import_module(f"hjepa_jax.{COMMANDS[name][0]}")
        sys.argv = [f"hjepa {name}", *sys.argv[2:]]
        cli.run(module.main)


if __name__ == "__main__":
    main()
