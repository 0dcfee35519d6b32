"""Features of images from the target encoder of a workdir, as a file.

  python -m hjepa_jax.embed --workdir=DIR --input=FOLDER|FILE.npz --output=features.npz

The input is read like `data.source` folder:<path> or npz:<path>. The output holds, for the train
and the test split, `<split>_level_<l>` [n, D], `<split>_summary` [n, R * D], `<split>_labels` and,
of a folder, `<split>_files`: which file, by its name within the folder, each row is of. A file that
is no image is told on stderr and has no row.
"""

from absl import flags

from hjepa_jax import cli
from hjepa_jax.errors import InputError
from hjepa_jax.paths import local_path

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Image folder or .npz file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use (the newest).", lower_bound=0)
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    import jax
    import numpy as np

    from hjepa_jax import build, checkpoint, run_dir
    from hjepa_jax.data.sources import open_source
    from hjepa_jax.evaluation.features import extract_features
    from hjepa_jax.platform import select_platform
    from hjepa_jax.whole_files import replacing

    workdir = local_path("--workdir", _WORKDIR.value)
    output = local_path("--output", _OUTPUT.value)
    images = local_path("--input", _INPUT.value)
    config = run_dir.load_config(workdir)
    select_platform(_PLATFORM.value or config.platform)
    model, params = checkpoint.load_encoder(workdir, step=_STEP.value)
    kind = "npz" if images.suffix == ".npz" else "folder"
    source = open_source(f"{kind}:{images}", data_dir=None, image_size=config.data.image_size)
    embed = jax.jit(build.build_embed_fn(config, model))
    arrays = {}
    for name, split in zip(("train", "test"), source.load(), strict=True):
        features = extract_features(embed, params, split.images, batch_size=config.eval.batch_size)
        arrays |= {f"{name}_{key}": value for key, value in features.items()}
        arrays[f"{name}_labels"] = split.labels
        if split.names:
            arrays[f"{name}_files"] = np.array(split.names)
    try:
        with replacing(output) as file:
            np.savez(file, **arrays)
    except OSError as error:
        rule = f"must be a file that can be written ({error.strerror})"
        raise InputError("--output", _OUTPUT.value, rule) from error
    print(f"{_OUTPUT.value}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


if __name__ == "__main__":
    cli.run(main)
