"""SparK's loss and its invariants, over backbones, dimensions, backends and decoders."""

import math

import pytest
import torch
from objective_cases import CASES, Case, make_spark
from torch import nn

from spark3d.models.hidden import cut_hidden
from spark3d.objectives.spark import SparK
from spark3d.objectives.targets import normalise_cells
from spark3d.sparse.mask import CellMask

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TWO = {"2d": CASES["segresnet 2d"], "3d": CASES["dynunet 3d"]}
two_cases = pytest.mark.parametrize("case", TWO.values(), ids=TWO)


class Fixed(nn.Module):
    """A decoder whose prediction is given."""

    def __init__(self, cells: torch.Tensor) -> None:
        super().__init__()
        self.cells = nn.Parameter(cells)

    def forward(self, maps: object, mask: CellMask) -> torch.Tensor:
        return self.cells


def with_prediction(case: Case, cells: torch.Tensor) -> SparK:
    model = make_spark(case).to(cells.dtype)
    model.decoder = Fixed(cells)  # pyright: ignore
    return model


@pytest.mark.parametrize(
    ("case", "light"),
    [pytest.param(case, True, id=f"light-{key}") for key, case in CASES.items()]
    + [pytest.param(case, False, id=f"official-{key}") for key, case in TWO.items()],
)
def test_backends_agree_and_every_parameter_learns(case: Case, light: bool) -> None:
    """Loss and gradients of packed and reference are equal in float64; none is missing."""
    crops, mask = case.batch()
    grads, losses = [], []
    for backend in ("packed", "reference"):
        torch.manual_seed(0)
        model = make_spark(case, backend, light).double()
        loss = model(crops.double(), mask)
        loss.total.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert [n for n, p in trained.items() if p.grad is None] == []
        grads.append({n: p.grad for n, p in trained.items()})
        losses.append(loss.total.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    largest = max(g.abs().max() for g in grads[0].values())
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).abs().max() < 1e-9 * largest, name
    assert 0.9 < losses[0] < 1.3


@two_cases
def test_perfect_prediction_has_no_loss_and_zero_prediction_has_one(case: Case) -> None:
    """Loss 0 for the target, the mean of (n-1)/n * var/(var+eps) for zeros (spec, 4 and 5)."""
    crops, mask = case.batch()
    crops = crops.double()
    target = normalise_cells(cut_hidden(crops, mask))
    assert with_prediction(case, target.voxels)(crops, mask).total == 0
    zero = with_prediction(case, torch.zeros_like(target.voxels))(crops, mask).total
    n = math.prod(case.cell)
    variance = cut_hidden(crops, mask).flatten(1).var(1)
    wanted = (n - 1) / n * (variance / (variance + 1e-6)).mean()
    torch.testing.assert_close(zero, wanted, rtol=1e-12, atol=0)


@two_cases
def test_reconstruction_is_in_units_of_the_crop(case: Case) -> None:
    """The perfect prediction gives the crop back; visible voxels are copied whatever it says."""
    crops, mask = case.batch()
    target = normalise_cells(cut_hidden(crops, mask))
    perfect = with_prediction(case, target.voxels).reconstruct(crops, mask)
    torch.testing.assert_close(perfect, crops, rtol=1e-5, atol=1e-5)
    flat = with_prediction(case, torch.zeros_like(target.voxels)).reconstruct(crops, mask)
    sites = mask.at(mask.size).expand_as(crops)
    assert torch.equal(flat[sites], crops[sites])
    means = cut_hidden(flat, mask).flatten(1)
    torch.testing.assert_close(means[:, 0], cut_hidden(crops, mask).flatten(1).mean(1))
    assert (means.std(1) < 1e-6).all()


@pytest.mark.parametrize("backend", ["packed", "reference"])
@every_case
def test_hidden_voxels_change_nothing_but_the_target(case: Case, backend: str) -> None:
    """Prediction and features are bitwise the same whatever the hidden voxels hold (spec, 3)."""
    crops, mask = case.batch()
    model = make_spark(case, backend).eval()
    other = crops.where(mask.at(mask.size), 100 * torch.randn_like(crops) + 7)
    with torch.no_grad():
        assert torch.equal(model.predict(crops, mask), model.predict(other, mask))
        assert model(crops, mask).total != model(other, mask).total


@two_cases
def test_gradient_of_the_prediction_is_that_of_the_mean_over_cells(case: Case) -> None:
    """2 (p - t) / (n cells): each hidden cell weighs the same; there is nothing else to predict."""
    crops, mask = case.batch()
    target = normalise_cells(cut_hidden(crops.double(), mask)).voxels
    model = with_prediction(case, torch.randn_like(target))
    model(crops.double(), mask).total.backward()
    assert isinstance(model.decoder, Fixed)
    cells = model.decoder.cells
    wanted = 2 * (cells.detach() - target) / target.numel()
    torch.testing.assert_close(cells.grad, wanted)


def test_nothing_hidden_gives_a_loss_of_zero_and_no_gradient() -> None:
    """Ratio 0: the loss is finite, 0, and teaches nothing, the tokens included (spec, 7 and 13)."""
    case = CASES["segresnet 2d"]
    crops, mask = case.batch(ratio=0.0)
    model = make_spark(case)
    losses = model(crops, mask)
    losses.total.backward()
    assert losses.total == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert torch.equal(model.reconstruct(crops, mask), crops)


