"""Writes the features of images to a file, with the target encoder of a run.

  python -m hjepa_jax.embed --workdir=DIR --input=FOLDER|FILE.npz --output=FILE.npz
    [--step=last|best|N]

The input is read like `data.source` folder:<path> or npz:<path>, but in batches: memory does not
grow with the number of files. The output holds for the train and the test split:
`<split>_level_<l>` [n, D], `<split>_summary` [n, R * D], `<split>_labels` and, for a folder,
`<split>_files` (file names relative to the folder). A file that is not an image is named on stderr
and has no row.

If the input has no test split, one is drawn as in training. So if the run was trained on the input,
`test_files` are the files that it never saw.

`hjepa_jax.load(DIR).embed(images)` returns the same features in Python. Images of another size than
the encoder's are resized (bicubic, shorter side) and cropped at the centre.
"""

from absl import flags

from hjepa_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Image folder or .npz file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.", required=True)
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to use: last, best (by k-NN) or a step.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax import feature_file

    shapes = feature_file.write_features(
        _WORKDIR.value, _INPUT.value, _OUTPUT.value, step=_STEP.value, platform=_PLATFORM.value
    )
    print(f"{_OUTPUT.value}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


if __name__ == "__main__":
    cli.run(main)
