"""A folder of images: what is usable is found once, and sample n depends on (seed, n) alone."""

import json
import os
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from spark3d.commands.image_folders import scan_notes
from spark3d.data.images2d import (
    HASH_DIGITS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageCrops,
    read_image,
    resized_crop_box,
    scan_images,
)
from spark3d.data.stream import batches
from spark3d.errors import ConfigError, DataError

OTHERS = MappingProxyType(
    {"b.tif": ".tif", "c.TIF": ".tif", "d.webp": ".webp", "e.Jane": "other", "Jane": "other"}
)
"""Files of other formats, and as what they are counted."""


def paint(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    """Save an image of noise, whose seed is the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("dog/b.png", "dog/a.JPEG", "cat/c.jpg", "d.png"):
        paint(tmp_path / "images" / name)
    return tmp_path / "images"


def test_files_are_found_in_the_order_of_their_names(folder):
    paint(folder / ".hidden" / "x.png")
    paint(folder / "dog" / "._a.png")
    (folder / "notes.txt").write_text("no image")
    os.utime(folder / "cat" / "c.jpg", (0, 0))
    calls = []
    found = scan_images(folder, progress=lambda *numbers: calls.append(numbers))
    assert found.files == ("cat/c.jpg", "d.png", "dog/a.JPEG", "dog/b.png")
    assert (found.bad, found.converted) == ({}, {})
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_linked_folders_are_searched_each_real_one_once(folder, tmp_path):
    paint(tmp_path / "elsewhere" / "inner" / "e.png")
    (folder / "bird").symlink_to(tmp_path / "elsewhere")
    (folder / "zoo").symlink_to(tmp_path / "elsewhere" / "inner")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert scan_images(folder).files == (
        "bird/inner/e.png", "cat/c.jpg", "d.png", "dog/a.JPEG", "dog/b.png",
    )  # fmt: skip
    (folder / "bird").unlink()
    assert "zoo/e.png" in scan_images(folder).files


def test_a_link_takes_nothing_away_from_where_it_lies(folder):
    usual = scan_images(folder).files
    (folder / "cat" / "more").symlink_to(folder / "dog")
    assert scan_images(folder).files == usual


def test_a_folder_that_may_not_be_read_is_no_empty_one(folder, monkeypatch):
    listing = os.scandir

    def refuse(path):
        if Path(path) == folder / "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"E-UNREADABLE.*dog.*permissions"):
        scan_images(folder)


def test_a_name_that_is_not_utf8_will_do(folder):
    name = os.fsdecode(b"d\xff.png")
    (folder / "d.png").rename(folder / name)
    assert name in scan_images(folder).files


def test_hashes_tell_the_same_image_under_another_name(folder, monkeypatch):
    """Of the bytes of the usable files, in their order; a known verdict brings them along."""
    (folder / "dog" / "z.jpg").write_bytes((folder / "cat" / "c.jpg").read_bytes())
    (folder / "a_bad.jpg").write_text("no image")
    (folder / "dog" / "bad.png").touch()
    found = scan_images(folder, max_bad=0.5)
    hashes = dict(zip(found.files, found.hashes, strict=True))
    assert hashes["dog/z.jpg"] == hashes["cat/c.jpg"]
    assert len(set(hashes.values())) == 4
    assert {len(one) for one in hashes.values()} == {HASH_DIGITS}

    verdict = json.loads(json.dumps(found.verdict()))
    for key in ("hashes", "left_out"):
        old = {**verdict, "bad": dict(found.bad)}
        del old[key]
        assert scan_images(folder, max_bad=0.5, known=old) == found  # read again
    assert not any(name in json.dumps(verdict) for name in ("bad.", "dog", "cat", ".jpg", ".png"))
    monkeypatch.setattr("spark3d.data.images2d._examine", None)
    assert scan_images(folder, max_bad=0.5, known=verdict) == found


def test_images_are_decoded_in_the_workers(folder, tmp_path, monkeypatch):
    (tmp_path / "pids").mkdir()

    def noting(path: Path) -> Image.Image:
        (tmp_path / "pids" / str(os.getpid())).touch()
        return read_image(path)

    monkeypatch.setattr("spark3d.data.images2d.read_image", noting)
    assert len(list(batches(ImageCrops(scan_images(folder), (8, 8), 0), 2, 0, 4, workers=2))) == 4
    decoders = {file.name for file in (tmp_path / "pids").iterdir()}
    assert len(decoders) == 2
    assert str(os.getpid()) not in decoders


def test_other_colour_modes_are_converted_and_counted(folder):
    paint(folder / "grey.png", "L")
    paint(folder / "grey2.jpg", "L")
    paint(folder / "alpha.png", "RGBA")
    found = scan_images(folder)
    assert found.converted == {"L": 2, "RGBA": 1}
    dataset = ImageCrops(found, (8, 8), 0)
    assert all(dataset[n]["crop"].shape == (3, 8, 8) for n in range(7))


def break_files(folder: Path) -> set[str]:
    for name in ("cut.jpg", "cut.png"):
        whole = paint(folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.png").touch()
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(folder / "deep.png")
    return {"cut.jpg", "cut.png", "page.jpg", "empty.png", "deep.png"}


def test_unusable_files_are_left_out_by_name_up_to_the_limit(folder):
    broken = break_files(folder)
    found = scan_images(folder, max_bad=0.6)
    assert set(found.bad) == broken
    assert "truncated" in found.bad["cut.jpg"]
    assert found.bad["page.jpg"] == "not an image"
    assert found.bad["empty.png"] == "empty file"
    assert "8-bit" in found.bad["deep.png"]
    assert len(found.files) == 4
    with pytest.raises(DataError, match=r"5 of 9 images cannot be used: cut.jpg .*max_bad"):
        scan_images(folder, max_bad=0.5)


def test_a_file_that_may_not_be_read_is_told_without_its_path(folder, monkeypatch):
    """The reason stays in the run's folder."""
    read = Path.read_bytes

    def refuse(path):
        if path.name == "d.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert scan_images(folder, max_bad=0.5).bad == {"d.png": "Permission denied"}


def test_links_that_lead_nowhere_or_in_a_circle_are_left_out_by_name(folder):
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "self.jpg").symlink_to("self.jpg")
    found = scan_images(folder, max_bad=0.5)
    assert found.bad["gone.png"] == "No such file or directory"
    assert "symbolic links" in found.bad["self.jpg"]
    assert len(found.files) == 4
    paint(folder / "nowhere.png")
    assert scan_images(folder, max_bad=0.5, known=found.verdict()).identity != found.identity


