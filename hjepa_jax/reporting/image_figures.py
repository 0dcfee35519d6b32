"""Figures over images: masks, features, predictions, similarity, attention, neighbours.

Pure functions from arrays to matplotlib figures, like `figures`. Every figure is a table of
pictures with one column per image.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hjepa_jax.data.pixels import full_scale
from hjepa_jax.reporting.figures import COLOURS, GREY, new_figure, plain
from hjepa_jax.reporting.snapshot import CONTEXT, DROPPED, TARGET, Snapshot

Pictures = Float[np.ndarray, "B H W 3"]
MAX_LOCAL = 4  # local views of an image in a figure


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table of pictures.

    Attributes:
      title: label of the row.
      pictures: [B, H, W, 3] in [0, 1], or values [B, rows, columns]; NaN is left empty.
      limits: lowest and highest value of the colour bar, for values.
      unit: label of the colour bar.
    """

    title: str
    pictures: Float[np.ndarray, "B H W 3"] | Float[np.ndarray, "B gh gw"]
    limits: tuple[float, float] | None = None
    unit: str = ""


def picture_table(rows: Sequence[Row], *, heads: Sequence[str] = ()) -> Figure:
    """Returns pictures in rows, one column per image; the axes are in reading order."""
    num_images = len(rows[0].pictures)
    figure = new_figure(num_images + 1.2, 1.05 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), num_images, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        low, high = row.limits or (None, None)
        for cell, picture in zip(line, row.pictures, strict=True):
            cell.imshow(picture, cmap="cividis", vmin=low, vmax=high)
            cell.set(xticks=[], yticks=[], facecolor="none")
            for spine in cell.spines.values():
                spine.set_color(GREY)
        line[0].set_ylabel(row.title, fontsize=8)
        if row.limits:
            bar = figure.colorbar(line[-1].images[0], ax=list(line), pad=0.01, aspect=12)
            bar.set_label(row.unit, fontsize=7)
            bar.ax.tick_params(labelsize=6)
    for cell, head in zip(axes[0], heads, strict=False):
        cell.set_title(plain(head), fontsize=8)
    return figure


