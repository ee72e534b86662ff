"""Keys of `compute` and `log` change where, how fast and what is written, never a result."""

from pathlib import Path

from conftest import FINETUNE, PRETRAIN
from processes import curve

from spark3d.commands.finetune import finetune_command
from spark3d.commands.pretrain import pretrain_command

OTHERS = (
    "compute.workers=1",
    "compute.cache=false",
    "compute.checkpoint_every=3",
    "compute.keep_checkpoints=3",
    "compute.max_bad_losses=1",
    "log.every=2",
    "log.panels_every=1",
    "log.tensorboard=true",
    "log.validate_every=3",
)


def test_pretraining(store: Path, pretrained: Path, tmp_path: Path) -> None:
    pretrain_command(store, tmp_path, None, (*PRETRAIN, *OTHERS))
    assert curve(tmp_path) == [line for line in curve(pretrained) if line[0] % 2 == 0]
    weights = [(run / "encoder.safetensors").read_bytes() for run in (tmp_path, pretrained)]
    assert weights[0] == weights[1]
    assert len(list((tmp_path / "panels").iterdir())) == 10
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_finetuning(store: Path, pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    finetune_command(store, tmp_path, pretrained, None, (*FINETUNE, *OTHERS))
    assert curve(tmp_path) == [line for line in curve(finetuned) if line[0] % 2 == 0]
    weights = [(run / "model.safetensors").read_bytes() for run in (tmp_path, finetuned)]
    assert weights[0] == weights[1]


def test_a_run_may_go_on_with_other_neutral_keys(
    store: Path, pretrained: Path, tmp_path: Path
) -> None:
    pretrain_command(store, tmp_path, None, PRETRAIN)
    (tmp_path / "encoder.safetensors").unlink()
    pretrain_command(store, tmp_path, None, (*PRETRAIN, *OTHERS))
    assert (tmp_path / "encoder.safetensors").is_file()
