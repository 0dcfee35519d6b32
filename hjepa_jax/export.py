"""Writes the encoder of a run for use elsewhere, with a config and a model card.

  python -m hjepa_jax.export --workdir=DIR --output=FOLDER
    [--format=hjepa_jax|timm|transformers|stablehlo|onnx] [--step=last|best|N]
    [--dtype=float32|float16] [--push=USER/NAME]

* hjepa_jax: one safetensors file, for `hjepa_jax.load(FILE)`;
* timm, transformers: a folder that these libraries load with their own
  functions. The first summary token is the class token there, the others are
  registers;
* stablehlo: a program from images to features that needs nothing but jax;
* onnx: the same program as an ONNX model (extra `onnx`).

The file README.md in the folder shows how to load it. --push also uploads the folder to a
repository on the Hugging Face hub; a new repository is private (extra `hub`).
"""

from absl import flags

from hjepa_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to make.", required=True)
_FORMAT = flags.DEFINE_string("format", "hjepa_jax", "Who is to read it.")
_STEP = flags.DEFINE_string("step", "last", "Checkpoint to use: last, best (by k-NN) or a step.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the numbers in the file; or float16.")
_PUSH = flags.DEFINE_string("push", None, "Also upload it, as USER/NAME on Hugging Face's hub.")
_PLATFORM = cli.define_platform()


def main() -> None:
    """Runs the command."""
    from hjepa_jax.exchange.export import export
    from hjepa_jax.exchange.hub import check_push, push
    from hjepa_jax.runtime.backend import select_platform
    from hjepa_jax.runtime.paths import local_path

    if _PUSH.value is not None:
        check_push(_PUSH.value)
    select_platform(_PLATFORM.value or "auto")
    files = export(
        _WORKDIR.value, _OUTPUT.value, layout=_FORMAT.value, step=_STEP.value, dtype=_DTYPE.value
    )
    print(f"{_OUTPUT.value}: {', '.join(files)}")
    if _PUSH.value is not None:
        print(push(local_path("--output", _OUTPUT.value), _PUSH.value))


if __name__ == "__main__":
    cli.run(main)
