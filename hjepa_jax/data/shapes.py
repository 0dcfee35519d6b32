"""Built-in procedural images: ten shapes that differ only in their outline.

No download and no file: the whole set is a function of three numbers.

    train, test = create_shapes(num_train=5_000, num_test=2_000, seed=0)

The label fixes the outline and nothing else. Colours, textures, area, position, rotation, the
distractor and the noise are drawn in the same way for every class. The shape is light on dark as
often as dark on light, so that no linear function of the pixels separates the classes. Position and
area vary so widely that the nearest image, pixel by pixel, mostly has another class.
`experiments/shapes_tiny` measures both, and shows that a network trained on the labels learns the
set.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from hjepa_jax.data.base import Split

IMAGE_SIZE = 32
NUM_TRAIN, NUM_TEST = 5_000, 2_000  # images of the source `shapes`
AREA = (60.0, 140.0)  # area of a shape, square pixels: a disk 9 to 13 pixels across
CENTRES = ((-8.0, -8.0), (8.0, -8.0), (-8.0, 8.0), (8.0, 8.0))  # pixels from the image centre
MAX_OFFSET = 5.5  # largest distance of a shape's centroid from its centre, pixels per axis
MAX_TURN = 0.4  # largest rotation of a shape, radians in either direction
DARK = 0.35  # largest value of a channel of a dark colour, in [0, 1]
LIGHT = 0.65  # smallest value of a channel of a light colour
LIGHT_BACKGROUNDS = 0.5  # share of images with a light background and dark shapes
TEXTURE = 0.05  # amplitude per colour channel, in [0, 1]
NOISE = 0.05  # standard deviation per pixel and channel
CHUNK = 1000  # images drawn at once; another value changes the images of a seed

Number = float | int  # the type checker of the tests does not accept an int for a float
Plane = Float[np.ndarray, "..."]  # one number per pixel, or an array that broadcasts to this shape
PerImage = Float[np.ndarray, "n 1 1"]
Colour = Float[np.ndarray, "n 1 1 3"]
Cover = Float[np.ndarray, "n H W"]  # fraction of each pixel that a figure covers, in [0, 1]
SignedDistance = Callable[[Plane, Plane], Plane]  # (x, y) -> distance, negative inside


def create_shapes(
    num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 0
) -> tuple[Split, Split]:
    """Draws the training and the test images, from independent random streams.

    Args:
      num_train: training images; the ten classes differ in count by at most one.
      num_test: test images, balanced in the same way.
      seed: the same seed gives the same bytes.

    Returns:
      (train, test), images [n, 32, 32, 3], labels indexing `CLASS_NAMES`.
    """
    streams = np.random.default_rng(seed).spawn(2)
    train, test = map(_create_split, (num_train, num_test), streams)
    return train, test


def _create_split(num_images: int, rng: np.random.Generator) -> Split:
    labels = rng.permutation(np.arange(num_images, dtype=np.int32) % len(CLASS_NAMES))
    images = np.empty((num_images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in range(0, num_images, CHUNK):
        images[start : start + CHUNK] = _draw(labels[start : start + CHUNK], rng)
    return Split(images, labels)


def _draw(labels: Int[np.ndarray, " n"], rng: np.random.Generator) -> UInt8[np.ndarray, "n H W C"]:
    """Paints background, shapes and distractor, in this order, and adds pixel noise."""
    n = len(labels)
    on_light = rng.random((n, 1, 1, 1)) < LIGHT_BACKGROUNDS
    canvas = _either(on_light, rng) + _texture(n, rng)
    for centre in CENTRES:
        cover = _shape_cover(labels, centre, rng)
        colour = _either(~on_light, rng) + _texture(n, rng)
        canvas += cover[..., None] * (colour - canvas)
    cover = _distractor_cover(n, rng)
    canvas += cover[..., None] * (_colour(n, 0, 1, rng) - canvas)
    canvas += NOISE * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)


def _either(light: Bool[np.ndarray, "n 1 1 1"], rng: np.random.Generator) -> Colour:
    """Draws a light or a dark colour for each image."""
    n = len(light)
    return np.where(light, _colour(n, LIGHT, 1, rng), _colour(n, 0, DARK, rng))


def _texture(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n H W 3"]:
    """Draws a gradient, stripes or smooth noise, along one random direction in colour space."""
    x, _ = _placed(n, 0, rng)
    gradient = x / (IMAGE_SIZE / 2)
    stripes = np.sin(x * _uniform(rng, n, 0.4, 1.6) + _uniform(rng, n, 0, 2 * np.pi))
    knots = rng.uniform(-1, 1, (n, 5, 5)).astype(np.float32)
    tent = np.linspace(0, 4, IMAGE_SIZE, dtype=np.float32)[:, None] - np.arange(5)
    tent = (1 - np.abs(tent)).clip(0).astype(np.float32)  # [H, 5]: linear interpolation
    kind = rng.integers(3, size=(n, 1, 1))
    pattern = np.choose(kind, [gradient, stripes, tent @ knots @ tent.T])
    direction = rng.uniform(-TEXTURE, TEXTURE, (n, 1, 1, 3)).astype(np.float32)
    return pattern[..., None] * direction


def _shape_cover(
    labels: Int[np.ndarray, " n"], centre: tuple[Number, Number], rng: np.random.Generator
) -> Cover:
    x, y = _placed(len(labels), MAX_OFFSET, rng, centre=centre, max_turn=MAX_TURN)
    area = _uniform(rng, len(labels), *AREA)
    cover = np.empty(x.shape, np.float32)
    for label, name in enumerate(CLASS_NAMES):
        mine = labels == label
        unit_area, centre_x, centre_y = _moments(name)
        scale = np.sqrt(area[mine] / unit_area)  # pixels per unit
        distance = OUTLINES[name](x[mine] / scale + centre_x, y[mine] / scale + centre_y)
        cover[mine] = (0.5 - scale * distance).clip(0, 1)
    return cover


def _distractor_cover(n: int, rng: np.random.Generator) -> Cover:
    """Draws a small blob or bar, anywhere in the image."""
    x, y = _placed(n, IMAGE_SIZE / 2, rng)
    bar = np.maximum(np.abs(x) - _uniform(rng, n, 3, 6), np.abs(y) - _uniform(rng, n, 0.7, 1.2))
    blob = np.hypot(x, y) - _uniform(rng, n, 1.2, 2.5)
    distance = np.where(_uniform(rng, n, 0, 1) < 0.5, bar, blob)
    return (0.5 - distance).clip(0, 1)


def _placed(
    n: int,
    max_offset: Number,
    rng: np.random.Generator,
    *,
    centre: tuple[Number, Number] = (0, 0),
    max_turn: Number = np.pi,
) -> tuple[Cover, Cover]:
    """Returns pixel centres x and y in the coordinates of a shifted and rotated figure, pixels."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2
    x = axis[None, None, :] - centre[0] - _uniform(rng, n, -max_offset, max_offset)
    y = axis[None, :, None] - centre[1] - _uniform(rng, n, -max_offset, max_offset)
    angle = _uniform(rng, n, -max_turn, max_turn)
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _colour(n: int, low: Number, high: Number, rng: np.random.Generator) -> Colour:
    return rng.uniform(low, high, (n, 1, 1, 3)).astype(np.float32)


