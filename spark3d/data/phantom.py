"""Procedural, labelled CT phantoms of the abdomen in the layout of BTCV: data without a download.

A phantom is drawn in a standard pose, bent by a smooth random deformation and given the noise of
a scanner. It is no model of a patient: it has what makes the task a task (organs by place, shape
and texture, variable contrast, look-alikes, missing organs), and its labels are exact.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from spark3d.data.files import remove_temporaries, write_atomic
from spark3d.data.io import write_volume
from spark3d.data.phantom_body import paint_body, paint_bones
from spark3d.data.phantom_canvas import Canvas, Grid, turn
from spark3d.data.phantom_organs import draw_variation, paint_organs
from spark3d.errors import ConfigError, EnvironmentProblem

SIZE = (112, 96, 64)
SPACING_MM = (3.0, 3.0, 5.0)
VERSION = 1
"""To be raised when the same seed gives other voxels."""
TRAINING_NUMBERS = (*range(1, 11), *range(21, 61))
"""BTCV numbers its training cases 1 to 10 and 21 to 40; 41 to 60 are free."""


class Phantom(NamedTuple):
    """A phantom in RAS+ order.

    Attributes:
        hu: Int16 Hounsfield units, `size`.
        labels: Uint8, 0 or a value of `BTCV_LABELS`, `size`.
        spacing_mm: Millimetres per voxel.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, ...]


def make_phantom(
    seed: int | Sequence[int],
    size: Sequence[int] = SIZE,
    spacing_mm: Sequence[float] = SPACING_MM,
) -> Phantom:
    """Draw the phantom of a seed; about a second for the default size on one core.

    Args:
        seed: Anything `numpy.random.default_rng` takes; the same seed gives the same voxels.
        size: Voxels per axis.
        spacing_mm: Millimetres per voxel; the default grid holds a whole abdomen.
    """
    rng = np.random.default_rng(seed)
    phase = float(np.clip(rng.normal(0.5, 0.22), 0, 1))
    canvas = Canvas(size, spacing_mm, rng)
    body = paint_body(canvas, phase)
    paint_organs(canvas, body, draw_variation(rng, phase))
    paint_bones(canvas, body)
    coordinates = _deformation(canvas, rng)
    hu = ndimage.map_coordinates(canvas.hu, coordinates, order=1, cval=-1000)
    labels = ndimage.map_coordinates(canvas.label, coordinates, order=0, cval=0)
    hu += _scanner_noise(canvas, rng)
    return Phantom(
        np.clip(np.rint(hu), -1024, 3071).astype(np.int16),
        np.asarray(labels, dtype=np.uint8),
        tuple(float(s) for s in spacing_mm),
    )


def _deformation(canvas: Canvas, rng: np.random.Generator) -> Grid:
    """Where each voxel of the result comes from, in voxels: `(3, *size)`.

    Size, pose and position of the patient, then two smooth fields: 5 mm over 6 cm and 1.5 mm
    over 2 cm.
    """
    spacing = np.asarray(canvas.spacing_mm, dtype=np.float32)
    scale = np.exp(rng.normal(0, 0.05)) * np.exp(rng.normal(0, 0.025, 3))
    matrix = turn(rng.normal(0, (2, 2, 4))) / np.clip(scale, 0.88, 1.12)
    shift = rng.normal(0, (5, 5, 10))
    places = np.empty((3, *canvas.size), dtype=np.float32)
    for axis in range(3):
        row = matrix[axis].astype(np.float32)
        mm = row[0] * canvas.x + row[1] * canvas.y + row[2] * canvas.z + np.float32(shift[axis])
        for width, reach in ((60.0, 5.0), (22.0, 1.5)):
            mm = mm + np.float32(reach) * _smooth_field(canvas, width, rng)
        places[axis] = mm / spacing[axis] + np.float32((canvas.size[axis] - 1) / 2)
    return places


def _smooth_field(canvas: Canvas, width_mm: float, rng: np.random.Generator) -> Grid:
    """Noise on a coarse lattice of `width_mm`, drawn out to the grid by cubic curves."""
    extent = [n * s for n, s in zip(canvas.size, canvas.spacing_mm, strict=True)]
    knots = [int(np.ceil(e / width_mm)) + 3 for e in extent]
    field = rng.standard_normal(knots)
    for axis, (n, count) in enumerate(zip(canvas.size, knots, strict=True)):
        field = np.moveaxis(_curve(n, count) @ np.moveaxis(field, axis, 1), 1, axis)
    return field.astype(np.float32)


def _curve(points: int, knots: int) -> NDArray[np.float64]:
    """Cubic B-spline weights of `knots` at `points` places, scaled to keep the variance near 1."""
    place = np.linspace(1, knots - 2, points)
    t = np.abs(place[:, None] - np.arange(knots)[None, :])
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / np.sqrt(np.square(weights).sum(1, keepdims=True))


