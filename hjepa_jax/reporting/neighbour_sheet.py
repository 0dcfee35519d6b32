"""A page with images and, for each, the images with the most similar features."""

import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Num
from PIL import Image

from hjepa_jax.reporting.image_figures import as_pictures
from hjepa_jax.reporting.page import data_address, html_page
from hjepa_jax.runtime.names import printable

MAX_SIDE = 160  # pixels of a thumbnail; phones have two or three in a row

_STYLE = """
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .6rem;
  padding: .8rem 0; border-bottom: 1px solid var(--line); }
figure { margin: 0; min-width: 0; } figcaption { overflow-wrap: anywhere; font-size: .75rem; }
figure img { width: 100%; border-radius: 4px; }
figure:first-child { background: var(--soft); border-radius: 6px;
  outline: .3rem solid var(--soft); }
"""


class Shown(NamedTuple):
    """One image of the page; `cosine` is the similarity to the first image of its group."""

    name: str
    image: Num[np.ndarray, "H W C"]
    cosine: float | None = None


def neighbour_sheet(groups: Sequence[Sequence[Shown]], *, column: str, count: int) -> str:
    """Returns a page that loads no other file.

    Args:
      groups: each group has an image, then its nearest neighbours.
      column: name of the features that were compared.
      count: number of images that were searched.
    """
    sections = [f"<section>{''.join(map(_figure, group))}</section>\n" for group in groups]
    text = (
        f"{len(groups)} of {count:,} images. Each is followed by the other images with the most "
        f"similar features ({html.escape(column)}), with their cosine."
    )
    body = f"<h1>Nearest neighbours</h1>\n<p>{text}</p>\n{''.join(sections)}"
    return html_page(body, "Nearest neighbours", _STYLE)


def _figure(shown: Shown) -> str:
    picture = Image.fromarray(np.rint(as_pictures(shown.image) * 255).astype(np.uint8))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=90, subsampling=0)
    name = html.escape(printable(shown.name))
    cosine = "" if shown.cosine is None else f"{shown.cosine:.3f} "
    return (
        f'<figure><img src="{data_address(file.getvalue(), "jpeg")}" alt="{name}" loading="lazy">'
        f"<figcaption>{cosine}{name}</figcaption></figure>"
    )
