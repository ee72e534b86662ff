"""Normalisation of rows `(n, c)`, shared by both backends: all that BatchNorm needs to know of a
map.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

RowNorm = Callable[[Tensor], Tensor]
"""Maps `(n, c, *sites)` to the same shape, with statistics over everything but channels."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` wide enough for statistics: half precisions become float32, others stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def batch_norm(
    layer: nn.modules.batchnorm._BatchNorm, rows: Float[Tensor, "n c *sites"]
) -> Float[Tensor, "n c *sites"]:
    """What `layer` does in its present mode, running statistics included, to all sites of `rows`.

    A `SyncBatchNorm` in training mode takes its statistics over the rows of all processes of its
    group, each process weighing as much as it has rows; without an initialised process group it is
    plain BatchNorm.
    """
    training = layer.training or layer.running_mean is None
    if training and isinstance(layer, nn.SyncBatchNorm) and dist.is_initialized():
        group = layer.process_group or dist.group.WORLD
        if dist.get_world_size(group) > 1:
            return _sync_batch_norm(layer, rows, group)
    momentum = _count_batch(layer)
    tracked = not layer.training or layer.track_running_stats
    mean, var = (layer.running_mean, layer.running_var) if tracked else (None, None)
    if training and mean is not None and var is not None and recomputing():
        # the batch was counted in the forward; a recomputation must save as many tensors as it
        mean, var = mean.clone(), var.clone()
    return F.batch_norm(
        rows,
        mean,
        var,
        layer.weight,
        layer.bias,
        training,
        momentum,
        layer.eps,
    )


def recomputing() -> bool:
    """Whether this is a forward inside a backward: activation checkpointing runs it again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _count_batch(layer: nn.modules.batchnorm._BatchNorm) -> float:
    """Count this batch, once, if the layer keeps running statistics; its weight in them."""
    keeps = layer.training and layer.track_running_stats and not recomputing()
    if not keeps or layer.num_batches_tracked is None:
        return layer.momentum or 0.0
    layer.num_batches_tracked.add_(1)
    return 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum


def _sync_batch_norm(
    layer: nn.SyncBatchNorm, rows: Tensor, group: "dist.ProcessGroup | None"
) -> Tensor:
    wide = at_least_float32(rows).movedim(1, -1)
    shape, wide = wide.shape, wide.reshape(-1, wide.shape[-1])
    count = wide.new_full((1,), float(wide.shape[0]))
    sums = all_reduce(torch.cat([wide.sum(dim=0), count]), group=group)
    total = sums[-1].detach()
    mean = sums[:-1] / total
    var = all_reduce((wide - mean).square().sum(dim=0), group=group) / total
    momentum = _count_batch(layer)
    keeps = layer.training and layer.track_running_stats and not recomputing()
    if keeps and layer.running_mean is not None:
        with torch.no_grad():
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            unbiased = var * (total / (total - 1).clamp_min(1))
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)  # pyright: ignore[reportOptionalMemberAccess]
    y = (wide - mean) * (var + layer.eps).rsqrt()
    y = y if layer.weight is None else y * layer.weight + layer.bias
    return y.to(rows.dtype).view(shape).movedim(-1, 1)
