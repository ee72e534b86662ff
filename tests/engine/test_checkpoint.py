"""Checkpoints are whole or absent, verified when read, and fall back aloud."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spark3d.engine.checkpoint import Checkpoints, write_atomically
from spark3d.errors import DataError, EnvironmentProblem


def saved(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=2)
    for step in steps:
        checkpoints.save(step, {"weights": torch.full((100,), float(step))})
    return checkpoints


def test_the_newest_comes_back_and_only_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    state = checkpoints.latest()
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.full((100,), 3.0))
    assert [f.name for f in checkpoints.files()] == ["step_00000002.pt", "step_00000003.pt"]
    assert not list(tmp_path.glob(".*tmp"))


def test_a_run_without_checkpoints_starts_from_nothing(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "record"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path)
    path = tmp_path / "step_00000003.pt"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"truncate": content[:50], "empty": b""}.get(damage, bytes(content)))
    if damage == "record":
        path.with_suffix(".json").write_text("{")
    with caplog.at_level(logging.WARNING):
        state = checkpoints.latest()
    assert state is not None
    assert state["step"] == 2
    assert "step_00000003.pt is damaged" in caplog.text


def test_if_all_are_damaged_nothing_is_made_up(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    for path in checkpoints.files():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="every checkpoint"):
        checkpoints.latest()


def test_a_hostile_pickle_is_refused_even_with_a_matching_hash(tmp_path: Path) -> None:
    import hashlib
    import json
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "step_00000001.pt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    mark = {"step": 1, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(mark))
    with pytest.raises(pickle.UnpicklingError):
        Checkpoints(tmp_path).latest()
    assert not (tmp_path / "owned").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        write_atomically(target, b"new")
    good = tmp_path / "file"
    write_atomically(good, b"old")
    write_atomically(good, b"new")
    assert good.read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_parts_of_a_training_go_on_where_they_were(tmp_path: Path) -> None:
    """Modules and optimisers: the update after a resume is the one that was not taken."""

    def parts() -> dict[str, nn.Linear | torch.optim.AdamW]:
        network = nn.Linear(3, 1)
        return {"network": network, "optimizer": torch.optim.AdamW(network.parameters(), 0.1)}

    def update(part: dict[str, Any]) -> torch.Tensor:
        part["optimizer"].zero_grad()
        part["network"](torch.ones(1, 3)).sum().backward()
        part["optimizer"].step()
        return part["network"].weight.detach().clone()

    checkpoints = Checkpoints(tmp_path)
    first = parts()
    assert checkpoints.resume(first) == 0
    update(first)
    checkpoints.save_parts(7, first)
    onwards = update(first)
    again = parts()
    assert checkpoints.resume(again) == 7
    assert torch.equal(update(again), onwards)