def test_tokens_learn_when_cells_are_hidden() -> None:
    """Each stage's token gets a gradient (spec, 13)."""
    case = CASES["dynunet 3d"]
    crops, mask = case.batch()
    model = make_spark(case)
    model(crops, mask).total.backward()
    for stage in model.densify.stages:
        assert stage.token.grad.any()


def test_flat_cells_can_be_left_out() -> None:
    """Cells under `min_variance` do not count; when all are, the loss is 0 and stays finite."""
    case = CASES["segresnet 2d"]
    crops, mask = case.batch()
    crops[0] = -1000.0
    every = make_spark(case)
    skipping = make_spark(case, min_variance=1e-3)
    skipping.load_state_dict(every.state_dict())
    assert every(crops, mask).parts["counted"] == 1
    losses = skipping(crops, mask)
    assert losses.parts["counted"] == 0.5
    target = normalise_cells(cut_hidden(crops, mask), min_variance=1e-3)
    errors = (skipping.predict(crops, mask) - target.voxels).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.total, errors[target.counted].mean())
    crops[:] = -1000.0
    nothing = skipping(crops, mask)
    nothing.total.backward()
    assert nothing.total == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in skipping.parameters())


def test_targets_ignore_scale_and_offset_of_each_cell() -> None:
    """Invariant under x -> a x + b with a > 0, sign flips with a < 0 (spec, 6)."""
    cells = torch.randn(5, 2, 4, 4, 4, dtype=torch.float64)
    plain = normalise_cells(cells).voxels
    eps = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(normalise_cells(30 * cells + 4).voxels, plain, **eps)
    torch.testing.assert_close(normalise_cells(-3 * cells).voxels, -plain, **eps)
    moments = plain.flatten(1)
    torch.testing.assert_close(moments.mean(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(moments.var(1), torch.ones(5, dtype=torch.float64), **eps)


def test_larger_eps_keeps_noise_in_flat_cells_small() -> None:
    """With eps in squared units of the noise, flat cells no longer reach unit variance."""
    noise = 1e-3 * torch.randn(3, 1, 8, 8)
    assert normalise_cells(noise, eps=1e-6).voxels.std() > 0.6
    assert normalise_cells(noise, eps=1e-2).voxels.std() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_several_channels_are_normalised_together(channels: int) -> None:
    """One mean and one variance per cell over all channels (spec, target)."""
    case = CASES["segresnet 2d"]
    crops, mask = case.batch(channels=channels)
    model = make_spark(case, in_channels=channels)
    assert model(crops, mask).total.isfinite()
    target = normalise_cells(cut_hidden(crops, mask))
    assert target.mean.shape == (len(target.voxels), 1, 1, 1)


@two_cases
def test_loss_is_float32_under_autocast(case: Case) -> None:
    """bfloat16 inside the networks, float32 in target and loss (spec, AMP)."""
    crops, mask = case.batch()
    model = make_spark(case)
    exact = model(crops, mask).total.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(crops, mask)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total.detach(), exact, rtol=0.02, atol=0)


@every_case
def test_encoder_state_loads_strictly_into_the_dense_network(case: Case) -> None:
    """Exactly the encoder's keys, detached copies, equal features in the dense network."""
    torch.manual_seed(1)
    model = make_spark(case)
    state = model.encoder_state()
    fresh = case.backbone()
    assert tuple(state) == fresh.encoder_keys
    fresh.network.load_state_dict({**fresh.network.state_dict(), **state}, strict=True)
    for key, value in state.items():
        assert not value.requires_grad
        value.add_(1)
        assert not torch.equal(model.encoder.network.state_dict()[key], value)


def test_what_the_stages_do_not_need_is_frozen() -> None:
    """The segmentation network's decoder neither trains nor travels."""
    model = make_spark(CASES["segresnet 3d"])
    frozen = {n for n, p in model.encoder.network.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("up_layers", "up_samples", "conv_final")) for name in frozen)
    assert not frozen & model.encoder_state().keys()


def test_samples_are_independent_without_batch_norm() -> None:
    """Group norm: the features of a sample do not depend on the others (spec, 9)."""
    case = CASES["segresnet 3d"]
    crops, mask = case.batch()
    model = make_spark(case).double()
    other = crops.clone().double()
    other[1] *= 3
    n = len(cut_hidden(crops, mask)) // 2
    a, b = model.predict(crops.double(), mask), model.predict(other, mask)
    torch.testing.assert_close(a[:n], b[:n], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a[n:], b[n:])


@two_cases
def test_two_objectives_and_dense_inference_do_not_disturb_each_other(case: Case) -> None:
    """No global mask: interleaved forwards give what they give alone."""
    crops, mask = case.batch()
    first, second = make_spark(case).eval(), make_spark(case).eval()
    alone = first.predict(crops, mask)
    pyramid = first.encoder(crops, mask)
    second.predict(crops, CellMask(mask.visible.flip(0), mask.cell_size))
    first.encoder.dense(crops)
    again = first.decoder(first.densify(pyramid), mask)
    assert torch.equal(alone, again)
