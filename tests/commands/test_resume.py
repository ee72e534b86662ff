"""Runs that are killed, stopped or damaged end bit for bit like those that are not."""

import json
import logging
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import FINETUNE, PRETRAIN
from lightning_fabric import Fabric
from processes import curve, end, start, wait_for_step

from spark3d.commands import finetune as finetune_module
from spark3d.commands import pretrain as pretrain_module
from spark3d.commands.finetune import Finetuned, finetune_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.data.store import Store
from spark3d.engine.checkpoint import Checkpoints
from spark3d.errors import ConfigError, Interrupted

LOADING = ("compute.workers=0", "compute.workers=2")


def stopped(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: int, call: Callable[[], object]
) -> None:
    """Run `call` and send this process SIGTERM in the midst of a step of the loop in `module`.

    The ranks meet between the last checkpoint and the end.
    """
    take, save, meet = module.take_step, Checkpoints.save_parts, Fabric.barrier
    taken = iter(range(1, 1000))
    events: list[str] = []

    def noted(name: str, action: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (events.append(name), action(*given))[1]

    def stopping(*args: object) -> object:
        if next(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "take_step", stopping)
        patch.setattr(Checkpoints, "save_parts", noted("saved", save))
        patch.setattr(Fabric, "barrier", noted("met", meet))
        with pytest.raises(Interrupted, match=f"after step {step}"):
            call()
    assert events[-2:] == ["saved", "met"]


def checkpoint_steps(run: Path) -> list[int]:
    return [int(file.stem.removeprefix("step_")) for file in sorted(run.glob("checkpoints/*.pt"))]


def assert_same_pretraining(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    weights = [(folder / "encoder.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


def assert_same_finetuning(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]
    assert (
        json.loads((run / "run.json").read_text())["result"]
        == (json.loads((whole / "run.json").read_text())["result"])
    )


@pytest.mark.parametrize("loading", LOADING)
def test_pretraining_killed_and_started_again_is_the_uninterrupted_one(
    store: Path, pretrained: Path, tmp_path: Path, loading: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(["pretrain", *PRETRAIN, loading, "--data", store, "--out", run], log)
    wait_for_step(process, run, 3, log)
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert 3 <= len(curve(run)) < len(curve(pretrained))
    assert not (run / "encoder.safetensors").exists()

    pretrain_command(store, run, None, (*PRETRAIN, loading))
    assert_same_pretraining(run, pretrained)
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.parametrize("loading", LOADING)
def test_finetuning_killed_and_started_again_is_the_uninterrupted_one(
    store: Path, pretrained: Path, finetuned: Path, tmp_path: Path, loading: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["finetune", *FINETUNE, loading, "--data", store, "--encoder", pretrained, "--out", run]
    process = start(words, log)
    wait_for_step(process, run, 3, log)
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()

    finetune_command(store, run, pretrained, None, (*FINETUNE, loading))
    assert_same_finetuning(run, finetuned)


def test_sigterm_ends_with_75_and_a_checkpoint_of_the_last_step(
    store: Path, pretrained: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    rare = "compute.checkpoint_every=1000"
    process = start(["pretrain", *PRETRAIN, rare, "--data", store, "--out", run], log)
    wait_for_step(process, run, 2, log)
    process.terminate()
    assert end(process) == 75
    done = curve(run)[-1][0]
    assert checkpoint_steps(run) == [done]
    assert done < len(curve(pretrained))
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert errors == [f"error: stopped after step {done}; the same command goes on from there"]

    pretrain_command(store, run, None, (*PRETRAIN, rare))
    assert_same_pretraining(run, pretrained)


def test_a_stop_is_obeyed_within_the_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = (*PRETRAIN, "compute.checkpoint_every=1000")
    stopped(monkeypatch, pretrain_module, 3, lambda: pretrain_command(store, tmp_path, None, rare))
    assert checkpoint_steps(tmp_path) == [3]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_after_a_damaged_checkpoint_the_one_before_leads_to_the_same_end(
    store: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    stopped(
        monkeypatch, pretrain_module, 5, lambda: pretrain_command(store, tmp_path, None, PRETRAIN)
    )
    assert checkpoint_steps(tmp_path) == [4, 5]
    newest = tmp_path / "checkpoints" / "step_00000005.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flip" else content[: len(content) // 2])

    with caplog.at_level(logging.INFO):
        pretrain_command(store, tmp_path, None, PRETRAIN)
    assert "step_00000005.pt is damaged" in caplog.text
    assert caplog.text.count("after step 4\n") == 1
    assert_same_pretraining(tmp_path, pretrained)


def test_a_stopped_finetuning_goes_on_with_its_validation(
    store: Path,
    pretrained: Path,
    finetuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    often = (*FINETUNE, "log.validate_every=2")

    def run() -> None:
        finetune_command(store, tmp_path, pretrained, None, often)

    def seconds() -> float:
        return json.loads((tmp_path / "run.json").read_text())["seconds"]

    stopped(monkeypatch, finetune_module, 3, run)
    first = seconds()
    record = json.loads((tmp_path / "run.json").read_text())
    record["seconds"] = 1000.0  # as after a longer stretch
    (tmp_path / "run.json").write_text(json.dumps(record))
    run()
    assert_same_finetuning(tmp_path, finetuned)
    assert first > 0
    assert seconds() > 1000


def repeated_pretraining(store: Path, run: Path, pretrained: Path) -> None:
    pretrain_command(store, run, None, PRETRAIN)


def repeated_finetuning(store: Path, run: Path, pretrained: Path) -> None:
    finetune_command(store, run, pretrained, None, FINETUNE)


def test_corrected_data_are_another_run(
    store: Path,
    pretrained: Path,
    finetuned: Path,
    tmp_path: Path,
    copied: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after preparing corrected labels into the same store; a run that noted none goes on."""
    run = copied(finetuned, tmp_path / "run")
    real = Store.voxel_hash
    corrected = {"case0": "another"}
    monkeypatch.setattr(Store, "voxel_hash", lambda s, case: corrected.get(case) or real(s, case))
    with pytest.raises(ConfigError, match="stored voxels or labels of its cases changed"):
        repeated_finetuning(store, run, pretrained)
    record = json.loads((run / "run.json").read_text())
    del record["inputs"]["data"]
    (run / "run.json").write_text(json.dumps(record))
    repeated_finetuning(store, run, pretrained)


@pytest.mark.parametrize(
    ("repeat", "kind", "weights"),
    [
        (repeated_pretraining, "pretrained", "encoder.safetensors"),
        (repeated_finetuning, "finetuned", "model.safetensors"),
    ],
)
def test_a_finished_run_is_left_alone_and_lost_weights_are_written_again(
    request: pytest.FixtureRequest,
    store: Path,
    pretrained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    copied: Callable[[Path, Path], Path],
    repeat: Callable[[Path, Path, Path], None],
    kind: str,
    weights: str,
) -> None:
    run = copied(request.getfixturevalue(kind), tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with caplog.at_level(logging.INFO):
        repeat(store, run, pretrained)
    assert "finished already" in caplog.text
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    (run / weights).write_bytes(b"damaged")
    repeat(store, run, pretrained)
    assert "writing it again" in caplog.text
    assert (run / weights).read_bytes() == before[run / weights]
    result = json.loads((run / "run.json").read_text())["result"]
    assert result == json.loads(before[run / "run.json"])["result"]


def test_a_finished_finetuning_returns_its_scores_again(
    store: Path, pretrained: Path, tuned: Finetuned
) -> None:
    again = finetune_command(store, tuned.model.parent, pretrained, None, FINETUNE)
    assert again.model == tuned.model
    assert repr(again.validation) == repr(tuned.validation)  # NaN equals NaN in print


@pytest.mark.slow
@pytest.mark.parametrize("loading", LOADING)
def test_twenty_kills_at_random_leave_no_trace(store: Path, tmp_path: Path, loading: str) -> None:
    long = (*PRETRAIN, "optim.steps=60", "compute.checkpoint_every=1", loading)
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    pretrain_command(store, whole, None, long)
    rng, kills = random.Random(0), 0
    while kills < 20:
        known = checkpoint_steps(run)
        process = start(["pretrain", *long, "--data", store, "--out", run], log)
        wait_for_step(process, run, (known[-1] if known else 0) + 1, log)
        process.join(rng.uniform(0, 0.05))
        if not process.is_alive():
            break
        process.kill()
        assert end(process) == -signal.SIGKILL
        kills += 1
    assert kills >= 10
    pretrain_command(store, run, None, long)
    assert_same_pretraining(run, whole)
