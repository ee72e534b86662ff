"""One table: every objective on every kind of network, in 2D and 3D."""

import io

import pytest
import torch
from objective_cases import CASES, OBJECTIVES, Case
from torch import nn

from spark3d.models.segmenter import build_segmenter, encoder_of
from spark3d.objectives.base import Objective
from spark3d.weights.exchange import load_into

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
LEARNING_RATE = {"spark": 5e-3, "localmim": 5e-3, "a2mim": 2e-3}


def optimiser_of(model: nn.Module, lr: float = 5e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model: Objective, optimiser: torch.optim.Optimizer, case: Case, steps: int) -> list:
    """Losses of some steps on one batch."""
    crops, mask = case.batch()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        found = model(crops, mask)
        found.total.backward()
        optimiser.step()
        losses.append(found.total.item())
    return losses


@every_objective
@every_case
def test_one_batch_is_overfitted(case: Case, name: str) -> None:
    """A few steps on one batch bring the loss well below its start; parts are logged."""
    model = OBJECTIVES[name](case)
    losses = train(model, optimiser_of(model, LEARNING_RATE[name]), case, 12)
    assert losses[-1] < 0.85 * losses[0]
    crops, mask = case.batch()
    parts = model(crops, mask).parts
    assert parts
    assert not any(part.requires_grad for part in parts.values())


@every_objective
@every_case
def test_gradients_reach_everything_and_pictures_keep_what_is_visible(
    case: Case, name: str
) -> None:
    """No trained parameter without gradient; `reconstruct` copies the visible voxels."""
    crops, mask = case.batch()
    model = OBJECTIVES[name](case)
    model(crops, mask).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        picture = model.reconstruct(crops, mask)
    sites = mask.at(mask.size).expand_as(crops)
    assert picture.shape == crops.shape
    assert torch.equal(picture[sites], crops[sites])
    assert picture.isfinite().all()
    assert not torch.equal(picture[~sites], crops[~sites])


@every_objective
@every_case
def test_training_resumes_exactly(case: Case, name: str) -> None:
    """State of model and optimiser through a file: the losses that follow are the same bits."""
    model = OBJECTIVES[name](case)
    optimiser = optimiser_of(model)
    train(model, optimiser, case, 1)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, saved)
    onwards = train(model, optimiser, case, 2)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    again = OBJECTIVES[name](case)
    again.load_state_dict(state["model"], strict=True)
    resumed = optimiser_of(again)
    resumed.load_state_dict(state["optimiser"])
    assert train(again, resumed, case, 2) == onwards


@every_objective
@every_case
def test_the_encoder_fine_tunes_in_a_segmenter(case: Case, name: str) -> None:
    """Exported weights cover a fresh segmentation network's encoder, and all of it then learns."""
    state = OBJECTIVES[name](case).encoder_state()
    backbone = case.backbone()
    segmenter = build_segmenter(backbone, 2)
    report = load_into(segmenter, state)
    assert report.coverage == 1.0
    assert set(report.matched) == set(backbone.encoder_keys)
    crops, _ = case.batch()
    labels = (crops[:, 0] > 0).long()
    optimiser = optimiser_of(segmenter, 2e-3)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(segmenter(crops), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    after = encoder_of(segmenter).state_dict()
    learnt = {n for n, p in backbone.network.named_parameters() if n in state}
    assert all(not torch.equal(after[key], state[key]) for key in learnt)
