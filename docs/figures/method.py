"""Draws the figure of the method from a real image and masks of the package.

  python docs/figures/method.py [IMAGE]    # writes method-light.svg and method-dark.svg beside it

IMAGE is any image file; without one, a star of the procedural `shapes` is drawn. Masks and
crops are drawn as in training with `configs/cifar10_tiny.py`, but with four further crops instead
of one. The prediction from summary tokens is optional. Feature vectors cannot be drawn: a cell has
its mean colour instead.
"""

import base64
import io
import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from hjepa_jax.data.augment import Augment
from hjepa_jax.data.shapes import CLASS_NAMES, create_shapes
from hjepa_jax.masks.masks import target_union
from hjepa_jax.masks.samplers import MultiBlockMask
from hjepa_jax.models.hierarchy import pooling_matrix

SIDE, PATCH, GRID = 32, 4, 8  # pixels, pixels, patches
THEMES = {
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "box": "#f0f3f6",
              "hole": "#e2e6ea", "online": "#0b62c4", "ema": "#a04100", "loss": "#1a7f37"},
    "dark": {"ink": "#f0f6fc", "soft": "#9aa4af", "line": "#6e7681", "box": "#1c2128",
             "hole": "#2a3038", "online": "#6cb6ff", "ema": "#f0a36b", "loss": "#6bd58a"},
}  # fmt: skip


def read_image(path: str | None) -> np.ndarray:
    """Returns the image as uint8 [32, 32, 3]."""
    if path:
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(image)
    images, _ = create_shapes(60, 10, seed=3)
    stars = np.flatnonzero(images.labels == CLASS_NAMES.index("star"))
    return np.asarray(images.images)[stars[1]]


def sample_mask() -> tuple[np.ndarray, np.ndarray]:
    """Returns which patches the encoder sees and which are targets, both bool [8, 8]."""
    sampler = MultiBlockMask(GRID, align_level=0, scale=(0.09, 0.19), num_context=16)
    masks = sampler(jax.random.split(jax.random.PRNGKey(2), 64))
    hidden = np.asarray(target_union(masks, GRID**2))
    seen = (np.asarray(masks.context_index)[..., None] == np.arange(GRID**2)).any(axis=1)
    whole_cells = (pooling_matrix(GRID, 1) @ hidden.T >= 1).sum(axis=0)
    rows_and_columns = sum(
        seen.reshape(-1, GRID, GRID).any(axis=axis).sum(axis=1) for axis in (1, 2)
    )
    clear = np.where(hidden.sum(axis=1) < 32, rows_and_columns + whole_cells, 0)
    row = int(np.argmax(clear))  # a mask that shows much on a small drawing
    seen, hidden = seen[row] & ~hidden[row], hidden[row]
    return seen.reshape(GRID, GRID), hidden.reshape(GRID, GRID)


def crops(image: np.ndarray, num: int) -> np.ndarray:
    """Returns further views as training draws them, uint8 [num, 32, 32, 3]."""
    augment = Augment(
        SIDE, (0.5,) * 3, (0.25,) * 3, crop_scale=(0.3, 1.0), horizontal_flip=0.5,
        brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.2,
    )  # fmt: skip
    keys = jax.random.split(jax.random.PRNGKey(5), num)
    views = np.asarray(augment(keys, np.repeat(image[None], num, axis=0)))
    return np.clip(255 * (0.5 + 0.25 * views), 0, 255).astype(np.uint8)


def panel(x: float, y: float, size: float, image: np.ndarray, seen: np.ndarray, theme: dict) -> str:
    """Returns an image with holes for unseen patches; `seen` is bool [cells, cells]."""
    alpha = 255 * np.kron(seen, np.ones((SIDE // len(seen),) * 2)).astype(np.uint8)
    rgba = np.concatenate([image, alpha[..., None]], axis=-1).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    box = f'x="{x}" y="{y}" width="{size}" height="{size}"'
    return (
        f'<rect {box} rx="3" fill="{theme["hole"]}"/>'
        f'<image {box} href="data:image/png;base64,{data}"/>'
    )


def cells(
    x: float, y: float, size: float, image: np.ndarray, keep: np.ndarray, theme: dict, dashed: str
) -> str:
    """Cells of a level in their mean colours, only those in `keep` (bool [cells, cells])."""
    n = len(keep)
    means = image.reshape(n, SIDE // n, n, SIDE // n, 3).mean(axis=(1, 3)).astype(int)
    step, dash = size / n, ' stroke-dasharray="3 2"' if dashed == "online" else ""
    shown = [
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="3" fill="{theme["hole"]}"/>'
    ]
    for i, j in zip(*np.nonzero(keep), strict=True):
        r, g, b = means[i, j]
        shown.append(
            f'<rect x="{x + j * step + 1}" y="{y + i * step + 1}" width="{step - 2}" '
            f'height="{step - 2}" fill="rgb({r},{g},{b})" stroke="{theme[dashed]}" '
            f'stroke-width="1.5"{dash}/>'
        )
    return "".join(shown)


def text(x: float, y: float, words: str, colour: str, *, size: int = 14, bold: bool = False) -> str:
    """Lines of text, centred at x."""
    weight = ' font-weight="600"' if bold else ""
    lines = "".join(
        f'<tspan x="{x}" dy="{0 if k == 0 else size + 4}">{line}</tspan>'
        for k, line in enumerate(words.split("\n"))
    )
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="middle"{weight}>'
        f"{lines}</text>"
    )


def box(x: float, y: float, w: float, h: float, words: str, colour: str, theme: dict) -> str:
    """A network: a rounded box with its name."""
    first = y + h / 2 + 5 - 9 * words.count("\n")
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="{theme["box"]}" '
        f'stroke="{colour}" stroke-width="2"/>' + text(x + w / 2, first, words, colour, bold=True)
    )


def arrow(points: str, colour: str, *, dashed: bool = False, both: bool = False) -> str:
    """A line with a head at its end, or at both."""
    name = colour.lstrip("#")
    start = f' marker-start="url(#h{name})"' if both else ""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash} '
        f'marker-end="url(#h{name})"{start}/>'
    )


