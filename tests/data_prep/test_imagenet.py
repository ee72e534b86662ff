"""The ImageFolder layout in miniature, sound and with the faults of half-unpacked copies."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from scripts import script

from data_prep import imagenet
from data_prep.imagenet import main

DATA = 3
CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes: 4 training and 2 validation images each, under the published names."""
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    monkeypatch.setattr(imagenet, "IMAGES", {"train": 12, "val": 6})
    root = tmp_path / "imagenet"
    for part, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                file = f"{name}_{n}.JPEG" if part == "train" else f"ILSVRC2012_val_{c}{n:07d}.JPEG"
                Image.new("RGB", (20, 16), (40 * c, 30 * n, 9)).save(
                    root / part / name / file, "JPEG"
                )
    (root / "train" / CLASSES[0] / "._n01440764_0.JPEG").write_bytes(b"resource fork")
    return root


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    said = script(main, capsys, folder, "--decode")
    assert "train: 12 images in 3 classes, 4 to 4 in each" in said
    assert "val: 6 images in 3 classes, 2 to 2 in each" in said
    assert said.count("all can be decoded; 0 are not RGB") == 2
    assert sorted(folder.rglob("*")) == before


def test_the_tree_of_kaggle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "kaggle" / "ILSVRC" / "Data"
    inner.mkdir(parents=True)
    folder.rename(inner / "CLS-LOC")
    assert "12 images in 3 classes" in script(main, capsys, tmp_path / "kaggle")


def flatten(root: Path) -> None:
    for path in [*(root / "val").glob("*/*.JPEG")]:
        path.rename(root / "val" / path.name)
    for path in (root / "val").iterdir():
        if path.is_dir():
            path.rmdir()


def lose_class(root: Path) -> None:
    for path in (root / "val" / CLASSES[1]).iterdir():
        path.unlink()
    (root / "val" / CLASSES[1]).rmdir()


def lose_image(root: Path) -> None:
    (root / "train" / CLASSES[2] / f"{CLASSES[2]}_3.JPEG").unlink()


def empty_class(root: Path) -> None:
    for path in (root / "train" / CLASSES[0]).iterdir():
        path.unlink()
    (root / "train" / f"{CLASSES[0]}.tar").touch()


def rename_class(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / CLASSES[0]).rename(root / part / "tench")


def break_image(root: Path) -> None:
    path = root / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    path.write_bytes(path.read_bytes()[:300])


def lose_part(root: Path) -> None:
    (root / "val").rename(root / "validation")


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (flatten, "E-FLAT"),
        (flatten, "6 images outside of class folders, such as ILSVRC2012_val_00000000.JPEG"),
        (lose_class, "1 classes in only one of train and val: n01443537"),
        (lose_image, "found 3 classes and 11 images; expected 3 classes called like"),
        (empty_class, "1 classes without an image, such as n01440764 (are the tars"),
        (rename_class, "with names like tench"),
        (break_image, "1 of 12 images cannot be used: n01440764/n01440764_1.JPEG"),
        (lose_part, "E-NOT-IMAGENET"),
    ],
)
def test_faulty_folders(
    folder: Path, capsys: pytest.CaptureFixture[str], breaking: Callable[[Path], None], told: str
) -> None:
    breaking(folder)
    assert told in script(main, capsys, folder, "--decode", code=DATA)


def test_any_other_data_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rename_class(folder)
    lose_image(folder)
    assert "11 images in 3 classes, 3 to 4 in each" in script(main, capsys, folder, "--any")


def test_the_published_numbers() -> None:
    assert imagenet.CLASSES == 1000
    assert imagenet.IMAGES == {"train": 1_281_167, "val": 50_000}