@given(names=st.sets(st.sampled_from(list(OTHERS)), min_size=1))
def test_files_of_other_formats_are_counted_aloud(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("formats")
    paint(folder / "a.png")
    for name in (*names, "list.csv", "notes.TXT", ".DS_Store", ".hidden.tif"):
        (folder / name).touch()
    found = scan_images(folder)
    assert found.files == ("a.png",)
    assert found.passed_over == Counter(OTHERS[name] for name in names)
    note = scan_notes(found)[-1]
    assert note.startswith(f"passed over {len(names)} files that are no PNG or JPEG (")
    assert "Jane" not in note


def test_all_unusable_is_an_error_whatever_the_limit(tmp_path):
    break_files(tmp_path / paint(tmp_path / "x" / "a.png").parent)
    (tmp_path / "x" / "a.png").unlink()
    with pytest.raises(DataError, match="5 of 5 images"):
        scan_images(tmp_path / "x", max_bad=1.0)


def test_no_folder_and_no_image_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        scan_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file ending in \.png"):
        scan_images(tmp_path)


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10**6))
def test_a_sample_depends_on_seed_and_number_only(tmp_path_factory, seed, number):
    folder = tmp_path_factory.getbasetemp() / "shared"
    if not folder.exists():
        for name in ("a.png", "b.png", "c.png"):
            paint(folder / name)
    first, second = (ImageCrops(scan_images(folder), (16, 12), seed) for _ in range(2))
    second[number + 5]
    a, b = first[number], second[number]
    assert a["crop"].shape == (3, 16, 12)
    assert a["crop"].dtype == torch.float32
    assert torch.equal(a["crop"], b["crop"])


def test_workers_and_restarts_change_nothing(folder):
    dataset = ImageCrops(scan_images(folder), (16, 16), 3)
    whole = [b["crop"] for b in batches(dataset, 2, 0, 5)]
    tail = [b["crop"] for b in batches(dataset, 2, 2, 5, workers=2)]
    assert torch.equal(torch.stack(whole[2:]), torch.stack(tail))


def test_the_crop_is_that_of_torchvision(folder):
    """Same box, same resampling, same range: compared with torchvision's own functions."""
    dataset = ImageCrops(scan_images(folder), (24, 24), 1, flip=0.0)
    for number in range(4):
        path = folder / dataset.name(number)
        with Image.open(path) as image:
            left, top, right, bottom = resized_crop_box(
                image.size, (0.67, 1.0), dataset.generator(number)
            )
            cut = functional.resized_crop(
                image.convert("RGB"), top, left, bottom - top, right - left, [24, 24],
                functional.InterpolationMode.BICUBIC,
            )  # fmt: skip
        expected = functional.normalize(
            functional.to_tensor(cut), list(IMAGENET_MEAN), list(IMAGENET_STD)
        )
        torch.testing.assert_close(dataset[number]["crop"], expected, atol=1e-6, rtol=0)


def test_half_of_the_samples_are_mirrored(folder):
    found = scan_images(folder)
    flips = [ImageCrops(found, (8, 8), 5, flip=f) for f in (0.0, 0.5, 1.0)]
    mirrored = 0
    for number in range(40):
        plain, maybe, always = (dataset[number]["crop"] for dataset in flips)
        assert torch.equal(plain.flip(2), always)
        mirrored += torch.equal(maybe, always)
    assert 10 < mirrored < 30


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    low=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_boxes_lie_inside_and_have_the_area_asked_for(width, height, low, seed):
    box = resized_crop_box((width, height), (low, 1.0), np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 40 and 3 / 4 <= width / height <= 4 / 3:
        assert (right - left) * (bottom - top) >= 0.9 * low * width * height


def test_a_long_image_gives_its_middle():
    box = resized_crop_box((400, 10), (0.9, 1.0), np.random.default_rng(0))
    assert box == (193, 0, 206, 10)


def test_a_file_damaged_later_is_named(folder):
    dataset = ImageCrops(scan_images(folder), (8, 8), 0)
    (folder / "d.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"d\.png: cannot be read as an image any more"):
        list(batches(dataset, 4, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": (0.9, 0.5)}, r"images\.scale"), ({"crop_size": (8,)}, r"images\.crop")],
)
def test_impossible_settings_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        ImageCrops(scan_images(folder), **({"crop_size": (8, 8), "seed": 0} | options))
