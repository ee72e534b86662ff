"""Slices to scroll: in their place, in their colours, bounded, and safe to show."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from spark3d.errors import DataError
from spark3d.reports.html import CaseCard, CaseGroup, Picture, Report, render
from spark3d.reports.panels import colour_of
from spark3d.reports.viewer import MOST_PIXELS, MOST_SLICES, load_viewer, make_viewer, save_viewer

LABELS = {1: "right_kidney", 2: "liver"}


def maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A right kidney in slices 30 to 39 and a liver in slice 80; the prediction lacks the liver."""
    reference = np.zeros((40, 30, 100), np.uint8)
    reference[25:35, 10:20, 30:40] = 1
    reference[5:15, 10:20, 80] = 2
    prediction = np.where(reference == 2, 0, reference)
    image = np.random.default_rng(0).normal(0, 50, reference.shape).astype(np.float32)
    return image, reference, prediction


def sheet(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_every_slice_has_its_place_and_its_outlines():
    viewer = make_viewer(*maps(), (1.0, 1.0, 2.0), LABELS)
    assert len(viewer.captions) <= MOST_SLICES
    assert max(viewer.width, viewer.height) <= MOST_PIXELS
    assert viewer.columns * viewer.rows >= len(viewer.captions)
    sheets = {layer.name: sheet(layer.uri) for layer in viewer.layers}
    for picture in sheets.values():
        assert picture.shape[:2] == (viewer.rows * viewer.height, viewer.columns * viewer.width)
    top, left = divmod(viewer.start, viewer.columns)
    here = np.s_[top * viewer.height :, left * viewer.width :]
    tile = sheets["prediction"][here][: viewer.height, : viewer.width]
    rows, columns = np.nonzero(tile[..., 3])
    assert columns.mean() < viewer.width / 2  # the patient's right is at the left
    colour = colour_of(1, LABELS)
    assert tuple(tile[rows[0], columns[0], :3]) == tuple(
        int(colour[i : i + 2], 16) for i in (1, 3, 5)
    )
    white = sheets["reference"][sheets["reference"][..., 3] > 0]
    assert (white[:, :3] == 255).all()
    assert (sheets["reference"][..., 3] > 0).any()
    assert viewer.legend == (
        ("right kidney", colour_of(1, LABELS)),
        ("liver", colour_of(2, LABELS)),
    )


def test_it_comes_back_from_its_file_and_nothing_else_is_taken(tmp_path):
    viewer = make_viewer(None, *maps()[1:], (1.0, 1.0, 1.0), LABELS)
    path = tmp_path / "v.json"
    save_viewer(viewer, path)
    assert load_viewer(path) == viewer
    tree = json.loads(path.read_text())
    tree["layers"][0]["uri"] = "https://example.org/x.webp"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="no viewer"):
        load_viewer(path)


def test_the_page_allows_its_own_script_alone():
    viewer = make_viewer(*maps(), (1.0, 1.0, 1.0), LABELS)
    card = CaseCard("best", "<b>x</b>", "Dice 1", (), Picture("data:image/png;base64,", ""), viewer)
    text = render(Report("t", "v", cases=(CaseGroup("run", 0, (card,)),)))
    assert text.count("<script>") == 1
    assert "script-src 'sha256-" in text
    assert "<b>x</b>" not in text
    bare = CaseCard("best", "x", "Dice 1", (), Picture("data:image/png;base64,", ""))
    plain = render(Report("t", "v", cases=(CaseGroup("run", 0, (bare,)),)))
    assert "<script" not in plain
    assert "script-src" not in plain
