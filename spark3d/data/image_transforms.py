"""timm's image transforms, made a pure function of the generator that is handed in.

timm and torchvision draw from the global generators of Python, numpy and torch. `drawn_from` seeds
all three for the time of one sample and puts them back, so that a sample stays a function of
(seed, number), whichever process makes it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, TrivialAugmentWide

from spark3d.errors import ConfigError

Transform = Callable[[Image.Image], Tensor]


@contextmanager
def drawn_from(rng: np.random.Generator) -> Iterator[None]:
    """Let the global generators draw from a seed of `rng`, then go on as if nothing had been."""
    seed = int(rng.integers(2**32))
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm draws from it)
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@dataclass(frozen=True)
class ImageChanges:
    """Random changes of a training image.

    Attributes:
        scale: Smallest and largest share of the image's area to cut.
        flip: Probability of a mirror image.
        policy: "none", "trivial" (TrivialAugment) or a policy of timm, such as "rand-m9-mstd0.5".
        erase: Probability that a rectangle of the crop is replaced by noise.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    policy: str = "trivial"
    erase: float = 0.25


def training_transform(size: tuple[int, int], changes: ImageChanges) -> Transform:
    """Random resized crop, mirror image, policy, normalisation, erasing; bicubic.

    Raises:
        ConfigError: an impossible range, or a policy that timm does not know.
    """
    low, high = changes.scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"augment.scale={changes.scale} must be two rising shares in (0, 1]")
    own = changes.policy in ("none", "trivial")
    try:
        parts: Any = transforms_imagenet_train(
            size,
            scale=changes.scale,
            hflip=changes.flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=None if own else changes.policy,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            re_prob=changes.erase,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augment.policy={changes.policy!r} is none of timm's ({error}); use none, trivial or "
            "e.g. rand-m9-mstd0.5"
        ) from None
    cut, change, finish = parts
    if changes.policy == "trivial":
        change = TrivialAugmentWide(interpolation=InterpolationMode.BICUBIC)
    return Compose([cut, change, finish])


def evaluation_transform(size: tuple[int, int], share: float) -> Transform:
    """Resize the shorter side, cut the middle, normalise; bicubic.

    Args:
        size: Rows and columns of the crop.
        share: Of the resized image's side that the crop keeps.
    """
    return transforms_imagenet_eval(size, crop_pct=share, interpolation="bicubic")
