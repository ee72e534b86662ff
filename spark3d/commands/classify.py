"""`spark3d finetune --task classify`: labelled images and an encoder in, a classifier out."""

import json
import logging
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spark3d import build, build_images
from spark3d.classify_recipe import ClassifyRecipe
from spark3d.commands.classify_inputs import ClassifyInputs, classify_inputs
from spark3d.commands.image_folders import note_scans
from spark3d.commands.runs import RunTime, claim_run, finish_run, finished, open_run
from spark3d.config import find_recipe, load_recipe
from spark3d.data.image_transforms import drawn_from
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
    rehearse,
    seed_step,
    step_values,
    stop_on_signal,
    take_step,
)
from spark3d.engine.optim import set_step
from spark3d.engine.progress import step_progress
from spark3d.errors import DataError, Interrupted
from spark3d.evaluation.classification import Hits, count_hits
from spark3d.weights.classifiers import load_classifier_weights, save_classifier

log = logging.getLogger(__name__)

MIX = 2
"""Sets the draws of mixup apart from those of the samples, which `data.stream` counts 0 and 1."""
LAYOUT = torch.channels_last
"""Of pixels in memory: what convolutions in 2D are fastest with."""


@dataclass(frozen=True)
class Classified:
    """Where the classifier lies, and its `top1`, `top5` and `loss` on the validation images."""

    model: Path
    scores: dict[str, float | None]


def classify_command(
    data: Path,
    out: Path,
    encoder: Path | None = None,
    recipe: str | None = None,
    overrides: tuple[str, ...] = (),
    allow_overlap: bool = False,
) -> Classified:
    """Fine-tune an image classifier, from encoder weights or from scratch; resume its run.

    Args:
        data: folder with `train/CLASS/` and `val/CLASS/` of images.
        out: run folder.
        encoder: `encoder.safetensors` of a pre-training or its folder; None: from scratch.
        recipe: name of a shipped recipe or a YAML file.
        overrides: `section.key=value`.
        allow_overlap: go on although validation images were seen in training or pre-training; the
            run's record and the report say so.
    """
    path = find_recipe(recipe or "images_2d", "classify")
    asked = build.settled(load_recipe(ClassifyRecipe, path, overrides))
    fabric = build.fabric(asked.compute, asked.optim.precision)
    set_up_logging(fabric.global_rank)
    build.warn_of_slow_precision(fabric, asked.optim.precision)
    with claim_run(out, "classify", fabric):
        inputs = classify_inputs(asked, data, out, encoder, fabric, allow_overlap)
        for line in inputs.notes:
            log.info("  %s", line)
        torch.manual_seed(inputs.recipe.seed)
        synchronised = fabric.world_size > 1 and fabric.device.type == "cuda"
        net, network, report = build_images.classifier(
            inputs.recipe, len(inputs.classes), inputs.weights, synchronised
        )
        if report is not None:
            log.info("%s", report)
        rates = build_images.layer_rates(net, inputs.recipe, report is not None)
        if not synchronised:  # a synchronised norm refuses the CPU
            crops = torch.zeros(2, 3, *build_images.crop_size(inputs.recipe))
            rehearse(network, lambda: network(crops), net.name)
        open_run(out, "classify", inputs.recipe, inputs.identity(), data, fabric)
        note_scans(out, inputs.scans, fabric)
        if (done := finished_earlier(out)) is not None:
            log.info("finished already: %s", done.model)
            return done
        return run_classification(fabric, network, rates, inputs, out)


def finished_earlier(out: Path) -> Classified | None:
    """What the same command returned when it came to its end, if its model is still whole."""
    result = finished(out)
    if result is None:
        return None
    target = out / "model.safetensors"
    try:
        load_classifier_weights(target)
    except DataError as problem:
        log.warning("%s; writing it again", problem)
        return None
    return Classified(target, result["scores"])


