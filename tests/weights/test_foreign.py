"""Other programs' checkpoints: tensors and nothing else, wherever they stand in the file."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spark3d.errors import ConfigError, DataError
from spark3d.weights.foreign import plain_keys, read_foreign

STATE = {"conv1.weight": torch.ones(2, 1, 3, 3), "bn1.bias": torch.zeros(2)}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (STATE, ""),
        ({"model": STATE}, "model"),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1.0), "epoch": 3}, "state_dict"),
        ({"module": {**STATE, "config": {"sbn": True}}, "optimizer": {"state": {}}}, "module"),
        ({"weights": STATE}, "weights"),
    ],
)
def test_weights_are_found_wherever_trainers_put_them(
    content: dict, entry: str, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.pth"
    torch.save(content, file)
    found = read_foreign(file)
    assert found.entry == entry
    assert found.state.keys() == STATE.keys()
    assert torch.equal(found.state["conv1.weight"], STATE["conv1.weight"])
    assert found.ignored == (("config",) if entry == "module" else ())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "theirs.safetensors")
    assert read_foreign(tmp_path / "theirs.safetensors").state.keys() == STATE.keys()


def test_averaged_weights_come_first_and_others_can_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "theirs.pth"
    other = {key: value + 1 for key, value in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": other}, file)
    averaged, plain = read_foreign(file), read_foreign(file, "state_dict")
    assert (averaged.entry, averaged.others) == ("state_dict_ema", ("state_dict",))
    assert torch.equal(averaged.state["bn1.bias"], other["bn1.bias"])
    assert torch.equal(plain.state["bn1.bias"], STATE["bn1.bias"])
    with pytest.raises(ConfigError, match="entries with weights: state_dict, state_dict_ema"):
        read_foreign(file, "teacher")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    """Refused by name; nothing else is tried."""
    file, mark = tmp_path / "theirs.pth", tmp_path / "run"
    content = {"state_dict": STATE, "more": Evil(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"asks for posix.system, .* refused"):
        read_foreign(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no checkpoint"),
        (b"<html>not found</html>", "theirs.pth"),
        (b"PK\x03\x04 cut off", "is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    content: bytes, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.pth"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_foreign(file)
    assert "\n" not in str(caught.value)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "theirs.pth"
    torch.save({"epoch": 3, "loss": 0.1}, file)
    with pytest.raises(DataError, match="its entries are epoch, loss"):
        read_foreign(file)
    torch.save(torch.zeros(3), file)
    with pytest.raises(DataError, match="holds a Tensor"):
        read_foreign(file)
    with pytest.raises(DataError, match="is no file"):
        read_foreign(tmp_path / "gone.pth")
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    with pytest.raises(DataError, match="is no checkpoint"):
        read_foreign(tmp_path / "a.safetensors")


def test_prefixes_of_wrappers_go_unless_the_network_has_them() -> None:
    wrapped = {f"module._orig_mod.{key}": value for key, value in STATE.items()}
    assert plain_keys(wrapped, STATE).keys() == STATE.keys()
    mixed = {**wrapped, "head.weight": torch.zeros(1)}
    assert plain_keys(mixed, STATE).keys() == mixed.keys()
    own = {f"encoder.{key}": value for key, value in STATE.items()}
    assert plain_keys(own, own).keys() == own.keys()
    assert plain_keys(own, STATE).keys() == STATE.keys()
