"""Pictures as PNG files: what a masked reconstruction looks like, and where a segmentation errs."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from spark3d.data.files import write_atomic
from spark3d.reports.planes import (
    EDGES,
    Array,
    Plane,
    as_array,
    centre_planes,
    foreground_box,
    fullest_planes,
)

BACKGROUND, INK = "#0b0e13", "#e9edf3"
HIDDEN = "#17263d"
ORGAN_COLOURS = (
    "#ff6b6b", "#4dabf7", "#69db7c", "#ffd43b", "#da77f2", "#ffa94d", "#3bc9db",
    "#f783ac", "#a9e34b", "#9775fa", "#63e6be", "#ff922b", "#dee2e6",
)  # fmt: skip
DPI = 130


def reconstruction_panel(
    image: Array | Tensor,
    masked: Array | Tensor,
    reconstruction: Array | Tensor,
    path: Path,
    *,
    spacing_mm: Sequence[float] | None = None,
    visible: Array | Tensor | None = None,
) -> None:
    """Write input, masked input and reconstruction side by side; of a volume three middle planes.

    Args:
        image: `(c, *size)`, 2D or 3D. Of volumes, and of images without three channels, the first
            channel is shown.
        masked: what the encoder saw of it.
        reconstruction: in the same intensities as `image`.
        path: PNG file to write.
        spacing_mm: of a volume's axes; cubes if not given.
        visible: `(*size)`, True where not hidden; hidden voxels of `masked` are then tinted.
    """
    columns = [as_array(a).astype(np.float32) for a in (image, masked, reconstruction)]
    seen = None if visible is None else as_array(visible).astype(bool)
    finite = columns[0][np.isfinite(columns[0])]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    scaled = [np.clip((a - low) / max(high - low, 1e-6), 0, 1) for a in columns]
    size = scaled[0].shape[1:]
    spacing = (1.0,) * len(size) if spacing_mm is None else tuple(spacing_mm)
    rows: list[Plane | None] = [None] if len(size) == 2 else [*centre_planes(size)]
    shapes = [_extent(p, size, spacing) for p in rows]

    cell = 2.7
    heights = [cell * h / max(w for w, _ in shapes) for _, h in shapes]
    figure = Figure((3 * cell + 0.3, sum(heights) + 0.45), dpi=DPI, facecolor=BACKGROUND)
    grid = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for plane, axes in zip(rows, grid, strict=True):
        for column, (ax, values) in enumerate(zip(axes, scaled, strict=True)):
            hidden = None if seen is None or column != 1 else ~seen
            _show(ax, _colours(values, hidden, plane), _aspect(plane, spacing))
        if plane is not None:
            _note(axes[0], 0.03, 0.95, plane.name)
    for ax, title in zip(grid[0], ("input", "masked", "reconstruction"), strict=True):
        ax.set_title(title, color=INK, fontsize=10, pad=6)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.33 / (sum(heights) + 0.45), 0.02, 0.02)
    _save(figure, path)


def overlay(
    image: Array | Tensor | None,
    reference: Array | Tensor,
    prediction: Array | Tensor,
    path: Path,
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    window: tuple[float, float] | None = None,
) -> None:
    """Write three planes of a volume with the reference (dashed) and the prediction (solid) on it.

    The planes are those with most labelled voxels, cut to the labels and 25 mm around them.

    Args:
        image: `(*size)` in RAS+ order; None draws the labels on black.
        reference: label map `(*size)`.
        prediction: label map `(*size)`.
        path: PNG file to write.
        spacing_mm: of the three axes.
        labels: label -> organ, for colours and the legend.
        window: darkest and brightest intensity; chosen from around the labels if not given.
    """
    maps = [as_array(reference), as_array(prediction)]
    counts = np.sum([np.isin(m, list(labels)) for m in maps], axis=0)
    wanted = counts > 0
    box = foreground_box(wanted, [round(25 / s) for s in spacing_mm])
    maps = [m[box] for m in maps]
    picture = grey_of(image, box, wanted[box], window)

    planes = fullest_planes(counts[box])
    shapes = [p.extent_mm(picture.shape, spacing_mm) for p in planes]
    height = 3.6
    widths = [height * w / h for w, h in shapes]
    figure = Figure((sum(widths) + 0.2, height + 0.5), dpi=DPI, facecolor=BACKGROUND)
    grid = figure.subplots(1, 3, squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    for ax, plane in zip(grid, planes, strict=True):
        _show(ax, plane.cut(picture), _aspect(plane, spacing_mm), "bilinear")
        _outline(ax, plane, maps, labels)
        _note(ax, 0.03, 0.96, plane.name)
        for edge, x in zip(EDGES[plane.axis], (0.02, 0.95), strict=True):
            _note(ax, x, 0.53, edge)
    present = [k for k in labels if any((m == k).any() for m in maps)]
    _legend(figure, {labels[k]: colour_of(k, labels) for k in present})
    figure.subplots_adjust(0.005, 0.42 / (height + 0.5), 0.995, 0.99, 0.02, 0)
    _save(figure, path)


def grey_of(
    image: Array | Tensor | None,
    box: tuple[slice, ...],
    wanted: Array,
    window: tuple[float, float] | None,
) -> Array:
    """The box of an image scaled to 0..1; black where there is no image.

    Args:
        image: `(*size)`, or None.
        box: the part to show.
        wanted: True at the labels, in the box; the intensities there choose the window.
        window: darkest and brightest intensity.
    """
    if image is None:
        return np.zeros(wanted.shape, np.float32)
    picture = as_array(image)[box].astype(np.float32)
    low, high = window or _organ_window(picture, wanted)
    return np.clip((picture - low) / max(high - low, 1e-6), 0, 1)


def colour_of(label: int, labels: Mapping[int, str]) -> str:
    """The colour of an organ, by its place in `labels`."""
    return ORGAN_COLOURS[list(labels).index(label) % len(ORGAN_COLOURS)]


def _colours(values: Array, hidden: Array | None, plane: Plane | None) -> Array:
    """RGB picture `(rows, columns, 3)` of scaled `(c, *size)`, hidden voxels tinted."""
    rgb = len(values) == 3 and plane is None
    channels = values if rgb else np.repeat(values[:1], 3, axis=0)
    if hidden is not None:
        tint = np.reshape(to_rgb(HIDDEN), (3, *(1,) * hidden.ndim))
        channels = np.where(hidden, tint, channels)
    return np.stack([c if plane is None else plane.cut(c) for c in channels], axis=-1)


def _organ_window(picture: Array, wanted: Array) -> tuple[float, float]:
    """Intensities that show the organs and what is around them: soft tissue rather than air."""
    values = picture[wanted] if wanted.any() else picture
    low, high = (float(v) for v in np.percentile(values, (10, 90)))
    middle, half = (low + high) / 2, max(high - low, 1e-3)
    return middle - half, middle + half


def _outline(ax: Axes, plane: Plane, maps: Sequence[Array], labels: Mapping[int, str]) -> None:
    for labelled, style, width in zip(maps, ("dashed", "solid"), (1.0, 1.3), strict=True):
        flat = plane.cut(labelled)
        for label in labels:
            inside = flat == label
            if inside.any():
                padded = np.pad(inside, 1).astype(np.float32)
                x, y = (np.arange(-1, n + 1) for n in reversed(inside.shape))
                colour = "#ffffff" if style == "dashed" else colour_of(label, labels)
                ax.contour(x, y, padded, [0.5], colors=[colour], linewidths=width, linestyles=style)


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    handles = [Line2D([], [], color="#ffffff", lw=1.2, ls="--", label="reference")]
    names = {name.replace("_", " "): colour for name, colour in colours.items()}
    handles += [Line2D([], [], color=c, lw=2, label=name) for name, c in names.items()]
    inches = np.mean([0.42 + 0.063 * len(str(h.get_label())) for h in handles])
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8,
        labelcolor=INK, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def _show(ax: Axes, picture: Array, aspect: float, interpolation: str = "nearest") -> None:
    ax.imshow(
        picture, cmap="gray", vmin=0, vmax=1, aspect=aspect,
        interpolation=interpolation,  # type: ignore[arg-type]
    )  # fmt: skip
    ax.set_axis_off()


def _note(ax: Axes, x: float, y: float, text: str) -> None:
    rim = [withStroke(linewidth=2, foreground=BACKGROUND)]
    ax.text(
        x, y, text, color=INK, fontsize=7.5, transform=ax.transAxes, va="top", path_effects=rim
    )  # fmt: skip


def _extent(
    plane: Plane | None, size: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[float, float]:
    if plane is None:
        return size[1] * spacing_mm[1], size[0] * spacing_mm[0]
    return plane.extent_mm(size, spacing_mm)


def _aspect(plane: Plane | None, spacing_mm: Sequence[float]) -> float:
    if plane is None:
        return spacing_mm[0] / spacing_mm[1]
    columns, rows = (spacing_mm[a] for a in range(3) if a != plane.axis)
    return rows / columns


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND)
    write_atomic(path, buffer.getvalue())
