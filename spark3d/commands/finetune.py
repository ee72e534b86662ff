"""`spark3d finetune`: labelled crops and encoder weights in, a segmentation network out."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from spark3d import build, build_finetuning
from spark3d.commands.labelled import FinetuneInputs, finetune_inputs
from spark3d.commands.runs import RunTime, claim_run, finish_run, finished, open_run
from spark3d.commands.stores import existing_folder, is_store
from spark3d.config import FinetuneRecipe, find_recipe, resolve
from spark3d.data.sources import find
from spark3d.data.splits import few_labels, named_split
from spark3d.data.store import Store
from spark3d.data.stream import Sample
from spark3d.engine.averaging import Average
from spark3d.engine.checkpoint import Checkpoints, write_atomically
from spark3d.engine.logging import (
    RunLog,
    Stopwatch,
    Waited,
    finite_or_none,
    set_up_logging,
)
from spark3d.engine.loop import (
    BadLossGuard,
    Losses,
    rehearse,
    seed_step,
    step_values,
    stop_on_signal,
    take_step,
)
from spark3d.engine.optim import set_step
from spark3d.engine.progress import step_progress
from spark3d.errors import ConfigError, DataError, Interrupted
from spark3d.evaluation.metrics import dice_per_label
from spark3d.evaluation.windows import WindowPlan, predict_labels
from spark3d.protocols import SMOKE_NOTE, own_recipe, read_protocol
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
    protocol: str | None = None,
    smoke: bool = False,
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
        protocol: name of a frozen protocol, in place of a recipe.
        smoke: shorten the protocol to a few steps on coarse data; marked everywhere as no result.
    """
    asked = build.settled(asked_recipe(recipe, protocol, overrides, smoke, data))
    fabric = build.fabric(asked.compute, asked.optim.precision)
    set_up_logging(fabric.global_rank)
    build.warn_of_slow_precision(fabric, asked.optim.precision)
    with claim_run(out, "finetune", fabric):
        inputs = finetune_inputs(asked, data, out, encoder, fabric, allow_overlap)
        if protocol is not None:
            read_protocol(protocol).check_labels(inputs.labels)
        for line in inputs.notes:
            log.info("  %s", line)
        torch.manual_seed(inputs.recipe.seed)
        segmenter = build_finetuning.segmenter(
            inputs.recipe, inputs.classes, inputs.weights, inputs.first_crops
        )
        if segmenter.report is not None:
            log.info("%s", segmenter.report)
        network = segmenter.network
        crops = torch.zeros(2, inputs.recipe.model.in_channels, *inputs.crop)
        rehearse(network, lambda: network(crops), inputs.recipe.model.backbone)
        open_run(out, "finetune", inputs.recipe, inputs.identity(), data, fabric)
        if smoke and fabric.is_global_zero:
            write_atomically(out / "SMOKE.txt", f"{protocol}: {SMOKE_NOTE}\n".encode())
        if (done := finished_earlier(out)) is not None:
            log.info("finished already: %s", done.model)
            return done
        return run_finetuning(fabric, segmenter, inputs, out)


def asked_recipe(
    recipe: str | None, protocol: str | None, overrides: tuple[str, ...], smoke: bool, data: Path
) -> FinetuneRecipe:
    """The recipe as asked for, by name or by protocol, whose data must be there.

    Raises:
        ConfigError: no such recipe or protocol, both, or an override that the protocol refuses.
        DataError: cases that the protocol needs are missing.
    """
    if protocol is None:
        if smoke:
            raise ConfigError("--smoke shortens a protocol; give --protocol NAME with it")
        return own_recipe(find_recipe(recipe or usual_recipe(overrides), "finetune"), overrides)
    if recipe is not None:
        raise ConfigError(f"give either the recipe {recipe} or --protocol {protocol}, not both")
    chosen = read_protocol(protocol)
    asked = chosen.recipe(overrides, smoke)
    existing_folder(data, "give a prepared store or a folder of volumes")
    named = named_split(asked.split.name) if asked.split.use == "named" else None
    ids = (*named.train, *named.validation) if named else ()
    if named and asked.split.labels is not None:
        few_labels(named.train, asked.split.labels)  # refuses too many before data are prepared
    if is_store(data):
        store = Store.open(data)
        chosen.check_cases({r.id: r.section for r in store.cases if r.has_label}, ids, data)
        return resolve(asked, {"data.spacing_mm": store.spacing_mm}) if smoke else asked
    found = find(data).cases
    chosen.check_cases({c.id: c.section for c in found if c.label is not None}, ids, data)
    return asked


