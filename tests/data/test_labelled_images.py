"""Labelled images: classes are folders, a sample is a function of its number, faults are named."""

import random
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spark3d.data.image_transforms import (
    ImageChanges,
    drawn_from,
    evaluation_transform,
    training_transform,
)
from spark3d.data.images2d import scan_images
from spark3d.data.labelled_images import (
    LabelledImages,
    TrainingImages,
    ValidationImages,
    check_same_classes,
    label_by_folder,
)
from spark3d.data.stream import batches
from spark3d.errors import ConfigError, DataError

STRONG = ImageChanges((0.3, 1.0), 0.5, "rand-m9-mstd0.5-inc1", 0.5)


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 26, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five cats, three dogs."""
    for n in range(8):
        paint(tmp_path / "train" / ("cat" if n < 5 else "dog") / f"{n}.png", n)
    return tmp_path / "train"


@pytest.fixture
def part(root: Path) -> LabelledImages:
    return label_by_folder(scan_images(root))


def test_the_class_is_the_folder(part: LabelledImages) -> None:
    assert part.classes == ("cat", "dog")
    assert part.labels == (0, 0, 0, 0, 0, 1, 1, 1)
    assert all(f.startswith(part.classes[k]) for f, k in zip(part.files, part.labels, strict=True))


def test_a_few_labels_are_as_many_of_each_class_and_nested(part: LabelledImages) -> None:
    two, three = part.few(2, seed=4), part.few(3, seed=4)
    assert sorted(two.labels) == [0, 0, 1, 1]
    assert sorted(three.labels) == [0, 0, 0, 1, 1, 1]
    assert set(two.files) < set(three.files)
    assert {part.few(2, seed).files for seed in range(20)} != {two.files}
    with pytest.raises(ConfigError, match="per_class=4, but class dog has 3 images"):
        part.few(4, 0)


def test_images_outside_of_classes_empty_classes_and_a_single_one_are_refused(root: Path) -> None:
    (root / "bird").mkdir()
    with pytest.raises(DataError, match="no usable image in class bird"):
        label_by_folder(scan_images(root))
    (root / "bird").rmdir()
    paint(root / "loose.png", 0)
    with pytest.raises(DataError, match=r"loose\.png in no class folder"):
        label_by_folder(scan_images(root))
    (root / "loose.png").unlink()
    for file in (root / "dog").iterdir():
        file.unlink()
    (root / "dog").rmdir()
    with pytest.raises(DataError, match="one class \\(cat\\); at least two"):
        label_by_folder(scan_images(root))


def test_other_classes_for_validation_are_named(part: LabelledImages, tmp_path: Path) -> None:
    for name in ("cat", "cow", "emu"):
        paint(tmp_path / "val" / name / "a.png", 0)
    other = label_by_folder(scan_images(tmp_path / "val"))
    with pytest.raises(DataError) as caught:
        check_same_classes(part, other)
    said = str(caught.value)
    assert "2 classes to train on, 3 for validation" in said
    assert "only in train: dog; only in val: cow, emu" in said
    check_same_classes(part, part)


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10**6), calls=st.integers(0, 5))
def test_a_sample_depends_on_seed_and_number_only(
    tmp_path_factory: pytest.TempPathFactory, seed: int, number: int, calls: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "labelled"
    if not folder.exists():
        for n, name in enumerate(("a/0.png", "a/1.png", "b/2.png")):
            paint(folder / name, n)
    part = label_by_folder(scan_images(folder))
    first, second = (TrainingImages(part, (16, 12), seed, STRONG) for _ in range(2))
    torch.rand(calls)
    for _ in range(calls):
        random.random()
        np.random.rand()  # noqa: NPY002
    a, b = first[number], second[number]
    assert a["crop"].shape == (3, 16, 12)
    assert torch.equal(a["crop"], b["crop"])
    assert a["label"] == b["label"] == part.labels[a["case"]]


def test_samples_leave_the_global_generators_alone(part: LabelledImages) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = draws(), draws()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    data = TrainingImages(part, (16, 16), 0, STRONG)
    after = []
    for n in range(2):
        after.append(draws())
        assert data[n]["crop"].shape == (3, 16, 16)
    assert tuple(after) == before


def test_what_is_drawn_inside_comes_from_the_generator_handed_in() -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        with drawn_from(np.random.default_rng(seed)):
            return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    assert draws(1) == draws(1)
    assert all(a != b for a, b in zip(draws(1), draws(2), strict=True))


def test_workers_and_restarts_change_nothing(part: LabelledImages) -> None:
    data = TrainingImages(part, (16, 16), 3, STRONG)
    whole = [b["crop"] for b in batches(data, 2, 0, 4)]
    tail = [b["crop"] for b in batches(data, 2, 2, 4, workers=2)]
    assert torch.equal(torch.stack(whole[2:]), torch.stack(tail))


def test_an_epoch_shows_every_image_once_and_repeats_change_it_anew(part: LabelledImages) -> None:
    once = TrainingImages(part, (8, 8), 0, STRONG)
    assert sorted(once.entry(n) for n in range(8)) == list(range(8))
    thrice = TrainingImages(part, (8, 8), 0, STRONG, repeats=3)
    assert [thrice.entry(n) for n in range(0, 24, 3)] == [once.entry(n) for n in range(8)]
    assert [thrice.entry(n) for n in range(3)] == [once.entry(0)] * 3
    assert not torch.equal(thrice[0]["crop"], thrice[1]["crop"])


def test_validation_sees_every_image_once_and_padding_bears_no_label(part: LabelledImages) -> None:
    data = ValidationImages(part, (16, 16), 0.95)
    found = list(batches(data, 3, 0, 3))
    labels = torch.cat([batch["label"] for batch in found])
    assert labels.tolist() == [*part.labels, -1]
    again = list(batches(data, 3, 0, 3, workers=1))
    assert all(torch.equal(a["crop"], b["crop"]) for a, b in zip(found, again, strict=True))


def test_evaluation_cuts_the_middle() -> None:
    """White in the middle of a black frame: only white is left."""
    pixels = np.zeros((100, 160, 3), np.uint8)
    pixels[15:85, 45:115] = 255
    crop = evaluation_transform((32, 32), 0.5)(Image.fromarray(pixels))
    assert crop.shape == (3, 32, 32)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(crop[:, 8:24, 8:24].mean((1, 2)), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (ImageChanges(scale=(0.9, 0.2)), r"augment\.scale"),
        (ImageChanges(policy="rand-q9"), r"augment\.policy='rand-q9'"),
        (ImageChanges(policy="trivia"), r"augment\.policy='trivia'"),
    ],
)
def test_impossible_changes_are_refused(changes: ImageChanges, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training_transform((16, 16), changes)


@pytest.mark.parametrize("policy", ["none", "trivial", "rand-m9-mstd0.5", "original"])
def test_a_real_photograph_goes_through_every_policy(policy: str, tmp_path: Path) -> None:
    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    for name in ("hopper", "mirror"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        with Image.open(photo) as image:
            turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            (image if name == "hopper" else turned).save(folder / "photo.jpg")
    part = label_by_folder(scan_images(tmp_path / "train"))
    data = TrainingImages(part, (48, 48), 0, ImageChanges((0.5, 1.0), 0.0, policy, 0.0))
    crops = torch.stack([data[n]["crop"] for n in range(4)])
    assert crops.isfinite().all()
    assert float(crops.std()) > 0.2  # a picture, not a plane
    assert float(crops.abs().max()) < 3
