"""One step: clipped, guarded, and a pure function of (seed, step) in its random draws."""

import os
import signal

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from spark3d.engine.averaging import Average
from spark3d.engine.loop import (
    BadLossGuard,
    NotFinite,
    StepResult,
    rehearse,
    seed_step,
    stop_on_signal,
    take_step,
)
from spark3d.engine.optim import (
    build_optimizer,
    has_decay,
    parameter_groups,
    rated_groups,
    set_step,
)
from spark3d.errors import ConfigError, EnvironmentProblem


def made(name: str = "sgd") -> tuple:
    fabric = Fabric(accelerator="cpu", devices=1)
    network = nn.Linear(4, 1)
    optimizer = build_optimizer(name, parameter_groups(network), 0.1, momentum=0.0)  # type: ignore[arg-type]
    module, wrapped = fabric.setup(network, optimizer)
    set_step(wrapped, 0.1, 0.0)
    return fabric, network, module, wrapped


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    fabric, network, module, optimizer = made()
    before = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    x = torch.full((1, 4), 100.0)
    result = take_step(fabric, optimizer, module, lambda: (module(x).sum(), {}), clip=1.0)
    moved = nn.utils.parameters_to_vector(network.parameters()).detach() - before
    assert result.grad_norm == pytest.approx(float(torch.tensor([100.0] * 4 + [1.0]).norm()))
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-3)
    assert not result.skipped


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    fabric, network, module, optimizer = made("adamw")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.ones(1, 4)
    result = take_step(fabric, optimizer, module, lambda: (module(x).sum() * bad, {}), clip=1.0)
    assert result.skipped
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_bad_step_puts_running_statistics_back() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    module, optimizer = fabric.setup(
        network, build_optimizer("sgd", parameter_groups(network), 0.1)
    )
    good, bad = torch.randn(8, 4), torch.full((8, 4), float("inf"))
    take_step(fabric, optimizer, module, lambda: (module(good).sum(), {}), clip=1.0)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert int(before["0.num_batches_tracked"]) == 1
    result = take_step(fabric, optimizer, module, lambda: (module(bad).sum(), {}), clip=1.0)
    assert result.skipped
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_too_little_memory_is_a_problem_of_the_machine() -> None:
    fabric, _, module, optimizer = made()

    def losses() -> tuple:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand so on")

    with pytest.raises(EnvironmentProblem, match=r"out of memory on cpu.*9 GiB; start") as caught:
        take_step(fabric, optimizer, module, losses, clip=1.0)
    assert "\n" not in str(caught.value)


def test_a_rehearsal_leaves_no_trace_and_refuses_what_cannot_run() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    rehearse(network, lambda: network(torch.randn(8, 4)), "net")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"net cannot be trained by this recipe: .*8x5"):
        rehearse(network[2], lambda: network[2](torch.randn(8, 5)), "net")


def test_the_guard_stops_after_its_limit_in_a_row_and_names_the_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = BadLossGuard(limit=3)
    bad, good = StepResult(float("nan"), 1.0, {}, True), StepResult(1.0, 1.0, {}, False)
    for step, result in enumerate([bad, bad, good, bad, bad]):
        guard.check(result, step, [step])
    assert caplog.text.count("skipped: loss nan") == 4
    with pytest.raises(NotFinite, match=r"3 steps in a row.*samples \[7, 8\].*start a new run"):
        guard.check(bad, 6, [7, 8])


def test_draws_depend_on_seed_step_and_rank_only() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[float, float]:
        rng = seed_step(seed, step, rank)
        return float(torch.rand(())), float(torch.rand((), generator=rng))

    first = draw(1, 2, 0)
    torch.rand(100)
    assert draw(1, 2, 0) == first
    others = {draw(*key) for key in [(1, 3, 0), (2, 2, 0), (1, 2, 1)]}
    assert len(others | {first}) == 4
    assert draw(1, 2, 1)[1] == first[1]  # masks are drawn alike on every rank
    assert first[0] != first[1]


def test_sigterm_becomes_a_request_and_the_handler_goes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_decay_on_norms_biases_tokens_and_layer_scales() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert [has_decay(n, p) for n, p in network.named_parameters()] == [True, False, False, False]
    token = nn.Parameter(torch.zeros(1, 8, 1, 1))
    assert not has_decay("densify.stages.0.token", token)
    groups = parameter_groups(network, lambda name: name.startswith("0."), 0.1)
    assert sorted((g["lr_ratio"], g["decay"], len(g["params"])) for g in groups) == [
        (0.1, 0.0, 1),
        (0.1, 1.0, 1),
        (1.0, 0.0, 2),
    ]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_shares_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    network = nn.Linear(4, 1, dtype=torch.float64)
    x = torch.randn(8, 4, dtype=torch.float64)
    loss = network(x).square().mean()
    wanted = torch.autograd.grad(loss, [*network.parameters()])
    module, optimizer = fabric.setup(
        network, build_optimizer("sgd", parameter_groups(network), 0.0, momentum=0.0)
    )
    shares = [
        lambda part=part: (network(part).square().mean(), {"twice": 2 * network(part).sum()})
        for part in x.chunk(micro)
    ]
    result = take_step(fabric, optimizer, module, shares, clip=1e9)
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
    assert result.loss == pytest.approx(float(loss.detach()))
    assert result.parts["twice"] == pytest.approx(
        2 * float(network(x).detach().sum()) / micro, rel=1e-5
    )


def test_frozen_groups_neither_move_nor_count_in_the_clipping() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    groups = rated_groups(network, {"0.weight": 0.5})
    module, optimizer = fabric.setup(network, build_optimizer("adamw", groups, 0.1))
    before = [p.detach().clone() for p in network.parameters()]
    x = torch.ones(1, 2)
    set_step(optimizer, 0.1, 0.5, frozen=True)
    result = take_step(fabric, optimizer, module, lambda: (module(x).sum(), {}), clip=1e9)
    gradient = network[1].weight.grad
    assert gradient is not None
    assert result.grad_norm == pytest.approx(float(gradient.norm()))
    assert torch.equal(network[0].weight, before[0])
    assert not torch.equal(network[1].weight, before[1])
    set_step(optimizer, 0.1, 0.5)
    assert [g["lr"] for g in optimizer.param_groups if g["pretrained"]] == [0.05]
    take_step(fabric, optimizer, module, lambda: (module(x).sum(), {}), clip=1e9)
    assert not torch.equal(network[0].weight, before[0])


def test_the_average_rises_to_its_decay_and_is_a_function_of_the_step() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = Average(network, decay=0.7, warmup=True)
    value = float(network.weight.detach())
    for step in range(1, 9):
        with torch.no_grad():
            network.weight.fill_(float(step))
        average.update(network, step)
        keep = min(0.7, 1 - (1 + step) ** (-2 / 3))
        value = keep * value + (1 - keep) * step
    assert float(average.network.weight.detach()) == pytest.approx(value)
    assert not average.network.training


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_of_the_former_optimiser_goes_on_as_it_was(name: str) -> None:
    """Its state says that it made many passes; that is kept, so that its numbers stay the same."""
    network = nn.Linear(2, 2)
    now = build_optimizer(name, parameter_groups(network), 0.1)  # type: ignore[arg-type]
    former = build_optimizer(name, parameter_groups(network), 0.1)  # type: ignore[arg-type]
    assert all(group["fused"] for group in now.param_groups)
    for group in former.param_groups:
        group["fused"] = None
    network(torch.ones(1, 2)).sum().backward()
    former.step()
    now.load_state_dict(former.state_dict())
    assert not any(group["fused"] for group in now.param_groups)
    now.step()
