"""Pictures: planes turned as radiologists look at them, whole files, colours in their place."""

import numpy as np
import pytest
import torch
from PIL import Image

from spark3d.reports.panels import ORGAN_COLOURS, colour_of, overlay, reconstruction_panel
from spark3d.reports.planes import Plane, centre_planes, foreground_box, fullest_planes

LABELS = {1: "spleen", 6: "liver"}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share_of(picture: np.ndarray, colour: str) -> float:
    """Share of pixels within 60 levels of a colour."""
    goal = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture - goal).max(-1) < 60).mean())


@pytest.mark.parametrize(
    ("axis", "corner", "where"),
    [
        (2, (-1, -1, 1), "right anterior at the top left"),
        (1, (-1, 1, -1), "right superior at the top left"),
        (0, (1, -1, -1), "anterior superior at the top left"),
    ],
)
def test_planes_are_turned_the_radiological_way(axis, corner, where):
    volume = np.zeros((3, 4, 5))
    volume[corner] = 1
    flat = Plane(axis, 1).cut(volume)
    assert flat[0, 0] == 1, where
    rows, columns = (n for a, n in reversed(list(enumerate(volume.shape))) if a != axis)
    assert flat.shape == (rows, columns)


def test_planes_go_through_the_fullest_slices():
    foreground = np.zeros((10, 12, 14), bool)
    assert fullest_planes(foreground) == centre_planes((10, 12, 14))
    foreground[2, 3:8, 4:9] = True
    foreground[1:4, 5, 6] = True
    assert [p.index for p in fullest_planes(foreground)] == [6, 5, 2]
    assert foreground_box(foreground, (0, 2, 9)) == np.s_[1:4, 1:10, 0:18]


@pytest.mark.parametrize("shape", [(1, 12, 10), (3, 12, 10), (1, 8, 12, 10), (2, 8, 12, 10)])
def test_a_panel_is_written_for_images_and_volumes(tmp_path, shape):
    image = torch.linspace(-1, 3, int(np.prod(shape))).reshape(shape)
    reconstruction_panel(image, image * 0, image.numpy(), tmp_path / "p.png")
    picture = pixels(tmp_path / "p.png")
    width = picture.shape[1] // 3
    left, middle, right = (picture[60:, i * width : (i + 1) * width].std() for i in range(3))
    assert left > 20
    assert right > 20
    assert middle < left


def test_hidden_cells_are_tinted_only_in_the_masked_column(tmp_path):
    image = np.ones((1, 8, 8, 8), np.float32)
    image[:, 4:] = 0
    visible = np.ones((8, 8, 8), bool)
    visible[:4] = False
    reconstruction_panel(image, image * visible, image, tmp_path / "p.png", visible=visible)
    picture = pixels(tmp_path / "p.png")
    blue = (picture[..., 2] - picture[..., 0] > 20) & (picture.sum(-1) < 200)
    width = picture.shape[1] // 3
    assert blue[:, width : 2 * width].mean() > 0.2
    assert blue[:, :width].mean() == 0
    assert blue[:, 2 * width + 10 :].mean() == 0


def test_a_constant_or_nan_image_still_makes_a_panel(tmp_path):
    image = np.full((1, 8, 8), np.nan, np.float32)
    reconstruction_panel(image, image, np.zeros_like(image), tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").shape[2] == 3


def test_an_overlay_shows_the_organs_that_are_there(tmp_path):
    reference = np.zeros((20, 18, 16), np.uint8)
    reference[4:12, 4:12, 4:12] = 6
    prediction = np.roll(reference, 2, 0)
    image = np.random.default_rng(0).normal(40, 10, reference.shape)
    overlay(image, reference, prediction, tmp_path / "o.png", (1, 1, 3), LABELS)
    picture = pixels(tmp_path / "o.png")
    assert share_of(picture, colour_of(6, LABELS)) > 0.001
    assert share_of(picture, colour_of(1, LABELS)) < 0.0002
    assert share_of(picture, "#ffffff") > 0.001


def test_an_overlay_needs_no_image_and_no_label(tmp_path):
    empty = np.zeros((6, 7, 8), np.uint8)
    overlay(None, empty, torch.zeros(6, 7, 8), tmp_path / "o.png", (1, 1, 1), LABELS)
    assert pixels(tmp_path / "o.png").max() > 200  # the legend


def test_colours_go_by_the_place_among_the_labels():
    assert colour_of(6, LABELS) == ORGAN_COLOURS[1]
    assert colour_of(40, {k: str(k) for k in range(1, 41)}) in ORGAN_COLOURS
