"""Makes a work directory of a published encoder.

  python -m hjepa_jax.convert --input=FILE|FOLDER --workdir=DIR
    [--image_size=224] [--num_heads=12] [--data=SOURCE]

The input is one of these:

* a folder from Hugging Face: I-JEPA, ViT, DINOv2 (also with registers), with
  its config.json;
* timm's vision transformers: such a folder, or a .safetensors file;
* an encoder that `export` has made (.safetensors);
* a file of torch.save with tensors in timm's layout: I-JEPA (.pth.tar), DINO,
  DINOv2, MAE of Meta; a checkpoint of the PyTorch H-JEPA, whose target encoder
  is taken.

`probe`, `embed`, `report` and `export` work on the result as on a run. To train it further, give
`--config.train.init_from=DIR` to a run with the same `model` fields.

No code in a file is run. A file that is damaged or holds another architecture is refused.
"""

from absl import flags

from hjepa_jax import cli

_INPUT = flags.DEFINE_string("input", None, "The encoder: a file or a folder.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory to make.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side of the images in pixels (that of the encoder).", lower_bound=1
)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Heads of attention.", lower_bound=1)
_DATA = flags.DEFINE_string("data", None, "Data set to judge it on: a data.source.")


def main() -> None:
    """Runs the command."""
    from hjepa_jax.data.sides import pair
    from hjepa_jax.exchange.convert import convert
    from hjepa_jax.runtime.backend import select_platform

    select_platform("auto")
    config = convert(
        _INPUT.value,
        _WORKDIR.value,
        image_size=_IMAGE_SIZE.value,
        num_heads=_NUM_HEADS.value,
        data=_DATA.value,
    )
    c, (height, width) = config.model, pair(config.data.image_size)
    print(
        f"{_WORKDIR.value}: width {c.width}, {c.depth} blocks, {c.num_heads} heads, patches of "
        f"{c.patch_size} pixels, images {height}x{width}, mean {tuple(config.data.mean)}"
    )
    print(f"judge it: python -m hjepa_jax.probe --workdir={_WORKDIR.value} --data=SOURCE")


if __name__ == "__main__":
    cli.run(main)