def _uniform(rng: np.random.Generator, n: int, low: Number, high: Number) -> PerImage:
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _polygon(*vertices: tuple[Number, Number]) -> SignedDistance:
    """Returns the exact signed distance to a closed polygon (even-odd filling)."""

    def distance(x: Plane, y: Plane) -> Plane:
        squared = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clip(0, 1)
            squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
            if ey:  # a ray along x does not cross a level edge
                inside ^= ((ay > y) != (by > y)) & (px < py * (ex / ey))
        return np.where(inside, -1, 1) * np.sqrt(squared)

    return distance


def _star(num_points: int, inner_radius: float) -> SignedDistance:
    angles = np.arange(2 * num_points) * np.pi / num_points
    radii = np.where(np.arange(2 * num_points) % 2, inner_radius, 1)
    corners = (radii * np.exp(1j * angles)).tolist()
    return _polygon(*[(corner.real, corner.imag) for corner in corners])


def _box(x: Plane, y: Plane, half_width: Number, half_height: Number) -> Plane:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _heart(x: Plane, y: Plane) -> Plane:
    """Distance to a heart: two half-disks on a square that stands on its corner."""
    x = np.abs(x)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    foot = np.maximum(x + y, 0) / 2
    side = np.minimum(np.hypot(x, y - 1), np.hypot(x - foot, y - foot)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, side)


OUTLINES: dict[str, SignedDistance] = {
    "disk": lambda x, y: np.hypot(x, y) - 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 1) - 0.25,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.6, y)),
    "heart": _heart,
    "square": lambda x, y: _box(x, y, 1, 1),
    "triangle": _polygon((-0.87, -0.5), (0.87, -0.5), (0, 1)),
    "star": _star(5, 0.5),
    "cross": lambda x, y: np.minimum(_box(x, y, 1, 0.3), _box(x, y, 0.3, 1)),
    "arrow": _polygon(
        (-0.9, -0.3), (0, -0.3), (0, -0.8), (0.9, 0), (0, 0.8), (0, 0.3), (-0.9, 0.3)
    ),
    "hourglass": _polygon((-0.7, -1), (0.7, -1), (0.15, 0), (0.7, 1), (-0.7, 1), (-0.15, 0)),
}
CLASS_NAMES = tuple(OUTLINES)


@functools.cache
def _moments(name: str) -> tuple[float, float, float]:
    """Measures area, centroid x and centroid y of an outline, to equalise them over the classes."""
    axis = np.linspace(-1.5, 1.5, 601)
    x, y = np.meshgrid(axis, axis)
    inside = OUTLINES[name](x, y) < 0
    area = inside.mean() * 3.0**2
    return float(area), float(x[inside].mean()), float(y[inside].mean())
