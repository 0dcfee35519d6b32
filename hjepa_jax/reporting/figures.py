"""Figures of a run's numbers: pure functions from arrays to matplotlib figures, drawn by Agg.

The colours, by Okabe and Ito (2008), can be distinguished with all common kinds of colour vision;
lines also differ in dashes. `png(figure, dark=True)` draws the same figure for a dark page.

>>> figure = curves([Panel("loss", "nats", {"train/loss": ([0, 50, 100], [3.0, 2.0, 1.5])})])
>>> png(figure)[1:4]  # the bytes of a file
b'PNG'
"""

import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hjepa_jax.runtime.names import printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Ten colours for classes, by Petroff (2021, arXiv:2107.02270, table 1).
CLASS_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70",
    "#717581", "#92dadd",
)  # fmt: skip
DASHES = ("-", "--", "-.", ":")
INK, PAPER = "#1f2328", "#ffffff"
DARK_INK, DARK_PAPER = "#e6edf3", "#0d1117"
GREY = "#8c959f"
DPI = 110
MAX_NAME = 24  # characters of the name of a class or run

Line = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      title: title above the axes.
      ylabel: unit of the y axis.
      lines: (x, y) by label; NaN in y interrupts the line.
      limits: horizontal lines by label, such as a threshold.
      log: whether the y axis is logarithmic.
      from_zero: whether the y axis starts at 0.
    """

    title: str
    ylabel: str
    lines: Mapping[str, Line]
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log: bool = False
    from_zero: bool = False

    @property
    def shows_change(self) -> bool:
        """Whether a line rises or falls. Constants and single points need no picture."""
        return any(np.nanmin(y) < np.nanmax(y) for _, y in self.lines.values() if len(y) > 1)


def changing_curves(
    panels: Sequence[Panel], name: str, caption: str
) -> dict[str, tuple[Figure, str]]:
    """Returns {name: (figure, caption)} with the panels that show a change; {} if none does."""
    shown = [panel for panel in panels if panel.shows_change]
    return {name: (curves(shown), caption)} if shown else {}


def curves(panels: Sequence[Panel], *, xlabel: str = "step") -> Figure:
    """Returns lines over training steps: panels side by side, two or three per row."""
    columns = 3 if len(panels) == 3 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.4 if columns == 1 else 10.0, 3.1 * rows)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for j, (label, (x, y)) in enumerate(panel.lines.items()):
            axes.plot(
                x, y, label=plain(label), linewidth=1.6,
                marker="o" if len(x) <= 12 else "", markersize=3,
                color=COLOURS[j % len(COLOURS)], linestyle=DASHES[j % len(DASHES)],
            )  # fmt: skip
        for label, value in panel.limits.items():
            axes.axhline(value, color=GREY, linestyle=":", linewidth=1.4, label=label)
        if panel.log and all(np.nanmin(y, initial=1.0) > 0 for _, y in panel.lines.values()):
            axes.set_yscale("log")
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if axes.get_yscale() == "linear":
            axes.ticklabel_format(axis="y", useOffset=False)
        finish(axes, panel.title, xlabel, panel.ylabel)
        if len(panel.lines) + len(panel.limits) > 1:
            axes.legend(
                fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2)
            )
    return figure


def bars(
    groups: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    *,
    title: str,
    ylabel: str,
    limits: Mapping[str, float] | None = None,
) -> Figure:
    """Returns bars in groups (such as representations), one bar per name (such as encoders).

    `scores` has a value per group, by name; NaN leaves a gap. `limits` are horizontal lines.
    """
    figure = new_figure(max(5.4, 1.1 * len(groups) + 2.0), 3.4)
    axes, width = figure.add_subplot(), 0.8 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        x = np.arange(len(groups)) + (i - (len(scores) - 1) / 2) * width
        hatch = ("", "//", "..")[i % 3]
        drawn = axes.bar(x, values, width * 0.92, label=name, color=COLOURS[i], hatch=hatch)
        texts = ["" if np.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(drawn, labels=texts, fontsize=7, padding=1)
    for label, value in (limits or {}).items():
        axes.axhline(value, color=GREY, linestyle=":", linewidth=1.4, label=f"{label}: {value:.1f}")
    axes.set_xticks(range(len(groups)), groups, rotation=15 if len(groups) > 4 else 0)
    axes.margins(y=0.12)
    finish(axes, title, "", ylabel)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def spectrum(values: Mapping[str, Float[np.ndarray, " _"]]) -> Figure:
    """Returns singular values of centred features, largest first, relative to the largest.

    A healthy spectrum decays slowly; a cliff means that few directions are used. If the last value
    is only rounding error, it is omitted. This happens after a LayerNorm, which removes one
    direction, and for centred rows.
    """
    lines = {}
    for name, v in values.items():
        shown = v[:-1] if len(v) > 1 and v[-1] < 1e-4 * v[-2] else v
        relative = np.maximum(shown / max(v[0], 1e-30), 1e-8)
        lines[name] = (np.arange(1, len(shown) + 1), relative)
    panel = Panel("Singular values of the features", "relative to the largest", lines, log=True)
    return curves([panel], xlabel="index of the singular value")


def histograms(values: Mapping[str, Float[np.ndarray, "_ _"]], *, num_bins: int = 60) -> Figure:
    """Returns the density of the entries of each feature matrix."""
    figure = new_figure(5.4, 3.1)
    axes = figure.add_subplot()
    for i, (name, x) in enumerate(values.items()):
        axes.hist(
            x.ravel(), bins=num_bins, density=True, histtype="step", linewidth=1.6, label=name,
            color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)],
        )  # fmt: skip
    finish(axes, "Values of the features", "value", "density")
    axes.legend(fontsize=8, frameon=False)
    return figure


def confusion_matrix(
    labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> Figure:
    """Returns the confusion matrix: rows are true classes and sum to 100 %."""
    k = len(class_names)
    counts = np.zeros((k, k))
    np.add.at(counts, (labels, predictions), 1)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(0.42 * k + 2.2, 12.0)
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
    if k <= 20:
        for (row, column), value in np.ndenumerate(percent):
            colour = "#ffffff" if value < 55 else "#000000"
            text = axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7)
            text.set_color(colour)
    ticks = range(0, k, max(1, k // 25))
    names = [plain(class_names[i]) for i in ticks]
    axes.set_xticks(ticks, names, rotation=60, ha="right")
    axes.set_yticks(ticks, names)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("percent of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    finish(axes, "Confusion matrix", "predicted class", "true class", grid=False)
    return figure


def scatter_maps(
    maps: Mapping[str, Float[np.ndarray, "n 2"]],
    labels: Int[np.ndarray, " n"] | None,
    class_names: Sequence[str],
) -> Figure:
    """Returns 2-D maps of features, one point per image, with colour and marker by class.

    Without classes (None) all points look the same.
    """
    figure = new_figure(4.6 * len(maps) + 1.6, 4.4)
    markers = "os^Dv"
    for i, (name, points) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), i + 1)
        for j, label in enumerate(np.unique(0 if labels is None else labels)):
            rows = np.ones(len(points), bool) if labels is None else labels == label
            axes.scatter(
                *points[rows].T, s=12, alpha=0.75, linewidths=0,
                color=CLASS_COLOURS[j % len(CLASS_COLOURS)],
                marker=markers[j // len(CLASS_COLOURS) % len(markers)],
                label=None if labels is None else plain(class_names[int(label)]),
            )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        finish(axes, name, "first axis", "second axis", grid=False)
    if labels is not None and len(class_names) <= 30:
        figure.axes[-1].legend(fontsize=8, frameon=False, bbox_to_anchor=(1.0, 1.0))
    return figure


def plain(name: str) -> str:
    """Returns a name in a form that matplotlib draws literally.

    Dollar signs would start a formula, a legend omits names that start with an underscore, and a
    long name would leave no room for the axes.
    """
    text = printable(name)
    text = text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches, on Agg, with automatic layout."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, *, grid: bool = True) -> None:
    """Adds title, labels and the frame that all figures have."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8, color=GREY, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    if grid:
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)


