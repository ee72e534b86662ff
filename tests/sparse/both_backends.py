"""What the tests of the core share: masks, random maps, and the comparison of both backends."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spark3d.sparse import functional, packed
from spark3d.sparse.cells import pack, unpack
from spark3d.sparse.convert import restore_dense, sparsify
from spark3d.sparse.mask import CellMask, random_mask
from spark3d.sparse.slot import MaskSlot, Run


def draw_mask(
    grid: Sequence[int], cell: Sequence[int], ratio: float = 0.5, batch: int = 2, seed: int = 0
) -> CellMask:
    """A random mask with its own generator."""
    rng = torch.Generator().manual_seed(seed)
    return random_mask(batch, grid, ratio, cell, rng)


def run_both(
    layer: nn.Module, x: Tensor, mask: CellMask, out_seed: int = 1, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a layer, by name, on the reference and on packed cells.

    Hidden sites of the reference's input hold noise; the gradient of the input is compared where
    visible.
    """
    slot = MaskSlot()
    sparsify(layer.to(device), slot)
    x, mask = x.to(device), mask.to(device)
    keep = mask.at(x.shape[2:])
    noisy = torch.where(keep, x, 1e3 * torch.randn_like(x)).requires_grad_()
    cells = pack(x, mask).detach().requires_grad_()
    results = []
    for run, given in (
        (Run(functional, mask, mask.batch), noisy),
        (Run(packed, packed.Layout(mask), mask.batch), cells),
    ):
        torch.manual_seed(0)
        layer.zero_grad()
        state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with slot.use(run):
            y = layer(given * 1)
        dense = y if given is noisy else unpack(y, mask)
        dense = functional.hide(dense, mask)
        weights = torch.randn(
            dense.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(out_seed)
        ).to(device)
        (dense * weights).sum().backward()
        grad = given.grad if given is noisy else unpack(given.grad, mask)
        found = {"output": dense.detach(), "input gradient": grad}
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.clone()
        for name, buffer in layer.named_buffers():
            found[f"buffer {name}"] = buffer.clone().double()
            buffer.copy_(state[name])
        results.append(found)
    return results[0], results[1]


def assert_both_equal(
    layer: nn.Module, x: Tensor, mask: CellMask, tolerance: float = 1e-10, device: str = "cpu"
) -> None:
    """Outputs, gradients and buffers of both backends agree to rounding."""
    reference, fast = run_both(layer, x, mask, device=device)
    assert reference.keys() == fast.keys()
    scale = max(float(v.abs().max()) for v in reference.values())
    for name, expected in reference.items():
        assert float((expected - fast[name]).abs().max()) <= tolerance * max(scale, 1), name


def restored(network: nn.Module) -> nn.Module:
    """The network, dense again."""
    restore_dense(network)
    return network
