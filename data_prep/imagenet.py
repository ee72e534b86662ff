"""ImageNet-1k (ILSVRC 2012): checks the layout of one folder per class, which `--dims 2` reads.

  where    https://www.image-net.org/download.php (account, terms of access): the two tars
           ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; not downloaded here
  licence  research and education only, see the terms; the images belong to their authors
  size     about 138 GB for training and 6.4 GB for validation

  python -m data_prep.imagenet data/imagenet               names only, seconds to minutes
  python -m data_prep.imagenet data/imagenet --decode      decode every image as well: hours
  python -m data_prep.imagenet photos --any                any number of classes and images

Expected is train/n01440764/*.JPEG and val/n01440764/*.JPEG: 1000 classes in both, 1 281 167 and
50 000 images. The published validation tar has all images in one folder; they have to be moved into
folders by class first (the classes stand in the development kit). Nothing is written.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.console import Parser, bar, run
from spark3d.data.checks import fault
from spark3d.data.images2d import SUFFIXES, scan_images

WNID = re.compile(r"n\d{8}")
CLASSES, IMAGES = 1000, {"train": 1_281_167, "val": 50_000}
Counts = dict[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the folders, and the images if asked."""
    options = parse(arguments)
    root = inner(options.folder)
    parts = {name: count_classes(root / name) for name in IMAGES}
    check_classes(root, parts)
    for name, classes in parts.items():
        if not options.any:
            check_published(root / name, classes, IMAGES[name])
        fewest, most = min(classes.values()), max(classes.values())
        print(
            f"{root / name}: {sum(classes.values())} images in {len(classes)} classes, "
            f"{fewest} to {most} in each"
        )
        if options.decode:
            with bar(f"decoding {name}") as advance:
                images = scan_images(root / name, 0.0, os.cpu_count() or 1, advance)
            print(f"  all can be decoded; {sum(images.converted.values())} are not RGB")
    print(f"next: spark3d pretrain spark_resnet50_2d --dims 2 --data {root / 'train'} --out RUN")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("imagenet", __doc__)
    parser.add_argument("folder", type=Path, help="the folder with train/ and val/")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    parser.add_argument("--any", action="store_true", help="another data set of the same layout")
    return parser.parse_args(arguments)


def inner(folder: Path) -> Path:
    """The folder with `train`: the one given, or where Kaggle's archive has it.

    Raises:
        DataError: there is none.
    """
    for root in (folder, folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC"):
        if all((root / name).is_dir() for name in IMAGES):
            return root
    raise fault(
        "E-NOT-IMAGENET", folder, "no folders train and val", "train/CLASS/*.JPEG and "
        "val/CLASS/*.JPEG", "unpack both tars, each class into a folder of its own",
    )  # fmt: skip


def count_classes(part: Path) -> Counts:
    """Images in each class folder.

    Raises:
        DataError: images outside of class folders, class folders without one, none at all.
    """
    counts: Counts = {}
    loose: list[str] = []
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            counts[entry.name] = sum(is_image(inside.name) for inside in os.scandir(entry.path))
        elif is_image(entry.name):
            loose.append(entry.name)
    if loose:
        raise fault(
            "E-FLAT", part, f"{len(loose)} images outside of class folders, such as {loose[0]}",
            "one folder per class", "move each image into the folder of its class",
        )  # fmt: skip
    if not counts or not all(counts.values()):
        empty = [name for name, count in counts.items() if not count]
        found = f"{len(empty)} classes without an image, such as {empty[0]}" if empty else "nothing"
        packed = " (are the tars inside unpacked?)" if any(part.rglob("*.tar")) else ""
        raise fault(
            "E-EMPTY-CLASS", part, f"{found}{packed}", f"files ending in {', '.join(SUFFIXES)}",
            "unpack the images again",
        )  # fmt: skip
    return counts


def is_image(name: str) -> bool:
    """Whether a file is read as an image; those that macOS adds are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def check_classes(root: Path, parts: dict[str, Counts]) -> None:
    """Refuse classes that only one part has: their numbers would not mean the same.

    Raises:
        DataError: names some.
    """
    train, val = parts["train"].keys(), parts["val"].keys()
    if odd := sorted(train ^ val):
        raise fault(
            "E-CLASSES", root, f"{len(odd)} classes in only one of train and val: "
            f"{', '.join(odd[:5])}{' ...' if odd[5:] else ''}", "the same classes in both",
            "unpack what is missing",
        )  # fmt: skip


def check_published(part: Path, classes: Counts, images: int) -> None:
    """Refuse other numbers of classes and images than ILSVRC 2012 has.

    Raises:
        DataError: with the numbers found.
    """
    odd = [name for name in classes if not WNID.fullmatch(name)]
    found = f"{len(classes)} classes and {sum(classes.values())} images"
    if odd or len(classes) != CLASSES or sum(classes.values()) != images:
        names = f", with names like {odd[0]}" if odd else ""
        raise fault(
            "E-IMAGENET-INCOMPLETE", part, found + names,
            f"{CLASSES} classes called like n01440764 and {images} images",
            "unpack what is missing, or pass --any for another data set",
        )  # fmt: skip


if __name__ == "__main__":
    run(main, None)
