"""Figures show the given numbers and are readable."""

import io

import numpy as np
import pytest
from PIL import Image

from hjepa_jax.reporting import figures, image_figures
from hjepa_jax.reporting.figures import DARK_INK, DARK_PAPER, INK, PAPER, Panel
from hjepa_jax.reporting.snapshot import CONTEXT, DROPPED, TARGET


def contrast(*colours: str) -> float:
    """Returns the contrast of two colours by their relative luminance, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def shown(figure, axes: int) -> np.ndarray:
    """Returns the first picture in the given axes of a figure."""
    return np.ma.getdata(figure.axes[axes].images[0].get_array())


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_curves_show_values_units_and_limits():
    x, y = np.arange(20), np.linspace(3.0, 1.0, 20)
    panels = [
        Panel("Loss", "nats", {"a": (x, y), "b": (x, 2 * y)}, log=True),
        Panel("Rank", "directions", {"rank": (x, y)}, {"collapse below": 0.5}, from_zero=True),
    ]
    left, right = figures.curves(panels).axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), np.stack([x, y], 1))
    np.testing.assert_array_equal(left.lines[1].get_ydata(), 2 * y)
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["a", "b"]
    assert (left.get_xlabel(), left.get_ylabel(), left.get_yscale()) == ("step", "nats", "log")
    assert list(right.lines[1].get_ydata()) == [0.5, 0.5]
    assert right.get_ylim()[0] == 0


def test_lines_differ_in_colour_and_in_dash():
    x = np.arange(3.0)  # 0 has no logarithm
    panel = Panel("t", "u", {str(i): (x, x + i) for i in range(4)}, log=True)
    (axes,) = figures.curves([panel]).axes
    assert len({line.get_color() for line in axes.lines}) == 4
    assert len({line.get_linestyle() for line in axes.lines}) == 4
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(("ink", "paper"), [(INK, PAPER), (DARK_INK, DARK_PAPER)])
def test_text_and_lines_have_contrast_on_light_and_dark(ink, paper):
    assert contrast(ink, paper) >= 7
    assert contrast(figures.GREY, paper) >= 3
    distinct = [colour for colour in figures.COLOURS[:3] if contrast(colour, paper) >= 3]
    assert len(distinct) == 3


def test_a_dark_png_leaves_the_light_one_unchanged():
    figure = figures.curves([Panel("t", "u", {"a": (np.arange(3), np.arange(3.0))})])
    light, dark = figures.png(figure), figures.png(figure, dark=True)
    assert tuple(read(light)[0, 0]) == (255, 255, 255)
    assert tuple(read(dark)[0, 0]) == (0x0D, 0x11, 0x17)
    assert read(dark).max() > 200, "text must be light on dark paper"
    np.testing.assert_array_equal(read(figures.png(figure)), read(light))
    pixels = figures.pixels(figure)
    assert 0 <= pixels.min() < 0.3
    assert pixels.max() == 1
    width, height = figure.get_size_inches() * figures.DPI
    assert pixels.shape == (1, int(height), int(width), 3)


def test_a_png_has_the_colours_of_the_drawing():
    noise = np.random.default_rng(0).random((6, 32, 32, 3)).astype(np.float32)
    figure = image_figures.neighbours(noise, noise[:, None], ["cat"] * 6, [[True]] * 6)
    figures.pixels(figure)
    figure.set_layout_engine("none")  # a layout may shift by a pixel between drawings
    saved = read(figures.png(figure))
    np.testing.assert_array_equal(saved, (figures.pixels(figure)[0] * 255).round())


def test_bars_have_the_height_of_scores_and_gaps():
    scores = {"target": [50.0, np.nan], "random-init": [40.0, 30.0]}
    figure = figures.bars(["a", "b"], scores, title="t", ylabel="%", limits={"pixels": 20.0})
    (axes,) = figure.axes
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    np.testing.assert_array_equal(heights, list(scores.values()))
    assert [label.get_text() for label in axes.texts] == ["50.0", "", "40.0", "30.0"]
    assert list(axes.lines[0].get_ydata()) == [20.0, 20.0]
    assert "pixels: 20.0" in [t.get_text() for t in axes.get_legend().get_texts()]


def test_the_spectrum_is_relative_to_its_largest_value():
    values = {"a": np.array([4.0, 0.0, 0.0]), "rounding last": np.array([4.0, 2.0, 1e-6])}
    (axes,) = figures.spectrum(values).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 1e-8, 1e-8])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [1.0, 0.5])
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_histograms_integrate_to_one():
    x = np.random.default_rng(0).normal(size=(100, 4))
    (axes,) = figures.histograms({"a": x}, num_bins=20).axes
    outline = axes.patches[0].get_xy()
    area = np.sum(outline[1:-1:2, 1] * np.diff(outline[::2, 0])[: len(outline[1:-1:2])])
    assert area == pytest.approx(1.0, abs=0.02)


def test_confusion_rows_are_percent_of_the_true_class():
    labels, predictions = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    axes = figures.confusion_matrix(labels, predictions, ["cat", "dog"]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[75, 25], [0, 100]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_maps_show_every_image_under_its_class():
    points = np.arange(8.0).reshape(4, 2)
    figure = figures.scatter_maps({"PCA": points}, np.array([1, 0, 1, 1]), ["cat", "dog"])
    cats, dogs = figure.axes[0].collections
    np.testing.assert_array_equal(cats.get_offsets(), points[[1]])
    np.testing.assert_array_equal(dogs.get_offsets(), points[[0, 2, 3]])
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["cat", "dog"]


def test_ten_classes_have_ten_colours():
    figure = figures.scatter_maps(
        {"PCA": np.zeros((10, 2))}, np.arange(10), [f"class {i}" for i in range(10)]
    )
    colours = {tuple(drawn.get_facecolor()[0]) for drawn in figure.axes[0].collections}
    assert len(colours) == 10


@pytest.mark.parametrize(("y", "drawn"), [([0.5, 0.5], 0), ([0.5], 0), ([0.5, 0.6], 1)])
def test_a_constant_and_a_single_point_get_no_picture(y, drawn):
    panel = Panel("t", "u", {"a": (range(len(y)), np.array(y))})
    assert len(figures.changing_curves([panel], "name", "caption")) == drawn


def test_hidden_patches_of_a_view_are_dark():
    images, seen = np.full((1, 4, 4, 3), 0.8, np.float32), np.array([[[True, False]] * 2])
    figure = image_figures.views(images, images, seen, images[:, None], ~seen[:, None])
    whole, masked, ema, local = (shown(figure, row) for row in range(4))
    assert whole.min() > 0.7 < ema.min()
    assert masked[:, :2].min() > 0.7 > 0.15 > masked[:, 2:].max()
    assert local[:, 2:].min() > 0.7 > 0.15 > local[:, :2].max()


def test_masks_tint_targets_and_darken_dropped_patches():
    images = np.full((1, 4, 4, 3), 0.8, np.float32)
    state = np.array([[[CONTEXT, TARGET], [DROPPED, DROPPED]]])
    tinted = shown(image_figures.masks(images, [state]), 1)
    np.testing.assert_allclose(tinted[:2, :2], 0.8)
    red, _, blue = tinted[0, 3]
    assert red > 0.7 > 0.4 > blue, "targets must be orange"
    assert tinted[2:].max() < 0.15


def test_pca_maps_show_similar_features_in_similar_colours():
    features = np.random.default_rng(0).normal(size=(2, 6))
    tokens = features[[0, 0, 0, 1, 1, 1]].reshape(1, 2, 3, 6)
    colours = shown(image_figures.pca_maps(np.zeros((1, 8, 8, 3), np.float32), [tokens]), 1)
    assert colours.shape == (2, 3, 3)
    np.testing.assert_allclose(colours[0, 0], colours[0, 2], atol=1e-6)
    assert np.abs(colours[0, 2] - colours[1, 0]).max() > 0.5


def test_principal_components_match_an_svd():
    x = np.random.default_rng(0).normal(size=(50, 5)) * [5, 3, 1, 0.1, 0.1]
    projected = image_figures.principal_components(x, 2)
    _, sigma, axes = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(np.linalg.norm(projected, axis=0), sigma[:2])
    np.testing.assert_allclose(np.abs(projected), np.abs((x - x.mean(0)) @ axes[:2].T), atol=1e-9)


def test_cosine_maps_omit_unpredicted_patches():
    cosine = np.array([[[0.5, np.nan], [-1.0, 1.0]]])
    figure = image_figures.cosine_maps(np.zeros((1, 4, 4, 3), np.float32), [cosine])
    picture = figure.axes[1].images[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(picture.get_array())[0], [False, True])
    assert picture.get_clim() == (-1.0, 1.0)
    assert "cosine" in [axes.get_ylabel() for axes in figure.axes]


def test_similarity_is_one_at_the_framed_patch():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    images, patches = np.zeros((2, 9, 12, 3), np.float32), [(1, 1), (2, 3)]
    figure = image_figures.similarity_maps(images, tokens, patches)
    for i in range(2):
        place = 2 * 2 + i  # third row: similarity to the second patch
        similarity = shown(figure, place)
        assert similarity[2, 3] == pytest.approx(1.0)
        a, b = tokens[i, 2, 3], tokens[i, 0, 0]
        assert similarity[0, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert figure.axes[place].patches[0].get_xy() == (2.5, 1.5)


def test_attention_is_in_percent_of_all_patches():
    maps = {"head 0": np.array([[[1.0, 1.0], [0.0, 2.0]]])}
    figure = image_figures.attention_maps(np.zeros((1, 4, 4, 3), np.float32), maps)
    np.testing.assert_allclose(shown(figure, 1), [[25, 25], [0, 50]])


def test_neighbours_are_framed_by_class():
    rng = np.random.default_rng(0)
    queries, found = rng.random((2, 4, 4, 3)), rng.random((2, 3, 4, 4, 3))
    same = [[True, False, True], [False, False, True]]
    figure = image_figures.neighbours(queries, found, ["cat", "dog"], same)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["cat", "dog"]
    np.testing.assert_array_equal(shown(figure, 2 * 2 + 1), found[1, 1])
    colours = [[figure.axes[(j + 1) * 2 + i].spines["left"].get_edgecolor() for j in range(3)]
               for i in range(2)]  # fmt: skip
    assert [[c == colours[0][0] for c in row] for row in colours] == same
