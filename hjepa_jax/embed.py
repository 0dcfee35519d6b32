"""Writes the features of images to a file, with the target encoder of a run.

  python -m hjepa_jax.embed --workdir=DIR --input=FOLDER|FILE.npz
    --output=FILE.npz|.npy|.parquet
    [--features=level_0,summary] [--tokens] [--step=last|best|N]

The work directory may also be a file from `export`. The input is read like `data.source`
folder:<path> or npz:<path>, but in batches: memory does not grow with the number of files. An
interrupted command continues when it is run again. A file that is not an image is named on stderr
and has no row. The columns are `level_<l>` [n, D], `summary` [n, R * D], `labels`, with --tokens
`tokens` [n, G, G, D] for the G x G patches and, for a folder, `files` (file names relative to the
folder).

* .npz: arrays `<split>_<column>` for the train and the test split;
* .parquet: the columns and `split`, in the order of the files;
* .npy: one array in the order of the files: the features side by side, or the tokens.

If the input has no test split, one is drawn as in training. So if the run was trained on the input,
`test_files` are the files that it never saw.

`hjepa_jax.load(DIR).embed(images)` returns the same features in Python. Images of another size than
the encoder's are resized to cover it (bicubic) and cropped at the centre.
"""

from absl import flags

from hjepa_jax import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory, or an exported encoder.", required=True
)
_INPUT = flags.DEFINE_string("input", None, "Image folder or .npz file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The file to write.", required=True)
_FEATURES = flags.DEFINE_list("features", [], "Names of those to write (all).")
_TOKENS = flags.DEFINE_bool("tokens", False, "Write the tokens of all patches, too.")
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to use: last, best (by k-NN) or a step.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax import feature_file

    shapes = feature_file.write_features(
        _WORKDIR.value,
        _INPUT.value,
        _OUTPUT.value,
        step=_STEP.value,
        tokens=_TOKENS.value,
        features=_FEATURES.value,
        platform=_PLATFORM.value,
    )
    print(f"{_OUTPUT.value}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


if __name__ == "__main__":
    cli.run(main)
