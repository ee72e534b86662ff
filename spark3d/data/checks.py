"""What can be wrong with files, headers, images and labels; each fault is one line with its remedy.

A fault names a stable code (`E-...`), the file or case, what was found, what was expected, what to
do. Text fields of headers are never quoted: they can name a patient.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark3d.data.grid import Affine, SourceGrid, spacing_of
from spark3d.data.names import shown
from spark3d.errors import DataError

GRID_TOLERANCE_MM = 1e-3
PLAUSIBLE_MM = (1e-3, 100.0)


def fault(code: str, where: Path | str, found: str, expected: str, remedy: str) -> DataError:
    """The error for one fault, on one line; of a path only what may be shown."""
    place = shown(where) if isinstance(where, Path) else where
    return DataError(f"{code}: {place}: found {found}; expected {expected}; {remedy}")


def placed(reason: str, place: str) -> str:
    """The text of a fault, at another place."""
    code, _, rest = reason.partition(": ")
    return f"{code}: {place}: found {rest.partition(': found ')[2]}"


def corner_distance_mm(size: Sequence[int], one: Affine, other: Affine) -> float:
    """The largest distance between the same corner voxel under two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1)
    moved = (one - other)[:3] @ np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(moved, axis=0).max())


def check_affine(affine: Affine, where: Path | str) -> None:
    """Refuse affines that are not finite, singular, sheared, or of implausible spacing."""
    if not np.isfinite(affine).all():
        raise fault(
            "E-AFFINE-NAN", where, "an affine with NaN or infinite entries", "finite numbers",
            "write the header anew from the original series",
        )  # fmt: skip
    spacing = np.asarray(spacing_of(affine))
    if (spacing <= 0).any() or abs(np.linalg.det(affine[:3, :3])) < 1e-9 * spacing.prod():
        raise fault(
            "E-AFFINE-SINGULAR", where, "an affine that maps a volume to a plane",
            "three independent axes",
            "pass --geometry qform if the quaternion is right, or write the header anew",
        )  # fmt: skip
    low, high = PLAUSIBLE_MM
    if (spacing < low).any() or (spacing > high).any():
        raise fault(
            "E-SPACING", where, f"a spacing of {_numbers(spacing)} mm", f"{low:g} to {high:g} mm",
            "correct the header's units or voxel sizes",
        )  # fmt: skip
    unit = affine[:3, :3] / spacing
    skew = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if skew > 1e-3:
        raise fault(
            "E-AFFINE-SHEARED", where, f"axes {np.degrees(np.arcsin(min(skew, 1.0))):.2f} degrees "
            "away from a right angle", "axes at right angles",
            "resample the volume to a straight grid (import a tilted series again to undo it)",
        )  # fmt: skip


def check_same_grid(image: SourceGrid, other: SourceGrid, case: str, what: str = "label") -> None:
    """Refuse a label (or `what`) whose size or affine differs from its image's by over 1e-3 mm."""
    if image.size != other.size:
        raise fault(
            f"E-{what.upper()}-SIZE", case, f"a {what} of size {_numbers(other.size)}",
            f"the image's size {_numbers(image.size)}",
            f"pair the right files, or resample the {what} onto the image",
        )  # fmt: skip
    distance = corner_distance_mm(image.size, image.affine, other.affine)
    if distance > GRID_TOLERANCE_MM:
        raise fault(
            f"E-{what.upper()}-AFFINE", case,
            f"image and {what} {distance:.4g} mm apart at a corner",
            f"at most {GRID_TOLERANCE_MM:g} mm",
            f"copy the image's affine into the {what} if their voxels match, else pair other files",
        )  # fmt: skip


def check_label_values(
    label: NDArray[np.generic], case: str, known: Iterable[int] | None = None
) -> tuple[int, ...]:
    """The classes present, refused where negative, above 32767 or not among `known`."""
    present = tuple(int(value) for value in np.unique(label))
    allowed = None if known is None else {0, *known}
    wrong = [v for v in present if v < 0 or v > 32767 or (allowed is not None and v not in allowed)]
    if wrong:
        expected = "0..32767" if allowed is None else f"the declared labels {_few(sorted(allowed))}"
        raise fault(
            "E-LABEL-RANGE", case, f"the label values {_few(wrong)}", expected,
            "declare these labels, or map them to declared ones",
        )  # fmt: skip
    if not any(present):
        raise fault(
            "E-LABEL-EMPTY", case, "a label with no foreground voxel", "at least one organ voxel",
            "list the case as unlabelled, or correct the label file",
        )  # fmt: skip
    return tuple(v for v in present if v)


def check_label_names(labels: Mapping[str, int], where: Path | str) -> None:
    """Refuse declared labels that do not count 0, 1, 2, ... without gaps."""
    values = sorted(labels.values())
    if values != list(range(len(values))):
        raise fault(
            "E-LABEL-GAP", where, f"the label values {_few(values)}",
            f"0..{len(values) - 1} without gaps", "renumber the labels consecutively",
        )  # fmt: skip


def check_cases(cases: Sequence, where: Path | str, listed: bool = False) -> None:
    """Refuse an empty list, duplicate ids, absent files (all listed at once), label = image."""
    if not cases:
        raise fault(
            "E-NO-CASES", where, "no volume",
            "at least one NIfTI, NRRD or MetaImage file, or DICOM series",
            "check the folder, or convert the data to NIfTI first",
        )  # fmt: skip
    counts: dict[str, int] = {}
    for case in cases:
        counts[case.id] = counts.get(case.id, 0) + 1
    if repeated := sorted(case_id for case_id, n in counts.items() if n > 1):
        raise fault(
            "E-DUPLICATE-ID", where, f"more than one case called {_few(repeated)}",
            "one file per case id", "rename or remove the extra files",
        )  # fmt: skip
    same = sorted(c.id for c in cases if c.label is not None and c.label in c.images)
    if same:
        raise fault(
            "E-LABEL-IS-IMAGE", where, f"the same path as image and label of {_few(same)}",
            "two files", "correct the list of cases",
        )  # fmt: skip
    paths = [p for c in cases for p in (*c.images, *([c.label] if c.label else []))]
    paths += [p for c in cases if listed for p in c.slices]
    if absent := [shown(p) for p in paths if not p.exists()]:
        raise fault(
            "E-MISSING-FILE", where, f"{len(absent)} listed files absent: {_few(absent)}",
            "every listed file", "restore them, or take them off the list",
        )  # fmt: skip


def check_apart(
    first: Mapping[str, str], second: Mapping[str, str], names: tuple[str, str], what: str
) -> None:
    """Refuse two sets of cases that share a key (patient, or content hash of the voxels).

    Args:
        first: case id -> key of one set.
        second: the same of the other set.
        names: what to call the two sets.
        what: "patient" or "voxels", for the message.
    """
    keys = {key: case for case, key in first.items()}
    shared = sorted((keys[key], case) for case, key in second.items() if key in keys)
    if shared:
        pairs = _few([a if a == b else f"{a} = {b}" for a, b in shared])
        raise fault(
            f"E-LEAK-{what.upper()}", " and ".join(names),
            f"{len(shared)} cases with the same {what} in both: {pairs}", f"no shared {what}",
            "take these cases out of one of the two",
        )  # fmt: skip


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _few(values: Sequence) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"