def head(colour: str) -> str:
    """The arrow head of a colour."""
    return (
        f'<marker id="h{colour.lstrip("#")}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{colour}"/>'
        "</marker>"
    )


def directions(x: float, y: float, radius: float, theme: dict) -> str:
    """Unit vectors on a circle: the views of one image together, of other images apart."""
    parts = [f'<circle cx="{x}" cy="{y}" r="{radius}" fill="none" stroke="{theme["line"]}"/>']
    groups = [(-70, "online", (-12, 0, 11)), (50, "soft", (-10, 0, 12)), (175, "soft", (-9, 0, 10))]
    for centre, colour, spread in groups:
        for offset in spread:
            angle = np.deg2rad(centre + offset)
            end = f"{x + radius * np.cos(angle):.1f},{y + radius * np.sin(angle):.1f}"
            parts.append(arrow(f"{x},{y} {end}", theme[colour]))
    return "".join(parts)


def draw(image: np.ndarray, theme: dict) -> str:
    """Returns the figure as SVG."""
    seen, hidden = sample_mask()
    hidden_1 = (pooling_matrix(GRID, 1) @ hidden.reshape(-1) >= 1).reshape(GRID // 2, -1)
    everything = np.ones((1, 1), bool)
    online, ema, loss = theme["online"], theme["ema"], theme["loss"]
    ink, soft, line = theme["ink"], theme["soft"], theme["line"]
    p = [panel(16, 205, 128, image, everything, theme), text(80, 196, "one image", ink, bold=True)]
    for y in (100, 269, 446):
        p.append(arrow(f"144,269 172,269 172,{y} 198,{y}" if y != 269 else "144,269 198,269", line))

    # Row 1: the online networks see a part and predict the rest.
    p += [text(268, 24, "visible patches", ink, bold=True), panel(204, 36, 128, image, seen, theme)]
    p += [
        arrow("336,100 374,100", online),
        box(380, 60, 130, 80, "context\nencoder", online, theme),
    ]
    p += [arrow("514,100 552,100", online), box(558, 60, 110, 80, "predictor", online, theme)]
    p += [text(613, 157, "from all tokens, and again\nfrom summary tokens alone", soft, size=11)]
    p += [
        text(806, 24, "predictions of hidden cells", ink, bold=True),
        arrow("672,100 710,100", online),
    ]
    p += [cells(716, 48, 104, image, hidden, theme, "online")]
    p += [cells(844, 48, 104, image, hidden_1, theme, "online")]

    # Row 2: the EMA encoder sees the whole image and gives the targets.
    p += [panel(204, 205, 128, image, everything, theme), arrow("336,269 374,269", ema)]
    p += [box(380, 229, 130, 80, "target\nencoder", ema, theme)]
    p += [
        arrow("445,142 445,226", ema, dashed=True),
        text(495, 190, "EMA of the\nparameters", ema, size=12),
    ]
    p += [arrow("514,269 710,269", ema), text(612, 260, "mean per cell, LayerNorm", soft, size=12)]
    p += [text(612, 288, "no gradient", soft, size=12)]
    p += [cells(716, 217, 104, image, hidden, theme, "ema")]
    p += [cells(844, 217, 104, image, hidden_1, theme, "ema")]
    p += [
        text(768, 338, "level 0: patches", soft, size=12),
        text(896, 338, "level 1: 2x2 cells", soft, size=12),
    ]
    for x, name in ((768, "level_0"), (896, "level_1")):
        p += [arrow(f"{x},156 {x},212", loss, both=True), text(x + 34, 189, name, loss, size=13)]

    # Row 3: the views of an image agree.
    quarter = np.random.default_rng(1)
    for k, view in enumerate(crops(image, 4)):
        some = np.zeros(GRID**2, bool)
        some[quarter.permutation(GRID**2)[:16]] = True
        x, y = 204 + 68 * (k % 2), 382 + 68 * (k // 2)
        p.append(panel(x, y, 60, view, some.reshape(GRID, GRID), theme))
    p += [text(268, 372, "further views", ink, bold=True), arrow("336,446 374,446", online)]
    p += [box(380, 406, 130, 80, "context\nencoder", online, theme)]
    p += [arrow("514,446 552,446", online), box(558, 406, 110, 80, "projection", online, theme)]
    p += [text(533, 510, "summary tokens, also of the masked view", soft, size=12)]
    p += [arrow("672,446 752,446", online), directions(832, 440, 68, theme)]
    p += [text(928, 385, "agreement", loss, size=13), text(910, 519, "spread", loss, size=13)]
    heads = "".join(head(c) for c in dict.fromkeys((online, ema, loss, line, soft)))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 530" font-family="-apple-system, '
        "'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\" role=\"img\">"
        f"<defs>{heads}</defs>{''.join(p)}</svg>\n"
    )


def main() -> None:
    """Writes both figures beside this file."""
    image = read_image(sys.argv[1] if len(sys.argv) > 1 else None)
    for name, theme in THEMES.items():
        pathlib.Path(__file__).with_name(f"method-{name}.svg").write_text(draw(image, theme))


if __name__ == "__main__":
    main()