def masks(images: Pictures, states: Sequence[Int[np.ndarray, "B _ _"]]) -> Figure:
    """Returns the images with context, targets and dropped patches, at every level.

    `images` are in [0, 1]; `states` per level, [B, rows, columns]: `CONTEXT`, `TARGET` or
    `DROPPED`.
    """
    orange = np.array([0.9, 0.6, 0.0])
    rows = [Row("image", images)]
    for level, state in enumerate(states):
        whole = enlarge(state, images.shape[1:3])[..., None]
        picture = np.where(whole == DROPPED, 0.12 * images, images)
        picture = np.where(whole == TARGET, 0.35 * images + 0.65 * orange, picture)
        rows.append(Row(f"level {level}", picture.astype(np.float32)))
    figure = picture_table(rows)
    handles = [
        Patch(facecolor="white", edgecolor=GREY, label="context (visible)"),
        Patch(facecolor=tuple(orange), label="target (predicted)"),
        Patch(facecolor="#1f1f1f", edgecolor=GREY, label="dropped"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def views(
    whole: Pictures,
    view: Pictures,
    visible: Bool[np.ndarray, "B gh gw"],
    local: Float[np.ndarray, "B V h w 3"] | None = None,
    local_seen: Bool[np.ndarray, "B V rows cols"] | None = None,
) -> Figure:
    """Returns the views of each image that the networks see; hidden patches are dark.

    Args:
      whole: the images before augmentation, in [0, 1].
      view: the augmented images.
      visible: patches of `view` that the context encoder sees; the target encoder sees all.
      local: further crops; at most `MAX_LOCAL` of them are shown.
      local_seen: patches of the crops that the encoder sees; None = all.
    """
    rows = [
        Row("image", whole),
        Row("masked view", _darkened(view, visible)),
        Row("EMA sees", view),
    ]
    if local is not None:
        for v in range(min(local.shape[1], MAX_LOCAL)):
            crop = local[:, v]
            seen = crop if local_seen is None else _darkened(crop, local_seen[:, v])
            rows.append(Row(f"local view {v + 1}", seen))
    return picture_table(rows)


def _darkened(images: Pictures, seen: Bool[np.ndarray, "B _ _"]) -> Pictures:
    """Returns the images with dark pixels in all patches that are not `seen`."""
    return np.where(enlarge(seen, images.shape[1:3])[..., None], images, 0.12 * images)


def pca_maps(images: Pictures, tokens: Sequence[Float[np.ndarray, "B _ _ D"]]) -> Figure:
    """Returns the first three principal components of the features, as red, green and blue.

    All images share one basis per level, so that similar colours mean similar features.
    """
    rows = [Row("image", images)]
    for level, x in enumerate(tokens):
        _, high, wide, width = x.shape
        flat = principal_components(x.reshape(-1, width), 3)
        least, most = np.percentile(flat, (2, 98), axis=0)
        rgb = np.clip((flat - least) / np.maximum(most - least, 1e-12), 0, 1)
        rows.append(Row(f"level {level}, {high}x{wide}", rgb.reshape(-1, high, wide, 3)))
    return picture_table(rows)


def cosine_maps(images: Pictures, cosine: Sequence[Float[np.ndarray, "B _ _"]]) -> Figure:
    """Returns the cosine of prediction and target, for hidden patches and cells.

    `cosine` per level, [B, rows, columns], in [-1, 1]; NaN = not predicted.
    """
    rows = [Row("image", images)]
    for level, values in enumerate(cosine):
        rows.append(Row(f"level {level}", values, (-1.0, 1.0), "cosine"))
    return picture_table(rows)


def similarity_maps(
    images: Pictures, tokens: Float[np.ndarray, "B gh gw D"], patches: Sequence[tuple[int, int]]
) -> Figure:
    """Returns the cosine between the features of one patch, which is framed, and all patches.

    Each of `patches` is a row and a column.
    """
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    rows = [Row("image", images)]
    for row, col in patches:
        similarity = np.einsum("brcd,bd->brc", unit, unit[:, row, col])
        rows.append(Row(f"to patch {row}, {col}", similarity, (-1.0, 1.0), "cosine"))
    figure = picture_table(rows)
    for i in range(len(images)):
        for j, (row, col) in enumerate(patches):
            frame = Rectangle(
                (col - 0.5, row - 0.5), 1, 1, fill=False, color=COLOURS[1], linewidth=2
            )
            figure.axes[(j + 1) * len(images) + i].add_patch(frame)
    return figure


def attention_maps(images: Pictures, maps: Mapping[str, Float[np.ndarray, "B gh gw"]]) -> Figure:
    """Returns attention over the patches, each map in percent of its sum."""
    rows = [Row("image", images)]
    for name, values in maps.items():
        share = 100 * values / np.maximum(values.sum(axis=(1, 2), keepdims=True), 1e-12)
        rows.append(Row(name, share, (0.0, float(share.max())), "percent"))
    return picture_table(rows)


def neighbours(
    queries: Pictures,
    found: Float[np.ndarray, "B k H W 3"],
    query_names: Sequence[str],
    same_class: Sequence[Sequence[bool]],
) -> Figure:
    """Returns images and their nearest neighbours; frames show whether the class is the same.

    Without classes `same_class` is empty, and there are no frames.
    """
    rows = [Row("query", queries)]
    rows += [Row(f"nearest {j + 1}", found[:, j]) for j in range(found.shape[1])]
    figure = picture_table(rows, heads=query_names)
    for i, sames in enumerate(same_class):
        for j, same in enumerate(sames):
            for spine in figure.axes[(j + 1) * len(queries) + i].spines.values():
                spine.set(color=COLOURS[0] if same else COLOURS[1], linewidth=2.5)
                spine.set_linestyle("-" if same else (0, (2, 1)))
                spine.set_capstyle("butt")  # round caps would fill the gaps
    if not same_class:
        return figure
    handles = [
        Patch(facecolor="none", edgecolor=COLOURS[0], label="same class"),
        Patch(facecolor="none", edgecolor=COLOURS[1], linestyle="--", label="another class"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def snapshot_figures(snapshot: Snapshot) -> dict[str, Figure]:
    """Returns the figures of a snapshot by name; its arrays must be on the host."""
    pixels, (rows, cols) = as_rgb(snapshot.pixels), snapshot.tokens[0].shape[1:3]
    quarter = [(rows // 4, cols // 4), (3 * rows // 4, 3 * cols // 4)]
    heads = {f"head {i}": snapshot.attention[:, i] for i in range(snapshot.attention.shape[1])}
    shown = dict(list(heads.items())[:6])
    return {
        "masks": masks(pixels, snapshot.states),
        "views": views(
            pixels,
            as_rgb(snapshot.view),
            snapshot.states[0] == CONTEXT,
            None if snapshot.local_views is None else as_rgb(snapshot.local_views),
            snapshot.local_seen,
        ),
        "pca": pca_maps(pixels, snapshot.tokens),
        "cosine": cosine_maps(pixels, snapshot.cosine),
        "similarity": similarity_maps(pixels, snapshot.tokens[0], quarter),
        "attention": attention_maps(pixels, {**shown, "rollout": snapshot.rollout}),
    }


def as_pictures(images: Num[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B H W 3"]:
    """Returns stored images as RGB in [0, 1]; each channel is stretched, except for 8 bits."""
    x = images.astype(np.float32) / full_scale(images.dtype)
    if images.dtype != np.uint8:
        axes = tuple(range(x.ndim - 1))
        low, high = x.min(axis=axes), x.max(axis=axes)
        x = (x - low) / np.maximum(high - low, 1e-12)
    return as_rgb(x)


def as_rgb(images: Float[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B H W 3"]:
    """Returns images with pixels in [0, 1] as RGB.

    One channel becomes grey. Two channels, or more than three, are replaced by their first
    principal components.
    """
    c = images.shape[-1]
    if c == 3:
        return images
    if c == 1:
        return np.repeat(images, 3, axis=-1)
    flat = principal_components(images.reshape(-1, c), min(c, 3))
    low, high = np.percentile(flat, (1, 99), axis=0)
    flat = np.clip((flat - low) / np.maximum(high - low, 1e-12), 0, 1)
    flat = np.pad(flat, ((0, 0), (0, 3 - flat.shape[1])))
    return flat.reshape(*images.shape[:-1], 3).astype(np.float32)


def enlarge(grid: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns cells [B, rows, columns] as pixels [B, *size], by nearest neighbour."""
    rows, cols = (np.arange(s) * n // s for s, n in zip(size, grid.shape[1:3], strict=True))
    return grid[:, rows][:, :, cols]


def principal_components(x: Float[np.ndarray, "n D"], k: int) -> Float[np.ndarray, "n k"]:
    """Returns the centred rows projected on their first k principal axes, with fixed signs."""
    centred = x.astype(np.float64) - x.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :k]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return centred @ axes