def png(figure: Figure, *, dark: bool = False) -> bytes:
    """Returns the figure as a PNG file, for a light or a dark page."""
    ink, paper = (DARK_INK, DARK_PAPER) if dark else (INK, PAPER)
    figure.set_facecolor(paper)
    for axes in figure.axes:
        axes.set_facecolor(paper)
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set_facecolor(paper)
    for text in figure.findobj(Text):
        if text.get_color() in ("black", INK, DARK_INK):  # not text on pictures
            text.set_color(ink)  # pyright: ignore[reportAttributeAccessIssue]
    file, canvas = io.BytesIO(), cast(FigureCanvasAgg, figure.canvas)
    _draw(canvas)
    # The layout takes half of the drawing time, and does not change with the colours.
    figure.set_layout_engine("none")
    Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3]).save(file, "PNG")
    return file.getvalue()


def pixels(figure: Figure) -> Float[np.ndarray, "1 H W 3"]:
    """Returns the figure as pixels in [0, 1], the form of pictures in TensorBoard."""
    canvas = cast(FigureCanvasAgg, figure.canvas)
    _draw(canvas)
    return np.asarray(canvas.buffer_rgba(), np.float32)[None, :, :, :3] / 255.0


def _draw(canvas: FigureCanvasAgg) -> None:
    """Draws the figure, without warnings about characters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
        canvas.draw()
