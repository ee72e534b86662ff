"""The rule that fills weights and inputs of the golden runs (numpy only), and role names of ours.

Values come from running the official SparK code (commit a63e386) with tensors filled by this rule.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def load(name: str) -> tuple[dict, dict]:
    """Numbers (JSON) and arrays (npz) of one golden run."""
    numbers = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return numbers, {key: arrays[key] for key in arrays.files}


def fill(role: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the tensor called `role`, in float32 (the counter in int64)."""
    if role.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    seed = zlib.crc32(role.encode())
    z = np.random.RandomState(seed).standard_normal(tuple(shape))
    if role.endswith("running_mean"):
        z = 0.1 * z
    elif role.endswith("running_var"):
        z = 1 + 0.2 * np.abs(z)
    elif role.endswith("gamma"):
        z = 0.5 + 0.1 * z
    elif role.endswith("token"):
        z = 0.5 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif role.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return z.astype(np.float32)


def make_input(size: int) -> np.ndarray:
    """Two RGB images with detail and blocks, `(2, 3, size, size)`."""
    draw = np.random.RandomState(1234 + size)
    fine = draw.standard_normal((2, 3, size, size))
    coarse = draw.standard_normal((2, 3, size // 8, size // 8))
    return (0.5 * fine + coarse.repeat(8, 2).repeat(8, 3)).astype(np.float32)


def make_visible(size: int, unit: int = 32, ratio: float = 0.6) -> np.ndarray:
    """Visible cells of both images, `(2, grid, grid)`."""
    side = size // unit
    keep = round(side * side * (1 - ratio))
    draw = np.random.RandomState(99 + size).rand(2, side * side)
    visible = np.zeros((2, side * side), bool)
    np.put_along_axis(visible, draw.argsort(axis=1)[:, :keep], True, axis=1)
    return visible.reshape(2, side, side)


def role_of(key: str, stages: int = 4) -> str:
    """The golden name of a state-dict key of `SparK`; empty for tensors official SparK lacks."""
    if key.startswith("encoder.network.head."):
        return ""
    key = re.sub(r"^encoder\.network\.", "encoder.", key)
    key = re.sub(r"^decoder\.blocks\.(\d)", r"decoder.block\1", key)
    return re.sub(r"^densify\.stages\.(\d)", lambda m: f"densify.{stages - 1 - int(m[1])}", key)


def stats(values: np.ndarray) -> dict:
    """The summary that the golden files hold of every large array."""
    v = values.astype(np.float64)
    flat = v.ravel()
    return {
        "shape": list(v.shape),
        "mean": v.mean(),
        "std": v.std(),
        "absmax": np.abs(v).max(),
        "l2": np.sqrt((v**2).sum()),
        "wsum": (flat * np.cos(0.1 * np.arange(flat.size))).sum(),
    }
