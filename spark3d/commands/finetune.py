"""`spark3d finetune`: labelled crops and encoder weights in, a segmentation network out."""

import logging
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from spark3d import build
from spark3d.commands.labelled import FinetuneInputs, finetune_inputs
from spark3d.commands.runs import claim_run, finish_run, finished, open_run
from spark3d.commands.stores import fixed
from spark3d.config import FinetuneRecipe, find_recipe, load_recipe
from spark3d.engine.checkpoint import Checkpoints
from spark3d.engine.logging import RunLog, Stopwatch, finite_or_none, set_up_logging, step_progress
from spark3d.engine.loop import BadLossGuard, rehearse, seed_step, stop_on_signal, take_step
from spark3d.engine.optim import set_step
from spark3d.errors import DataError, Interrupted
from spark3d.evaluation.metrics import dice_per_label
from spark3d.evaluation.windows import WindowPlan, predict_labels
from spark3d.weights.exchange import LoadReport
from spark3d.weights.segmenters import load_model, save_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuned:
    """Where the model lies and its mean Dice per validation case and label (store grid)."""

    model: Path
    validation: dict[str, dict[int, float]]


def finetune_command(
    data: Path,
    out: Path,
    encoder: Path | None = None,
    recipe: str | None = None,
    overrides: tuple[str, ...] = (),
    allow_overlap: bool = False,
) -> Finetuned:
    """Fine-tune a segmentation network, from encoder weights or from scratch; resume its run.

    Args:
        data: a prepared store or a folder of labelled volumes (prepared into `out/store`).
        out: run folder.
        encoder: `encoder.safetensors` of a pre-training or its folder; None: from scratch.
        recipe: name of a shipped recipe or a YAML file.
        overrides: `section.key=value`.
        allow_overlap: go on although held-out volumes were seen in training or pre-training; the
            run's record and the report say so.
    """
    path = find_recipe(recipe or "segresnet_3d", "finetune")
    asked = load_recipe(FinetuneRecipe, path, overrides)
    fabric = build.fabric(asked.compute, asked.optim.precision)
    set_up_logging(fabric.global_rank)
    with claim_run(out, "finetune", fabric):
        inputs = finetune_inputs(asked, data, out, encoder, fabric, allow_overlap)
        for line in inputs.notes:
            log.info("  %s", line)
        torch.manual_seed(inputs.recipe.seed)
        network, report = build.segmenter(
            inputs.recipe, inputs.classes, inputs.weights, inputs.first_crops
        )
        if report is not None:
            log.info("%s", report)
        crops = torch.zeros(2, inputs.recipe.model.in_channels, *inputs.crop)
        rehearse(network, lambda: network(crops), inputs.recipe.model.backbone)
        open_run(out, "finetune", inputs.recipe, inputs.identity(), data, fabric)
        if (done := finished_earlier(out)) is not None:
            log.info("finished already: %s", done.model)
            return done
        return run_finetuning(fabric, network, report, inputs, out)


def finished_earlier(out: Path) -> Finetuned | None:
    """What the same command returned when it came to its end, if its model is still whole."""
    result = finished(out)
    if result is None:
        return None
    target = out / "model.safetensors"
    try:
        load_model(target)
    except DataError as problem:
        log.warning("%s; writing it again", problem)
        return None
    scores = result["validation"]
    return Finetuned(
        target,
        {
            case: {int(k): math.nan if v is None else v for k, v in row.items()}
            for case, row in scores.items()
        },
    )