def run_classification(
    fabric: Fabric, network: nn.Module, rates: dict[str, float], inputs: ClassifyInputs, out: Path
) -> Classified:
    """The loop, from the last checkpoint (or the start) to the saved model and its scores."""
    recipe, optim = inputs.recipe, inputs.recipe.optim
    mix, loss = build_images.mixing(recipe, len(inputs.classes)), build_images.loss(recipe)
    module, optimizer = build_images.set_up(fabric, network, recipe, rates)
    average = build_images.average(recipe, network)
    judged = average.network if average else network

    checkpoints = Checkpoints(out / "checkpoints", recipe.compute.keep_checkpoints)
    parts = {"network": network, "optimizer": optimizer}
    if average:
        parts["average"] = average.network
    done = checkpoints.resume(parts)
    steps = Waited(inputs.batches(done, fabric.global_rank, fabric.world_size))
    run_log = RunLog(out, done, recipe.log.tensorboard, fabric.is_global_zero)
    guard = BadLossGuard(recipe.compute.max_bad_losses)
    clock, total = Stopwatch(), RunTime(out)
    hits = Hits()

    with (
        closing(run_log),
        stop_on_signal() as asked_to_stop,
        step_progress("fine-tuning", optim.steps, done, fabric.is_global_zero) as bar,
    ):
        for step, batch in enumerate(steps, start=done + 1):
            seed_step(recipe.seed, step, fabric.global_rank)
            crops = batch["crop"].to(fabric.device, non_blocking=True, memory_format=LAYOUT)
            labels = batch["label"].to(fabric.device, non_blocking=True)
            with drawn_from(np.random.default_rng((recipe.seed, MIX, step, fabric.global_rank))):
                crops, targets = mix(crops, labels)
            lr, decay = build.step_settings(optim, step - 1)
            set_step(optimizer, lr, decay)

            def losses(
                crops: Tensor = crops, targets: Tensor = targets
            ) -> tuple[Tensor, dict[str, Tensor]]:
                return loss(module(crops), targets), {}

            result = take_step(fabric, optimizer, module, losses, optim.clip)

            if average and not result.skipped:
                average.update(network, step)
            numbers = batch["number"].tolist()
            guard.check(result, step, numbers)
            if step % recipe.log.every == 0:
                run_log.write("train", step, step_values(result, lr, clock, steps))
            last, stop = step == optim.steps, asked_to_stop.on_any_rank(fabric)
            if last or step % inputs.validate_every == 0:
                hits = validate(judged, inputs, fabric)
                run_log.write("val", step, rounded(hits))
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
        hits = validate(judged, inputs, fabric)
    target, scores = out / "model.safetensors", rounded(hits)
    if fabric.is_global_zero:
        save_classifier(target, judged.state_dict(), inputs.card())
        detail = {**scores, "hits": asdict(hits), "classes": list(inputs.classes)}
        write_atomically(out / "scores.json", json.dumps(detail, indent=1).encode())
        finish_run(out, total.seconds, scores, {"model": target.name, "scores": scores})
        log.info("model: %s; top-1 %.2f %%", target, 100 * (scores["top1"] or 0.0))
    fabric.barrier()
    return Classified(target, scores)


@torch.no_grad()
def validate(network: nn.Module, inputs: ClassifyInputs, fabric: Fabric) -> Hits:
    """Count hits over all validation images; every rank does its share of them."""
    if fabric.world_size > 1:  # running statistics are each rank's own
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
    training = network.training
    network.eval()
    hits = Hits()
    for batch in inputs.validation_batches(fabric.global_rank, fabric.world_size):
        crops = batch["crop"].to(fabric.device, non_blocking=True, memory_format=LAYOUT)
        with fabric.autocast():
            logits = network(crops)
        hits += count_hits(logits, batch["label"].to(fabric.device, non_blocking=True))
    network.train(training)
    if fabric.world_size > 1:
        counts = hits.tensor().to(fabric.device)
        hits = Hits.of(cast(Tensor, fabric.all_reduce(counts, reduce_op="sum")))
    return hits


def rounded(hits: Hits) -> dict[str, float | None]:
    """Scores for files: a loss that is no number becomes none."""
    return {name: finite_or_none(value) for name, value in hits.scores().items()}