def usual_recipe(overrides: Sequence[str]) -> str:
    """The name of the recipe for volumes, or for their slices."""
    return "segresnet_2d" if "dims=2" in overrides else "segresnet_3d"


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
    segmenter: build_finetuning.Segmenter,
    inputs: FinetuneInputs,
    out: Path,
) -> Finetuned:
    """The loop, from the last checkpoint (or the start) to the saved model and its validation."""
    recipe, optim, network = inputs.recipe, inputs.recipe.optim, segmenter.network
    loss = build.segmentation_loss(recipe.loss, inputs.classes, recipe.model.deep_supervision)
    loss = loss.to(fabric.device)
    module, optimizer = build_finetuning.set_up(fabric, segmenter, optim)
    average = Average(network, optim.ema, warmup=True) if optim.ema else None
    result_network = average.network if average else network

    checkpoints = Checkpoints(out / "checkpoints", recipe.compute.keep_checkpoints)
    parts = {"network": network, "optimizer": optimizer}
    if average:
        parts["average"] = average.network
    done = checkpoints.resume(parts)
    steps = Waited(inputs.batches(done, fabric.global_rank, fabric.world_size))
    run_log = RunLog(out, done, recipe.log.tensorboard, fabric.is_global_zero)
    guard = BadLossGuard(recipe.compute.max_bad_losses)
    clock, total = Stopwatch(), RunTime(out)
    validation: dict[str, dict[int, float]] = {}

    with (
        closing(run_log),
        stop_on_signal() as asked_to_stop,
        step_progress("fine-tuning", optim.steps, done, fabric.is_global_zero) as bar,
    ):
        for step, batch in enumerate(steps, start=done + 1):
            seed_step(recipe.seed, step, fabric.global_rank)
            lr, decay = build.step_settings(optim, step - 1)
            frozen = step <= optim.freeze_steps
            set_step(optimizer, lr, decay, frozen)
            segmenter.ready(frozen)

            micro = shares(batch, optim.accumulate, lambda c, t: loss(module(c), t), fabric)
            result = take_step(fabric, optimizer, module, micro, optim.clip)

            if average and not result.skipped:
                average.update(network, step)
            numbers = batch["number"].tolist()
            guard.check(result, step, numbers)
            if step % recipe.log.every == 0:
                run_log.write("train", step, step_values(result, lr, clock, steps))
            last, stop = step == optim.steps, asked_to_stop.on_any_rank(fabric)
            every = recipe.log.validate_every
            if last or (every and step % every == 0):
                validation = validate(result_network, inputs, fabric)
                run_log.write("val", step, summary(validation, inputs.scored))
                clock.lap()
            regular = step % recipe.compute.checkpoint_every == 0 and not result.skipped
            if fabric.is_global_zero and (regular or last or stop):
                checkpoints.save_parts(step, parts)
                total.note()
            bar.advance(f"loss {result.loss:.4f}")
            if stop and not last:
                fabric.barrier()  # no rank leaves while the first still writes
                raise Interrupted(f"stopped after step {step}; the same command goes on from there")

    if done == optim.steps:  # killed between the last checkpoint and the end
        validation = validate(result_network, inputs, fabric)
    target = out / "model.safetensors"
    if fabric.is_global_zero:
        save_model(target, result_network.state_dict(), inputs.card())
        scores = {
            case: {label: finite_or_none(dice) for label, dice in row.items()}
            for case, row in validation.items()
        }
        headline: dict[str, Any] = summary(validation, inputs.scored)
        if recipe.protocol is not None and recipe.protocol.smoke:
            headline = {"smoke": SMOKE_NOTE, **headline}
        finish_run(out, total.seconds, headline, {"model": target.name, "validation": scores})
        log.info("model: %s", target)
    fabric.barrier()
    return Finetuned(target, validation)


def shares(
    batch: Sample,
    count: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    fabric: Fabric,
) -> list[Losses]:
    """The loss of each of `count` equal shares of a batch, as `take_step` wants them."""

    def one(crops: torch.Tensor, labels: torch.Tensor) -> Losses:
        def forward() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            there = [t.to(fabric.device, non_blocking=True) for t in (crops, labels)]
            return loss(*there), {}

        return forward

    parts = zip(batch["crop"].chunk(count), batch["label"].chunk(count), strict=True)
    return [one(crops, labels) for crops, labels in parts]


def validate(
    network: nn.Module, inputs: FinetuneInputs, fabric: Fabric
) -> dict[str, dict[int, float]]:
    """Dice per validation case and label on the store's grid, by sliding windows."""
    recipe = inputs.recipe
    plan = WindowPlan(
        window=inputs.crop,
        overlap=recipe.window_overlap,
        batch=4,
        empty_below=0.0 if inputs.window.has_air else None,
        amp_dtype=torch.bfloat16 if recipe.optim.precision == "bf16-mixed" else None,
    )
    scores = {}
    scored = sorted(inputs.scored)
    for case in inputs.validation:
        volume, reference = inputs.whole(case)
        predicted = predict_labels(network, volume, replace(plan, pad_value=inputs.outside(case)))
        scores[case] = dice_per_label(predicted.numpy(), reference, scored)
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
