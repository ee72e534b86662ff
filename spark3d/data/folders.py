"""Folders that appear whole or not at all, and files in them that need no second copy."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from spark3d.data.checks import fault
from spark3d.data.files import sync_folder, write_atomic
from spark3d.data.nifti import encode_nifti, read_nifti
from spark3d.errors import ConfigError, EnvironmentProblem

Placing = Literal["link", "copy"]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end; whatever fails, nothing is left of it.

    What an earlier call that was killed has left is removed.

    Raises:
        ConfigError: `out` holds something.
        EnvironmentProblem: no room, or no right to write.
    """
    refuse_filled(out)
    part = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        if error.errno is None:
            raise  # of a decoder, not of the disk
        raise EnvironmentProblem(
            f"could not write {out} ({error.strerror}): check the room and the rights there, then "
            "repeat the command; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_filled(out: Path) -> None:
    """Refuse a target that is more than an empty folder.

    Raises:
        ConfigError: it is.
    """
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} holds something already; choose a new folder")


def place(source: Path, target: Path, how: Placing = "link") -> None:
    """Make a file appear under another name, as a symbolic link to it or as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        target.symlink_to(source.resolve())
        return
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def write_channel(source: Path, target: Path, channel: int | None = None) -> None:
    """Write one channel of a 4D NIfTI file, or a whole 3D one, on the same grid and axis order.

    Voxels keep their type unless slope and intercept have to be applied (then float32).

    Raises:
        DataError: the file has no such channel, or is 4D and none was asked for.
    """
    header, raw = read_nifti(source)
    count = raw.shape[3] if raw.ndim == 4 else 1
    if (channel is None) != (raw.ndim == 3) or not 0 <= (channel or 0) < count:
        asked = "one volume" if channel is None else f"at least {channel + 1} on a fourth axis"
        raise fault(
            "E-CHANNEL", source, f"{count} channels on {raw.ndim} axes", asked,
            "correct the declared modalities, or leave the file out",
        )  # fmt: skip
    voxels = raw if channel is None else raw[..., channel]
    if (header.slope, header.intercept) != (1, 0):
        voxels = (voxels.astype(np.float64) * header.slope + header.intercept).astype(np.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, encode_nifti(voxels, header.affine, target.name.endswith(".gz")))
