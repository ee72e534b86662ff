"""Optimisers and their parameter groups."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from timm.optim.lamb import Lamb
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

Name = Literal["adamw", "lamb", "sgd"]


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """True for what decays: no 1-D tensors, biases, mask tokens or layer scales."""
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and last not in ("bias", "token", "gamma")


def rated_groups(module: nn.Module, rates: Mapping[str, float]) -> list[dict]:
    """Groups by (decay or not) x rate, for a network some of whose parameters are pre-trained.

    Args:
        module: network.
        rates: learning rate of every pre-trained parameter relative to the rest, by name.

    Returns:
        As `parameter_groups`; `pretrained` marks what `set_step` can freeze.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (has_decay(name, parameter), name in rates, rates.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_ratio": rate,
            "decay": float(decays),
            "weight_decay": 0.0,
            "pretrained": pretrained,
        }
        for (decays, pretrained, rate), parameters in sorted(groups.items(), key=lambda i: i[0])
    ]


def parameter_groups(
    module: nn.Module,
    encoder: Callable[[str], bool] = lambda name: False,
    encoder_lr_ratio: float = 1.0,
) -> list[dict]:
    """Groups by (decay or not) x (encoder or not); frozen parameters are left out.

    Args:
        module: network or objective.
        encoder: tells by name which parameters belong to the pre-trained encoder.
        encoder_lr_ratio: their learning rate relative to the rest.

    Returns:
        Dicts with `params`, `lr_ratio` and `decay` (0 or 1), which `set_step` reads.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (has_decay(name, parameter), encoder(name))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_ratio": encoder_lr_ratio if inside else 1.0,
            "decay": float(decays),
            "weight_decay": 0.0,
        }
        for (decays, inside), parameters in sorted(groups.items())
    ]


def build_optimizer(
    name: Name,
    groups: list[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.99,
    always_adapt: bool = False,
    bias_correction: bool = True,
) -> Optimizer:
    """AdamW and SGD (Nesterov) from torch, in one pass over the weights where the device can, and
    LAMB from timm; the step clips, not the optimiser.

    LAMB's `always_adapt` scales the steps of parameters without weight decay too.
    """
    fused = can_be_fused(p for group in groups for p in group["params"])
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=betas, fused=fused)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    return Lamb(
        groups,
        lr=lr,
        betas=betas,
        eps=1e-6,
        max_grad_norm=None,
        always_adapt=always_adapt,
        bias_correction=bias_correction,
    )


def can_be_fused(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether PyTorch updates such parameters in one pass; on a CPU and on NVIDIA's GPUs."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def set_step(optimizer: Optimizer, lr: float, decay: float, frozen: bool = False) -> None:
    """Write this step's learning rate and weight decay into every group.

    `frozen` holds the groups that are marked as pretrained: `take_step` leaves them alone.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
        group["weight_decay"] = decay * group["decay"]
        group["frozen"] = frozen and group.get("pretrained", False)
