"""Known ranks, and a linear head that finds what is linear and draws nothing."""

import pytest
import torch
from torch.nn import functional

from spark3d.models.linear_probe import LinearProbe, effective_rank, stage_figures


def test_ranks_with_known_answers() -> None:
    eye = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(eye) == pytest.approx(4)
    line = torch.arange(8.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.ones(8, 3)) == 0
    unequal = eye * torch.tensor([3.0, 1.0, 0.0, 0.0])
    share = torch.tensor([0.75, 0.25])
    assert effective_rank(unequal) == pytest.approx(float(torch.exp(-(share * share.log()).sum())))


@pytest.mark.parametrize("ndim", [2, 3])
def test_figures_tell_a_collapse(ndim: int) -> None:
    torch.manual_seed(0)
    healthy, constant = torch.randn(2, 6, *(16,) * ndim), torch.ones(2, 4, *(4,) * ndim)
    figures = stage_figures([healthy, constant])
    assert 5.5 < figures["rank 0"] <= 6
    assert figures["std 0"] == pytest.approx(1, abs=0.05)
    assert (figures["rank 1"], figures["std 1"]) == (0, 0)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_linear_head_learns_what_a_stage_says_and_draws_nothing(ndim: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, *(4,) * ndim))
    told = functional.one_hot(labels, 3).movedim(-1, 1).float()
    labels = functional.interpolate(labels[:, None].float(), scale_factor=4)[:, 0].long()
    state = torch.get_rng_state()
    head = LinearProbe([5, 3], 3, ndim)
    assert torch.equal(torch.get_rng_state(), state)
    maps, size = [torch.randn(2, 5, *(16,) * ndim), told], (16,) * ndim
    assert float(head(maps, size).detach().abs().max()) == 0
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(head(maps, size), labels).backward()
        optimizer.step()
    assert float((head(maps, size).argmax(1) == labels).float().mean()) > 0.8