def run_finetuning(
    fabric: Fabric,
    network: nn.Module,
    report: LoadReport | None,
    inputs: FinetuneInputs,
    out: Path,
) -> Finetuned:
    """The loop, from the last checkpoint (or the start) to the saved model and its validation."""
    recipe, optim = inputs.recipe, inputs.recipe.optim
    loss = build.segmentation_loss(recipe.loss, inputs.classes).to(fabric.device)
    pretrained = build.encoder_parameters(network, report)
    module, optimizer = build.set_up(fabric, network, optim, pretrained)

    checkpoints = Checkpoints(out / "checkpoints", recipe.compute.keep_checkpoints)
    done = 0
    if state := checkpoints.latest():
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        log.info("resuming %s after step %d of %d", out, done, optim.steps)
    steps = inputs.batches(done, fabric.global_rank, fabric.world_size)
    run_log = RunLog(out, done, recipe.log.tensorboard, fabric.is_global_zero)
    guard = BadLossGuard(recipe.compute.max_bad_losses)
    clock, total = Stopwatch(), Stopwatch()
    validation: dict[str, dict[int, float]] = {}

    def save(step: int) -> None:
        if fabric.is_global_zero:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(step, state)

    with (
        closing(run_log),
        stop_on_signal() as asked_to_stop,
        step_progress("fine-tuning", optim.steps, done, fabric.is_global_zero) as bar,
    ):
        for step, batch in enumerate(steps, start=done + 1):
            seed_step(recipe.seed, step, fabric.global_rank)
            crops = batch["crop"].to(fabric.device, non_blocking=True)
            labels = batch["label"].to(fabric.device, non_blocking=True)
            lr, decay = build.step_settings(optim, step - 1)
            set_step(optimizer, lr, decay)

            def losses(
                crops: torch.Tensor = crops, labels: torch.Tensor = labels
            ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                return loss(module(crops), labels), {}

            result = take_step(fabric, optimizer, module, losses, optim.clip)

            numbers = batch["number"].tolist()
            if result.skipped:
                log.warning("step %d skipped: loss %s on samples %s", step, result.loss, numbers)
            guard.check(result, step, numbers)
            if step % recipe.log.every == 0:
                values = {
                    "loss": finite_or_none(result.loss),
                    "lr": lr,
                    "grad_norm": finite_or_none(result.grad_norm),
                    "skipped": result.skipped,
                    "seconds": round(clock.lap(), 4),
                }
                run_log.write("train", step, values)
            last, stop = step == optim.steps, asked_to_stop.on_any_rank(fabric)
            every = recipe.log.validate_every
            if last or (every and step % every == 0):
                validation = validate(network, inputs, fabric)
                run_log.write("val", step, summary(validation, inputs.labels))
                clock.lap()
            if (step % recipe.compute.checkpoint_every == 0 and not result.skipped) or last or stop:
                save(step)
            bar.advance(f"loss {result.loss:.4f}")
            if stop and not last:
                raise Interrupted(f"stopped after step {step}; the same command goes on from there")

    if done == optim.steps:  # killed between the last checkpoint and the end
        validation = validate(network, inputs, fabric)
    target = out / "model.safetensors"
    if fabric.is_global_zero:
        save_model(target, network.state_dict(), inputs.card())
        scores = {
            case: {label: finite_or_none(dice) for label, dice in row.items()}
            for case, row in validation.items()
        }
        headline = summary(validation, inputs.labels)
        finish_run(out, total.lap(), headline, {"model": target.name, "validation": scores})
        log.info("model: %s", target)
    fabric.barrier()
    return Finetuned(target, validation)


def validate(
    network: nn.Module, inputs: FinetuneInputs, fabric: Fabric
) -> dict[str, dict[int, float]]:
    """Dice per validation case and label on the store's grid, by sliding windows."""
    recipe = inputs.recipe
    plan = WindowPlan(
        window=inputs.crop,
        overlap=recipe.window_overlap,
        batch=4,
        empty_below=0.0 if fixed(recipe.data.window).mode == "unit" else None,
        amp_dtype=torch.bfloat16 if recipe.optim.precision == "bf16-mixed" else None,
    )
    scores = {}
    for case in inputs.validation:
        volume, reference = inputs.whole(case)
        predicted = predict_labels(network, volume, plan)
        scores[case] = dice_per_label(predicted.numpy(), reference, sorted(inputs.labels))
    return scores


def summary(scores: dict[str, dict[int, float]], labels: dict[int, str]) -> dict[str, float | None]:
    """Mean Dice over cases, of each label and of all; labels absent in a case do not count."""
    if not scores:
        return {}
    table = np.array([[scores[case][label] for label in labels] for case in scores])
    means = {}
    for column, name in zip(table.T, labels.values(), strict=True):
        present = column[~np.isnan(column)]
        means[f"dice {name}"] = float(present.mean()) if present.size else None
    known = [value for value in means.values() if value is not None]
    return {"dice": float(np.mean(known)) if known else None, **means}
