"""Features for TensorBoard's PROJECTOR tab: one point per image, with class and thumbnail."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num
from PIL import Image

from hjepa_jax.runtime.files import replacing
from hjepa_jax.runtime.names import printable

THUMBNAIL = 32  # pixels per side


def write_projector(
    logdir: Path,
    features: Mapping[str, Float[np.ndarray, "n _"]],
    class_names: Sequence[str],
    images: Num[np.ndarray, "n H W C"],
) -> None:
    """Writes projector_config.pbtxt, which TensorBoard reads, and the files that it names."""
    folder = logdir / "projector"
    folder.mkdir(exist_ok=True)
    labels = "".join(f"{' '.join(printable(name).split())}\n" for name in class_names)
    (folder / "labels.tsv").write_text(labels, encoding="utf-8")
    Image.fromarray(sprite(images)).save(folder / "images.png")
    config = []
    for name, x in features.items():
        x.astype("<f4").tofile(folder / f"{name}.bytes")
        config.append(f"""\
embeddings {{
  tensor_name: "{name}"
  tensor_path: "projector/{name}.bytes"
  tensor_shape: {x.shape[0]}
  tensor_shape: {x.shape[1]}
  metadata_path: "projector/labels.tsv"
  sprite {{
    image_path: "projector/images.png"
    single_image_dim: {THUMBNAIL}
    single_image_dim: {THUMBNAIL}
  }}
}}
""")
    # Written last, because it names the other files.
    with replacing(logdir / "projector_config.pbtxt") as file:
        file.write("".join(config).encode())


def sprite(images: Num[np.ndarray, "n H W C"]) -> Num[np.ndarray, "S S 3"]:
    """Returns a square image of thumbnails, row by row; unused positions are black."""
    side = math.ceil(math.sqrt(len(images)))
    picture = np.zeros((side, THUMBNAIL, side, THUMBNAIL, 3), np.uint8)
    if images.dtype != np.uint8 or images.shape[3] != 3:
        from hjepa_jax.reporting.image_figures import as_pictures  # matplotlib loads slowly

        images = np.rint(255 * as_pictures(images)).astype(np.uint8)
    for i, image in enumerate(images):
        small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL))
        picture[i // side, :, i % side] = np.asarray(small)
    return picture.reshape(side * THUMBNAIL, side * THUMBNAIL, 3)
