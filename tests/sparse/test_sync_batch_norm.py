"""SyncBatchNorm weights processes by their visible rows: two equal one with both batches."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from both_backends import draw_mask
from torch import nn

from spark3d.sparse import SparseEncoder
from spark3d.sparse.cells import pack
from spark3d.sparse.mask import CellMask

STAGES, BACKENDS = ("0", "2", "3"), ("packed", "reference")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.SyncBatchNorm(3),
        nn.Conv2d(3, 3, 3, 2, 1),
        nn.SyncBatchNorm(3),
    ).double()


def halves() -> list[tuple[torch.Tensor, CellMask]]:
    """Two batches with different counts of visible rows."""
    torch.manual_seed(1)
    masks = [draw_mask((3, 4), (4, 4), 0.5, batch=1), draw_mask((3, 4), (4, 4), 0.75, batch=1)]
    return [(torch.randn(1, 1, 12, 16, dtype=torch.float64), mask) for mask in masks]


def worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for backend in BACKENDS:
        net = network()
        encoder = SparseEncoder(net, STAGES, 2, backend)
        crops, mask = halves()[rank]
        pyramid = encoder(crops, mask).dense()
        pyramid[2].square().sum().backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
        found = {
            "features": pyramid[2].detach(),
            "grads": [p.grad for p in net.parameters()],
            "buffers": dict(net.named_buffers()),
        }
        torch.save(found, f"{folder}/{backend}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=True)
    net = network()
    expected = one_process(net)
    for backend, rank in itertools.product(BACKENDS, range(2)):
        found = torch.load(tmp_path / f"{backend}-{rank}.pt")
        torch.testing.assert_close(found["features"], expected[rank].detach())
        for mine, parameter in zip(found["grads"], net.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(found["buffers"][name], buffer)


def one_process(net: nn.Module) -> list[torch.Tensor]:
    """The same step by hand: plain BatchNorm over the visible rows of both batches together."""
    conv1, norm1, conv2, norm2 = net
    sizes, maps = [(12, 16), (6, 8)], [x * mask.at((12, 16)) for x, mask in halves()]
    masks = [mask for _, mask in halves()]
    for conv, norm, size in ((conv1, norm1, sizes[0]), (conv2, norm2, sizes[1])):
        maps = [conv(x) for x in maps]
        keeps = [mask.at(size)[:, 0] for mask in masks]
        rows = [x.movedim(1, -1)[keep] for x, keep in zip(maps, keeps, strict=True)]
        normed = nn.BatchNorm1d.forward(as_batch_norm(norm), torch.cat(rows)).split(
            [len(r) for r in rows]
        )
        maps = []
        for keep, y in zip(keeps, normed, strict=True):
            full = y.new_zeros(1, *size, 3)
            full[keep] = y
            maps.append(full.movedim(-1, 1))
    sum(x.square().sum() for x in maps).backward()
    return maps


def as_batch_norm(norm: nn.SyncBatchNorm) -> nn.BatchNorm1d:
    """A BatchNorm1d on the very parameters and buffers of `norm`."""
    plain = nn.BatchNorm1d(norm.num_features)
    plain.weight, plain.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(plain, name, buffer)
    return plain


def test_in_one_process_it_is_batch_norm() -> None:
    net = network()
    twin = nn.BatchNorm2d(3).double()
    crops, mask = halves()[0]
    encoder = SparseEncoder(net, ("0", "1"), 2)
    before, after = encoder(crops, mask)
    torch.testing.assert_close(after, twin(before))
    torch.testing.assert_close(net[1].running_var, twin.running_var)
    assert after.shape == pack(torch.zeros(1, 3, 12, 16), mask).shape
