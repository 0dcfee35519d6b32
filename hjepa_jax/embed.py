"""Writes the features of images to a file, with the target encoder of a run.

  python -m hjepa_jax.embed --workdir=DIR|--model=NAME
    --output=FILE.npz|.npy|.parquet
    INPUT [INPUT ...]
    [--features=level_0,summary] [--tokens] [--neighbours=K]
    [--step=last|best|N]

The work directory may also be a file or folder from `export`. --model=cifar10_tiny takes an encoder
that ships with the package instead. An input is an image, a folder of
images, a .npz or .npy file of images, or tfds:<name>. Images are read in batches: memory does not
grow with their number. An interrupted command continues when it is run again. A file that is not
an image is named on stderr and has no row. The columns are `level_<l>` [n, D], `summary` [n, R * D]
and, with --tokens, `tokens` [n, G, G, D] for the G x G patches.

One folder, array file or data set is read like the `data.source` of a run, with `labels` and (of a
folder) `files`: .npz has arrays `train_<column>` and `test_<column>`, .parquet a column `split`. If
the input has no test split, one is drawn as in training. So if the run was trained on the input,
`test_files` are the files that it never saw.

Several inputs, or single images, make one list in the order given, with `files` and without labels
and split: .npz has arrays `<column>`. A row of an array is named `photos.npz[3]`.

.npy has one array in the order of the input: the features side by side, or the tokens.
--neighbours=5 also writes FILE.html: some of the images, each with its 5 nearest by the cosine of
the summary tokens, or of the first of --features.

`hjepa_jax.load(DIR).embed(images)` returns the same features in Python. Images of another size than
the encoder's are resized to cover it (bicubic) and cropped at the centre.
"""

from absl import flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory, or an exported encoder.")
_MODEL = flags.DEFINE_string("model", None, "Name of an encoder that ships with the package.")
_INPUT = flags.DEFINE_multi_string(
    "input", None, "Images, folders, arrays; the flag may be left out before them.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "The file to write.", required=True)
_FEATURES = flags.DEFINE_list("features", [], "Names of those to write (all).")
_TOKENS = flags.DEFINE_bool("tokens", False, "Write the tokens of all patches, too.")
_NEIGHBOURS = flags.DEFINE_integer(
    "neighbours", None, "Also write a page with this many neighbours of images.", lower_bound=1
)
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to use: last, best (by k-NN) or a step.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax import api, feature_file

    workdir, model = _WORKDIR.value, _MODEL.value
    if model is not None:
        if workdir is not None:
            raise InputError("--model", model, "must be left out if --workdir is given")
        workdir = str(api.pretrained(model))
    if workdir is None:
        names = ", ".join(api.pretrained_names())
        raise InputError("--workdir", None, f"must be given, or --model with one of {names}")
    shapes = feature_file.write_features(
        workdir,
        cli.separated("--input", _INPUT.value),
        _OUTPUT.value,
        step=_STEP.value,
        tokens=_TOKENS.value,
        features=_FEATURES.value,
        neighbours=_NEIGHBOURS.value,
        platform=_PLATFORM.value,
    )
    print(f"{_OUTPUT.value}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


if __name__ == "__main__":
    cli.run(main)
