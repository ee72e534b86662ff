"""Shared set-up of the tests: seeds, hypothesis profiles, the folder of real volumes."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=300)
os.environ.setdefault("SPARK3D_ID_KEY", "tests")  # else one is made in the user's own folder
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes, or a skip that says how to get it."""
    folder = os.environ.get("SPARK3D_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set SPARK3D_DATA to the folder of real volumes to run this test")
    return Path(folder)
