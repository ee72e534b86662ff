"""Scrolling through a case in a browser, offline: its slices in one picture, labels on top of it.

The slices of the image lie side by side in one WebP picture, the outlines of reference and
prediction in two transparent ones of the same layout, so that each can be hidden. Size is bounded:
at most 48 slices of at most 300 x 300 pixels.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spark3d.data.files import write_atomic
from spark3d.errors import DataError
from spark3d.reports.panels import colour_of, grey_of
from spark3d.reports.planes import Array, Plane, foreground_box

MOST_SLICES = 48
MOST_PIXELS = 300
AXIS = 2
"""Axial slices."""


@dataclass(frozen=True)
class Layer:
    """One picture of all slices, as a `data:` URI; `name` says what it shows."""

    name: str
    uri: str


@dataclass(frozen=True)
class Viewer:
    """A case to scroll through.

    Attributes:
        width: pixels of a slice; `height` likewise.
        columns: slices side by side; `rows` of them.
        captions: of every slice, its position in mm from the lowest.
        start: the slice shown first, the one with most labels.
        layers: the image, then the outlines.
        legend: organ and its colour.
    """

    width: int
    height: int
    columns: int
    rows: int
    captions: tuple[str, ...]
    start: int
    layers: tuple[Layer, ...]
    legend: tuple[tuple[str, str], ...]


def make_viewer(
    image: Array | None,
    reference: Array,
    prediction: Array,
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    window: tuple[float, float] | None = None,
) -> Viewer:
    """Axial slices through all labels and 25 mm around them; arguments as in `panels.overlay`."""
    counts = np.sum([np.isin(m, list(labels)) for m in (reference, prediction)], axis=0)
    box = foreground_box(counts > 0, [round(25 / s) for s in spacing_mm])
    maps, counts = [m[box] for m in (reference, prediction)], counts[box]
    grey = grey_of(image, box, counts > 0, window)
    planes = [Plane(AXIS, int(i)) for i in _chosen(counts.sum(axis=(0, 1)))]
    width, height = _pixels(planes[0].extent_mm(counts.shape, spacing_mm))
    columns = math.ceil(math.sqrt(len(planes) * height / width))
    rows = math.ceil(len(planes) / columns)

    sheets = [np.zeros((rows * height, columns * width, c), np.uint8) for c in (1, 4, 4)]
    for number, plane in enumerate(planes):
        top, left = (number // columns) * height, (number % columns) * width
        place = np.s_[top : top + height, left : left + width]
        flat = Image.fromarray((255 * plane.cut(grey)).astype(np.uint8))
        flat = flat.resize((width, height), Image.Resampling.BILINEAR)
        sheets[0][place][..., 0] = np.asarray(flat)
        for sheet, labelled, dashed in zip(sheets[1:], maps, (True, False), strict=True):
            sheet[place] = _outlines(plane.cut(labelled), (width, height), labels, dashed)
    present = [k for k in labels if any((m == k).any() for m in maps)]
    middle = max(range(len(planes)), key=lambda i: int(counts[:, :, planes[i].index].sum()))
    return Viewer(
        width, height, columns, rows,
        tuple(f"{p.index * spacing_mm[AXIS]:.0f} mm" for p in planes), middle,
        (
            Layer("image", _uri(Image.fromarray(sheets[0][..., 0]), quality=60)),
            Layer("reference", _uri(Image.fromarray(sheets[1]), lossless=True)),
            Layer("prediction", _uri(Image.fromarray(sheets[2]), lossless=True)),
        ),
        tuple((labels[k].replace("_", " "), colour_of(k, labels)) for k in present),
    )  # fmt: skip


def save_viewer(viewer: Viewer, path: Path) -> None:
    """Write it as JSON."""
    write_atomic(path, (json.dumps(asdict(viewer)) + "\n").encode())


def load_viewer(path: Path) -> Viewer:
    """Read what `save_viewer` wrote.

    Raises:
        DataError: it is damaged, or holds something that is no picture.
    """
    try:
        tree = json.loads(path.read_text("utf-8"))
        tree["layers"] = tuple(Layer(**layer) for layer in tree["layers"])
        tree["legend"] = tuple((str(name), str(colour)) for name, colour in tree["legend"])
        tree["captions"] = tuple(str(text) for text in tree["captions"])
        for number in ("width", "height", "columns", "rows", "start"):
            tree[number] = int(tree[number])
        if all(layer.uri.startswith("data:image/webp;base64,") for layer in tree["layers"]):
            return Viewer(**tree)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path} is no viewer of spark3d; evaluate again")


def _chosen(labelled: Array) -> Array:
    """At most `MOST_SLICES` slices, evenly over all."""
    return np.unique(np.linspace(0, len(labelled) - 1, min(len(labelled), MOST_SLICES)).round())


def _pixels(extent_mm: tuple[float, float]) -> tuple[int, int]:
    scale = MOST_PIXELS / max(extent_mm)
    width, height = (max(int(scale * mm), 8) for mm in extent_mm)
    return width, height


def _outlines(flat: Array, size: tuple[int, int], labels: Mapping[int, str], dashed: bool) -> Array:
    """RGBA `(height, width, 4)`: the rim of every label; white dashes, or in the organ's colour."""
    small = Image.fromarray(np.ascontiguousarray(flat).astype(np.int32))
    map_ = np.asarray(small.resize(size, Image.Resampling.NEAREST))
    padded = np.pad(map_, 1)
    inner = padded[1:-1, 1:-1]
    rim = np.zeros(inner.shape, bool)
    for axis in (0, 1):
        for step in (-1, 1):
            rim |= inner != np.roll(padded, step, axis)[1:-1, 1:-1]
    out = np.zeros((*inner.shape, 4), np.uint8)
    for label in labels:
        here = rim & (inner == label)
        colour = "#ffffff" if dashed else colour_of(label, labels)
        out[here] = (*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), 255)
    if dashed:
        y, x = np.indices(inner.shape)
        out[((x + y) // 3) % 2 == 0] = 0
    return out


def _uri(picture: Image.Image, **options: int) -> str:
    data = io.BytesIO()
    picture.save(data, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
