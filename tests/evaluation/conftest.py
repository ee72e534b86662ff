"""Scans on disk, and a stand-in for the model that `predict` loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from known_scans import LABELS, ByIntensity, ball, odd_affine, write_nifti

from spark3d.build import LoadedSegmenter
from spark3d.data.intensity import Window
from spark3d.weights.segmenters import ModelCard


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A dataset of three scans: `imagesTr/<case>_0000.nii.gz` and `labelsTr/<case>.nii.gz`."""
    for n in range(3):
        image, labels = ball(n)
        write_nifti(tmp_path / "scans" / "imagesTr" / f"case{n}_0000.nii.gz", image, odd_affine())
        write_nifti(tmp_path / "scans" / "labelsTr" / f"case{n}.nii.gz", labels, odd_affine())
    return tmp_path / "scans"


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ByIntensity]:
    """Make `predict` load `ByIntensity`; calling it sets spacing, crop or hash and returns it."""

    def load(
        spacing_mm: tuple[float, float, float] = (1.2, 1.2, 1.2),
        crop: tuple[int, ...] = (16, 16, 16),
        sha256: str = "0" * 64,
        window: Window | None = None,
        swap: tuple[tuple[int, int], ...] = (),
        labels: dict[int, str] | None = None,
        **card_values: Any,
    ) -> ByIntensity:
        network = ByIntensity()
        window = window or Window("unit", 0, 1000)
        card = ModelCard(
            backbone={"name": "test", "ndim": 3, "in_channels": 1, "options": {}},
            out_channels=3,
            labels={str(k): v for k, v in (labels or LABELS).items()},
            spacing_mm=spacing_mm,
            window={},
            crop=crop,
            swap=swap,
            sha256=sha256,
            **card_values,
        )
        loaded = LoadedSegmenter(network, spacing_mm, window, crop, labels or LABELS, card)
        monkeypatch.setattr("spark3d.commands.predict.load_segmenter", lambda path: loaded)
        return network

    return load
