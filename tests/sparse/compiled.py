"""Compares compiled with eager, for `test_compile.py`: `python compiled.py BACKEND [packed ...]`.

A process of its own, because the compiler cannot trace run-time type checks.
"""

import sys

import torch
from both_backends import draw_mask
from small_networks import ALL
from torch import Tensor

from spark3d.sparse import SparseEncoder, restore_dense

NAMES = ("own 2d", "own 3d", "own 1d")


def values(run: object, encoder: SparseEncoder, crops: Tensor, seed: int) -> list[Tensor]:
    """Stages, gradients and buffers of one forward and backward under a mask of its own."""
    encoder.zero_grad()
    state = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    grid = [n // 4 for n in crops.shape[2:]]
    maps = run(crops, draw_mask(grid, (4,) * len(grid), seed=seed)).maps  # type: ignore[operator]
    sum(y.square().sum() for y in maps).backward()
    found = [y.detach() for y in maps]
    found += [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    found += [buffer.clone() for buffer in encoder.buffers()]
    for name, buffer in encoder.named_buffers():
        buffer.copy_(state[name])
    return found


def main(compiler: str, names: tuple[str, ...]) -> None:
    for name in names:
        small = ALL[name]
        crops = torch.randn(2, 1, *small.size, dtype=torch.float64)
        for backend in ("packed", "reference"):
            torch._dynamo.reset()
            encoder = SparseEncoder(small.build(), small.stages, len(small.size), backend).double()
            compiled = torch.compile(encoder, backend=compiler)
            for seed, training in ((0, True), (9, True), (9, False)):
                encoder.train(training)
                expected, found = (values(r, encoder, crops, seed) for r in (encoder, compiled))
                torch.testing.assert_close(found, expected)
        network = encoder.network.eval()
        restore_dense(network)
        whole = torch.compile(network, backend=compiler, fullgraph=True)
        torch.testing.assert_close(whole(crops), network(crops))
    print("equal")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], tuple(sys.argv[2:]) or NAMES)
