"""Ordinary images (PNG, JPEG) from a folder, as a numbered stream of random resized crops.

The crop is that of torchvision and timm (scale and aspect ratio drawn, ten tries, bicubic), the
range that of ImageNet training, so that a recipe's numbers mean the same as in their code.
"""

import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from spark3d.data.checks import fault
from spark3d.data.stream import Numbered, Sample
from spark3d.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (
    ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".heic", ".avif", ".dcm", ".npy", ".zip",
)  # fmt: skip
NOTES = (".txt", ".json", ".csv", ".md")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ASPECT = (3 / 4, 4 / 3)
CONVERTED = frozenset({"1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
Box = tuple[int, int, int, int]
HASH_DIGITS = 16
"""Hexadecimal digits kept of a file's SHA-256: a million files have 10 MB of them, by chance alike
once in ten million such folders."""


@dataclass(frozen=True)
class ImageFolder:
    """What a scan of a folder found.

    Attributes:
        folder: The folder.
        files: Usable images in the order of their names, relative to the folder.
        bad: Left out: file -> reason.
        converted: How many files of each other colour mode will be read as RGB.
        identity: Hash over names and sizes of all that was found, bad files included.
        hashes: Of the bytes of each of `files`, `HASH_DIGITS` long, to tell the same image in two
            folders. An image that was saved anew has another one.
        passed_over: How many files of each other suffix there are, but for notes and tables; a
            suffix that is not well known counts as "other", as it may be part of a name.
    """

    folder: Path
    files: tuple[str, ...]
    bad: Mapping[str, str] = field(default_factory=dict)
    converted: Mapping[str, int] = field(default_factory=dict)
    identity: str = ""
    hashes: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def verdict(self) -> dict[str, Any]:
        """What need not be found out again as long as no name and no size changes.

        It holds no name: a file that was left out is told by its place among all names.
        """
        names = sorted((*self.files, *self.bad))
        return {
            "identity": self.identity,
            "left_out": [[k, self.bad[name]] for k, name in enumerate(names) if name in self.bad],
            "converted": dict(self.converted),
            "hashes": "".join(self.hashes),
        }


def scan_images(
    folder: Path | str,
    max_bad: float = 0.01,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    known: Mapping[str, Any] | None = None,
) -> ImageFolder:
    """Decode every image below a folder once and sort out what cannot be used.

    Sub-folders (one per class, as ImageNet has) and linked ones are searched too, each real folder
    once; hidden files are not.
    Truncation and damage only show on decoding, which for JPEG is done at an eighth of the size.
    Every file is read once, and its bytes are hashed on the way.

    Args:
        folder: Where to look.
        max_bad: Largest share of files that may be left out, in [0, 1].
        threads: Decoders at work at once.
        progress: Called with files done and files in all.
        known: The `verdict` of an earlier scan; with the same names and sizes nothing is decoded.

    Raises:
        DataError: No such folder, one that may not be read, no image, or more unusable files than
            allowed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: found no such folder; give --data a folder of PNG or JPEG files")
    names, passed_over = _walk(root)
    if not names:
        raise DataError(
            f"{root}: found no file ending in {', '.join(SUFFIXES)}; give --data a folder of "
            "images, or --dims 3 for volumes"
        )
    identity = _identity(root, names)
    if known and known.get("identity") == identity and {"hashes", "left_out"} <= set(known):
        bad = {names[place]: reason for place, reason in known["left_out"]}
        modes = dict(known["converted"])
        hashes = _split(known["hashes"])
    else:
        bad, modes, hashes = _examine_all(root, names, threads, progress)
    files = tuple(name for name in names if name not in bad)
    if not files or len(bad) > max_bad * len(names):
        shown = "; ".join(f"{name} ({fault})" for name, fault in list(bad.items())[:3])
        raise DataError(
            f"{root}: {len(bad)} of {len(names)} images cannot be used: {shown}"
            f"{' ...' if len(bad) > 3 else ''}; repair or remove them, or raise images.max_bad "
            f"above {len(bad) / len(names):.3g}"
        )
    return ImageFolder(root, files, bad, modes, identity, hashes, passed_over)


class ImageCrops(Numbered):
    """Random resized crops of a folder's images, mirrored half of the time.

    Item `n` is `{"crop": float32 (3, rows, columns), "case": index of the file, "number": n}`, a
    pure function of (seed, n).

    Args:
        images: The scanned folder.
        crop_size: Rows and columns of the result.
        seed: Of the whole stream.
        scale: Smallest and largest share of the image's area to cut.
        flip: Probability of a mirror image.
        mean: Per colour, subtracted after scaling to 0..1.
        std: Per colour, divided by.

    Raises:
        ConfigError: The range of `scale` or the size is impossible.
    """

    def __init__(
        self,
        images: ImageFolder,
        crop_size: Sequence[int],
        seed: int,
        scale: tuple[float, float] = (0.67, 1.0),
        flip: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(len(images.files), seed)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"images.scale={scale} must be two rising shares in (0, 1]")
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ConfigError(f"images.crop={tuple(crop_size)} must be rows and columns above 0")
        self.images, self.scale, self.flip = images, scale, flip
        self.crop_size = (int(crop_size[0]), int(crop_size[1]))
        self.mean = np.asarray(mean, dtype=np.float32)
        self.std = np.asarray(std, dtype=np.float32)

    def name(self, number: int) -> str:
        """The file that sample `number` is cut from."""
        return self.images.files[self.entry(number)]

    def __getitem__(self, number: int) -> Sample:
        index, rng = self.entry(number), self.generator(number)
        image = read_image(self.images.folder / self.images.files[index])
        box = resized_crop_box(image.size, self.scale, rng)
        rows, columns = self.crop_size
        image = image.crop(box).resize((columns, rows), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) / 255
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        crop = ((pixels - self.mean) / self.std).transpose(2, 0, 1)
        return {
            "crop": torch.from_numpy(np.ascontiguousarray(crop)),
            "case": index,
            "number": number,
        }


def read_image(path: Path) -> Image.Image:
    """Decode a file as RGB.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: cannot be read as an image any more ({error}); restore or remove it, then "
            "start a new run"
        ) from None


def resized_crop_box(
    size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a box of a share `scale` of the area and an aspect ratio of 3:4 to 4:3.

    Args:
        size: Width and height of the image.
        scale: Smallest and largest share.
        rng: Source of chance.

    Returns:
        Left, top, right, bottom. After ten boxes that do not fit, the largest one in the middle
        whose aspect ratio is allowed.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _walk(root: Path) -> tuple[list[str], dict[str, int]]:
    """Images under a folder, sorted, and how many other files there are of each suffix.

    Linked folders are searched too, each real one once, so that circles end. What lies in the tree
    itself goes first, so that a link takes nothing away from its place.
    """
    names: list[str] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    tops = [str(root)]
    while tops:
        links = []
        for top in tops:
            for folder, folders, files in os.walk(top, onerror=_refuse):
                place = os.path.realpath(folder)
                if place in seen:
                    folders.clear()
                    continue
                seen.add(place)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                paths = [os.path.join(folder, name) for name in folders]
                links += [path for path in paths if os.path.islink(path)]
                for name in (name for name in files if not name.startswith(".")):
                    suffix = Path(name).suffix.lower()
                    if suffix in SUFFIXES:
                        names.append((Path(folder) / name).relative_to(root).as_posix())
                    elif suffix not in NOTES:
                        others[suffix if suffix in OTHER_SUFFIXES else "other"] += 1
        tops = links
    return sorted(names), dict(others)


def _refuse(error: OSError) -> NoReturn:
    """Images in a folder that may not be read would be missed without a word."""
    raise fault(
        "E-UNREADABLE", Path(error.filename), "a folder that may not be read",
        "read access to all of it", "change its permissions, or move it out of the data folder",
    ) from None  # fmt: skip


def _identity(root: Path, names: Sequence[str]) -> str:
    """One hash over the names and sizes of all files; one that is not there has the size -1."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (root / name).stat().st_size
        except OSError:  # decoding will say what it is
            size = -1
        line = f"{name} {size}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _split(hashes: str) -> tuple[str, ...]:
    """The hashes of a `verdict`."""
    return tuple(hashes[i : i + HASH_DIGITS] for i in range(0, len(hashes), HASH_DIGITS))


def _examine_all(
    root: Path,
    names: Sequence[str],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, str], dict[str, int], tuple[str, ...]]:
    """Faults by file; of those fit for use how many are not RGB, by mode, and each one's hash."""
    bad: dict[str, str] = {}
    modes: Counter[str] = Counter()
    hashes: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: _examine(root / name), names)
        for done, (name, (mode, fault, digest)) in enumerate(zip(names, found, strict=True), 1):
            if fault:
                bad[name] = fault
            else:
                hashes.append(digest)
                if mode != "RGB":
                    modes[mode] += 1
            if progress is not None:
                progress(done, len(names))
    return bad, dict(modes), tuple(hashes)


def _examine(path: Path) -> tuple[str, str, str]:
    """Colour mode of a file, what is wrong with it (nothing: empty), and the hash of its bytes."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            if mode != "RGB" and mode not in CONVERTED:
                fault = f"mode {mode} has more than 8 bits a colour; save it as 8-bit RGB"
                return mode, fault, ""
            image.draft(mode, (image.width // 8, image.height // 8))
            image.load()
            return mode, "", hashlib.sha256(content).hexdigest()[:HASH_DIGITS]
    except UnidentifiedImageError:
        return "", "not an image" if path.stat().st_size else "empty file", ""
    except OSError as error:  # of the system, whose full text holds the path, or of the decoder
        return "", error.strerror or str(error), ""
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", str(error), ""