def _scanner_noise(canvas: Canvas, rng: np.random.Generator) -> Grid:
    """Noise of 17 to 30 HU, correlated within slices as reconstruction leaves it."""
    sigma = rng.uniform(17, 30)
    white = rng.standard_normal(canvas.size, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, (0.55, 0.55, 0), truncate=2)
    return np.float32(sigma / grain.std()) * grain


@dataclass(frozen=True)
class PhantomFiles:
    """Where the phantoms of a folder are.

    Attributes:
        btcv: The folder to give as data for training and testing, of BTCV's layout.
        unlabelled: The folder of images without labels, for pre-training.
        written: Cases written by this call; the others were there already.
        kept: Cases that were there.
    """

    btcv: Path
    unlabelled: Path
    written: int
    kept: int


def write_btcv_phantoms(
    folder: Path | str,
    training: int,
    testing: int,
    unlabelled: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    size: Sequence[int] = SIZE,
    spacing_mm: Sequence[float] = SPACING_MM,
) -> PhantomFiles:
    """Write phantoms as `.nii.gz`, each file whole or absent; those that exist are kept.

    Layout: `RawData/Training/{img,label}` and `RawData/Testing/{img,label}` with the names and
    numbers of BTCV (whose own test labels are not public), and `Unlabelled/img1001.nii.gz` on.
    Axes run left, front, head as in BTCV, so that readers have something to turn round.

    Args:
        folder: Where to; made if absent.
        training: Labelled cases to train on, at most 50.
        testing: Labelled cases to test on.
        unlabelled: Cases without label.
        seed: Case `n` is drawn from `(seed, n)`, whatever the numbers of cases.
        progress: Called with cases done and cases in all.
        size: Voxels per axis.
        spacing_mm: Millimetres per voxel.

    Raises:
        ConfigError: Numbers out of range, or the folder holds phantoms of other settings.
        EnvironmentProblem: The folder cannot be written to.
    """
    if not 0 <= training <= len(TRAINING_NUMBERS) or min(testing, unlabelled) < 0:
        raise ConfigError(
            f"phantoms: {training} training, {testing} testing, {unlabelled} unlabelled cases; "
            f"numbers must not be negative, and training at most {len(TRAINING_NUMBERS)}"
        )
    root = Path(folder)
    _claim(root, {"seed": seed, "size": list(size), "spacing_mm": list(spacing_mm)})
    cases = list(_places(root, training, testing, unlabelled))
    written = 0
    for done, (number, image, label) in enumerate(cases, start=1):
        if not (image.exists() and (label is None or label.exists())):
            _write_case(make_phantom((seed, number), size, spacing_mm), image, label)
            written += 1
        if progress is not None:
            progress(done, len(cases))
    return PhantomFiles(root / "RawData", root / "Unlabelled", written, len(cases) - written)


def _places(
    root: Path, training: int, testing: int, unlabelled: int
) -> Iterator[tuple[int, Path, Path | None]]:
    """Number, image and label file of every case."""
    parts = (("Training", TRAINING_NUMBERS[:training]), ("Testing", range(61, 61 + testing)))
    for part, numbers in parts:
        for n in numbers:
            place = root / "RawData" / part
            yield n, place / "img" / f"img{n:04d}.nii.gz", place / "label" / f"label{n:04d}.nii.gz"
    for n in range(1001, 1001 + unlabelled):
        yield n, root / "Unlabelled" / f"img{n:04d}.nii.gz", None


def _claim(root: Path, settings: dict[str, object]) -> None:
    """Note the settings in the folder, or refuse one made with others."""
    note = root / "phantoms.json"
    data = json.dumps({"version": VERSION, **settings}, indent=1).encode()
    if note.exists():
        if note.read_bytes() != data:
            raise ConfigError(
                f"{root} holds phantoms of another seed, size or version; choose another folder, "
                "or remove this one"
            )
        remove_temporaries(root)
        return
    _make_folder(root)
    write_atomic(note, data)


def _write_case(phantom: Phantom, image: Path, label: Path | None) -> None:
    """Write label before image, both turned to left, front, head."""
    spacing, size = np.asarray(phantom.spacing_mm), np.asarray(phantom.hu.shape)
    signs = np.array([-1, 1, 1])
    affine = np.eye(4)
    affine[:3, :3] = np.diag(signs * spacing)
    affine[:3, 3] = -signs * spacing * (size - 1) / 2
    files = ((label, phantom.labels), (image, phantom.hu))
    for path, voxels in files:
        if path is not None:
            _make_folder(path.parent)
            write_volume(path, np.ascontiguousarray(voxels[::-1]), affine)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot make the folder {folder} ({error.strerror}); check the path and its rights"
        ) from None
