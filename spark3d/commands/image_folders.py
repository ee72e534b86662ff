"""Folders of images as commands read them: scanned once a run, by one process for all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from spark3d.commands.runs import on_first_rank
from spark3d.commands.stores import SHOWN, existing_folder
from spark3d.data.images2d import ImageFolder, scan_images
from spark3d.data.names import shown
from spark3d.engine.checkpoint import write_atomically
from spark3d.engine.progress import step_progress
from spark3d.errors import DataError

NOTES = "images.json"


def scan_folder(
    folder: Path, part: str, out: Path, max_bad: float, workers: int, fabric: Fabric
) -> ImageFolder:
    """What a folder of images holds; a run that has begun only looks at names and sizes.

    Args:
        folder: where to look.
        part: what the run calls it, such as "train".
        out: the run's folder, in which `note_scans` may have noted an earlier scan.
        max_bad: largest share of files that may be left out.
        workers: of the recipe; as many threads decode, at least two.
        fabric: rank 0 scans, the others are told.
    """
    existing_folder(folder, "give a folder of PNG or JPEG files")
    known = read_notes(out).get(part)
    found: list[ImageFolder] = []

    def scan() -> None:
        with step_progress(f"scanning images, {part}", 0) as bar:
            found.append(scan_images(folder, max_bad, max(2, workers), bar.update, known))

    on_first_rank(fabric, scan)
    if fabric.world_size > 1:
        found = fabric.broadcast(found)
    return found[0]


def note_scans(out: Path, scans: Mapping[str, ImageFolder], fabric: Fabric) -> None:
    """Write into a run's folder what the scans found, for when it is resumed."""
    notes = {part: images.verdict() for part, images in scans.items()}
    text = json.dumps(notes, indent=1).encode()
    on_first_rank(fabric, lambda: write_atomically(out / NOTES, text))


def read_notes(out: Path) -> dict[str, Any]:
    """What `note_scans` wrote; nothing where it cannot be read, for then a scan finds it again."""
    try:
        return dict(json.loads((out / NOTES).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def scan_notes(images: ImageFolder, part: str = "") -> list[str]:
    """How many images there are, which were left out and which will be converted; other files."""
    listed = [f"{name} ({reason})" for name, reason in list(images.bad.items())[:SHOWN]]
    more = f" and {len(images.bad) - SHOWN} more" if len(images.bad) > SHOWN else ""
    faults = f"{len(images.bad)} left out: {', '.join(listed)}{more}" if listed else "none left out"
    notes = [f"{len(images.files)} {part}{' ' if part else ''}images; {faults}"]
    if images.converted:
        found = ", ".join(f"{count} of mode {mode}" for mode, count in images.converted.items())
        notes.append(f"read as RGB: {found}")
    if images.passed_over:
        counts = sorted(images.passed_over.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts)
        total = sum(images.passed_over.values())
        notes.append(f"passed over {total} files that are no PNG or JPEG ({kinds})")
    return notes


def part_folder(data: Path, part: str) -> Path:
    """`data/train` or `data/val`.

    Raises:
        DataError: it is not there.
    """
    folder = data / part
    if not folder.is_dir():
        raise DataError(
            f"--data {shown(data)}: no folder {part}; classification reads train/CLASS/ and "
            "val/CLASS/ of images"
        )
    return folder
