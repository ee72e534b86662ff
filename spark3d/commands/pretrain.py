"""`spark3d pretrain`: unlabelled crops in, encoder weights with a passport out."""

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spark3d import build
from spark3d.commands.image_folders import note_scans
from spark3d.commands.inputs import PretrainInputs, pretrain_inputs
from spark3d.commands.probing import Probe, open_probe
from spark3d.commands.runs import RunTime, claim_run, finish_run, finished, open_run
from spark3d.commands.start import read_start
from spark3d.config import PretrainRecipe, find_recipe, load_recipe
from spark3d.engine.checkpoint import Checkpoints
from spark3d.engine.logging import (
    RunLog,
    Stopwatch,
    Waited,
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
from spark3d.objectives.base import Objective
from spark3d.reports.panels import reconstruction_panel
from spark3d.sparse.mask import CellMask
from spark3d.weights.exchange import load_encoder, save_encoder, save_objective
from spark3d.weights.passport import Passport

log = logging.getLogger(__name__)

DEFAULT_RECIPES = {2: "spark_images_2d", 3: "spark_segresnet_3d"}


def pretrain_command(
    data: Path,
    out: Path,
    recipe: str | None = None,
    overrides: tuple[str, ...] = (),
    dims: int | None = None,
    exclude: Path | None = None,
    init: Path | None = None,
) -> Path:
    """Pre-train an encoder on a folder of volumes or images; resume if `out` holds this run.

    Args:
        data: a prepared store, a folder of volumes (prepared into `out/store`), or of images if
            `dims` is 2.
        out: run folder.
        recipe: name of a shipped recipe or a YAML file.
        overrides: `section.key=value`.
        dims: 2 or 3; default the recipe's.
        exclude: never to read: text file of case ids, one a line, or a split's name or JSON file
            (its validation and test cases).
        init: encoder weights to go on from, or their folder; None: random ones.

    Returns:
        The encoder weights, `out/encoder.safetensors`.
    """
    asked = build.settled(asked_recipe(recipe, overrides, dims))
    start, asked = read_start(init, asked)
    fabric = build.fabric(asked.compute, asked.optim.precision)
    set_up_logging(fabric.global_rank)
    build.warn_of_slow_precision(fabric, asked.optim.precision)
    with claim_run(out, "pretrain", fabric):
        inputs = pretrain_inputs(asked, data, out, exclude, fabric)
        for line in inputs.notes:
            log.info("  %s", line)
        probe = open_probe(inputs)
        objective = build_objective(inputs.recipe, fabric)
        identity = {"data": inputs.identity}
        if start is not None:
            identity["init"] = start.passport.sha256
            for line in start.load(objective, inputs.recipe.objective.name):
                log.info("  %s", line)
        try_out(build.objective(inputs.recipe), inputs)
        open_run(out, "pretrain", inputs.recipe, identity, data, fabric)
        if inputs.images is not None:
            note_scans(out, {"data": inputs.images}, fabric)
        if finished(out) is not None and (done := intact(out / "encoder.safetensors")):
            log.info("finished already: %s", done)
            return done
        passport = inputs.passport()
        if start is not None:
            passport = start.extend(passport)
        return run_pretraining(fabric, objective, inputs, out, passport, probe)


def asked_recipe(
    recipe: str | None, overrides: tuple[str, ...], dims: int | None
) -> PretrainRecipe:
    """The recipe as asked for, `auto` where the data will tell; without a name that of `dims`."""
    if recipe is None:
        fallback = load_recipe(PretrainRecipe, None, overrides, dims=dims)
        recipe = DEFAULT_RECIPES[fallback.dims]
    return load_recipe(PretrainRecipe, find_recipe(recipe, "pretrain"), overrides, dims=dims)


def build_objective(recipe: PretrainRecipe, fabric: Fabric) -> Objective:
    """The objective with weights drawn by the recipe's seed.

    On several GPUs the batch norms of the encoder take their statistics over all of them, as
    official SparK does; on CPUs torch knows no such norm, and each rank takes its own.
    """
    torch.manual_seed(recipe.seed)
    return build.objective(recipe, fabric.world_size > 1 and fabric.device.type == "cuda")


def try_out(objective: Objective, inputs: PretrainInputs) -> None:
    """One forward pass on nothing, on the CPU: what cannot be trained so is refused at once.

    Raises:
        ConfigError: a layer without a masked meaning, strides that do not fit the cells, ...
    """
    recipe = inputs.recipe
    batch = {"crop": torch.zeros(2, recipe.model.in_channels, *inputs.crop)}
    mask = inputs.mask(batch, torch.Generator().manual_seed(0))
    rehearse(objective, lambda: objective(batch["crop"], mask), recipe.model.backbone)


def intact(path: Path) -> Path | None:
    """The weights' file if it is whole and belongs to its passport."""
    try:
        load_encoder(path)
    except DataError as problem:
        log.warning("%s; writing it again", problem)
        return None
    return path


def run_pretraining(
    fabric: Fabric,
    objective: Objective,
    inputs: PretrainInputs,
    out: Path,
    passport: Passport,
    probe: Probe,
) -> Path:
    """The loop, from the last checkpoint (or the start) to the exported encoder."""
    recipe = inputs.recipe
    optim = recipe.optim
    objective.to(memory_format=inputs.layout)  # type: ignore[call-overload]
    tokens = getattr(recipe.objective, "token_lr_ratio", 1.0)
    slower = {f"objective.{name}" for name in objective.tokens()} if tokens != 1 else ()
    step_module = TrainingStep(objective, inputs.cell_size)
    module, optimizer = build.set_up(fabric, step_module, optim, slower, tokens)

    checkpoints = Checkpoints(out / "checkpoints", recipe.compute.keep_checkpoints)
    parts = {"objective": objective, "optimizer": optimizer}
    done = checkpoints.resume(parts)
    steps = Waited(inputs.batches(done, fabric.global_rank, fabric.world_size))
    run_log = RunLog(out, done, recipe.log.tensorboard, fabric.is_global_zero)
    guard = BadLossGuard(recipe.compute.max_bad_losses)
    clock, total = Stopwatch(), RunTime(out)

    with (
        closing(run_log),
        stop_on_signal() as asked_to_stop,
        step_progress("pre-training", optim.steps, done, fabric.is_global_zero) as bar,
    ):
        for step, batch in enumerate(steps, start=done + 1):
            rng = seed_step(recipe.seed, step, fabric.global_rank)
            crops = batch["crop"].to(fabric.device, non_blocking=True, memory_format=inputs.layout)
            visible = inputs.mask(batch, rng, fabric.global_rank, fabric.world_size).visible
            lr, decay = build.step_settings(optim, step - 1)
            set_step(optimizer, lr, decay)

            result = take_step(
                fabric, optimizer, module, lambda c=crops, v=visible: module(c, v), optim.clip
            )

            numbers = batch["number"].tolist()
            guard.check(result, step, numbers)
            if step % recipe.log.every == 0:
                run_log.write("train", step, step_values(result, lr, clock, steps))
            last, stop = step == optim.steps, asked_to_stop.on_any_rank(fabric)
            if fabric.is_global_zero and (step == 1 or step % recipe.log.panels_every == 0 or last):
                draw_panel(objective, batch, inputs, out / "panels" / f"step_{step:06d}.png")
            if fabric.is_global_zero and probe.due(step, last):
                run_log.write("probe", step, probe.look(objective, crops))
                clock.lap()
            regular = step % recipe.compute.checkpoint_every == 0 and not result.skipped
            if fabric.is_global_zero and (regular or last or stop):
                checkpoints.save_parts(step, parts)
                total.note()
            bar.advance(f"loss {result.loss:.4f}")
            if stop and not last:
                fabric.barrier()  # no rank leaves while the first still writes
                raise Interrupted(f"stopped after step {step}; the same command goes on from there")

    target = out / "encoder.safetensors"
    if fabric.is_global_zero:
        rest = save_objective(target, objective.rest_state())
        save_encoder(target, objective.encoder_state(), replace(passport, objective_sha256=rest))
        finish_run(out, total.seconds, {"steps": optim.steps}, {"encoder": target.name})
        log.info("encoder weights: %s", target)
    fabric.barrier()
    return target


class TrainingStep(nn.Module):
    """An objective behind plain tensors, which is all that Fabric passes on to a wrapped module."""

    def __init__(self, objective: Objective, cell_size: tuple[int, ...]) -> None:
        super().__init__()
        self.objective = objective
        self.cell_size = cell_size

    def forward(self, crops: Tensor, visible: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts; `visible` is `(b, *grid)` on the CPU, where tables are built."""
        losses = self.objective(crops, CellMask(visible, self.cell_size).to(crops.device))
        return losses.total, dict(losses.parts)


@torch.no_grad()
def draw_panel(objective: Objective, batch: dict, inputs: PretrainInputs, path: Path) -> None:
    """Input, masked input and reconstruction of the first crop, in evaluation mode.

    The picture's mask has a seed of its own, the same at every step.
    """
    device = next(objective.parameters()).device
    crop = batch["crop"][:1].to(device)
    one = {name: value[:1] for name, value in batch.items()}
    mask = inputs.mask(one, torch.Generator().manual_seed(0)).to(device)
    objective.eval()
    reconstruction = objective.reconstruct(crop, mask)
    objective.train()
    visible = mask.at(crop.shape[2:])
    path.parent.mkdir(exist_ok=True)
    reconstruction_panel(
        crop[0].float().cpu().numpy(),
        (crop * visible)[0].float().cpu().numpy(),
        reconstruction[0].float().cpu().numpy(),
        path,
        spacing_mm=inputs.spacing_mm,
        visible=visible[0, 0].cpu().numpy(),
    )
