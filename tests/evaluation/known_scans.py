"""Small CT-like files in odd axis orders, and a segmenter whose right answer is known."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

LABELS = {1: "ball", 2: "body"}


class ByIntensity(nn.Module):
    """Body above 250 HU, ball above 750 HU, in the window 0..1000; counts the windows it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += x.shape[0]
        body = 16 * (x - 0.25)
        return torch.cat([torch.zeros_like(x), body + 16 * (x - 0.75), body], 1)


def odd_affine() -> np.ndarray:
    """Axes in the order superior, left, posterior, turned by 10 degrees, 1 x 2 x 1.5 mm."""
    axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]], float)
    angle = np.deg2rad(10)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag([1.0, 2.0, 1.5])
    affine[:3, 3] = (-20, 13, 7)
    return affine


def ball(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A body with a ball somewhere in it, in HU, and the label map of both."""
    rng = np.random.default_rng(seed)
    size = (40, 26, 32)
    i, j, k = np.ogrid[tuple(slice(n) for n in size)]
    body = ((i - 20) / 18) ** 2 + ((j - 13) * 2 / 22) ** 2 + ((k - 16) * 1.5 / 20) ** 2 < 1
    at = rng.integers((15, 8, 12), (26, 19, 21))
    inside = (i - at[0]) ** 2 + (2 * (j - at[1])) ** 2 + (1.5 * (k - at[2])) ** 2 < 8**2
    image = np.full(size, -1000, np.int16)
    image[body], image[inside] = 500, 1000
    labels = np.zeros(size, np.uint8)
    labels[body], labels[inside] = 2, 1
    return image, labels


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path
