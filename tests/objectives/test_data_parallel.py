"""SparK under torch's data parallelism: two processes equal one with the double batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spark3d.models.decoder import LightDecoder
from spark3d.models.densify import Densify
from spark3d.objectives.spark import SparK
from spark3d.sparse import CellMask, SparseEncoder, random_mask

BACKENDS = ("packed", "reference")
WIDTHS = (4, 8)


def objective(backend: str, synchronised: bool) -> SparK:
    """Batch norm in the encoder and in densify; everything has its own random scale."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
    )
    top = LightDecoder(((2, 2), (4, 4)), 1, 8, norm="gn", min_width=8)
    densify = Densify(WIDTHS, top.widths, 2, "bn", top.folds)
    if synchronised:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        densify = nn.SyncBatchNorm.convert_sync_batchnorm(densify)
    encoder = SparseEncoder(
        network, ("0", "1"), 2, "packed" if backend == "packed" else "reference"
    )
    made = SparK(encoder, densify, top).double()
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return made


def whole_batch() -> tuple[Tensor, CellMask]:
    """Four crops; the samples differ in scale, so that local statistics would show."""
    rng = torch.Generator().manual_seed(1)
    crops = torch.randn(4, 1, 16, 16, dtype=torch.float64, generator=rng)
    return crops * torch.tensor([1.0, 2, 5, 9])[:, None, None, None], random_mask(
        4, (4, 4), 0.6, (4, 4), rng
    )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


class Parallel(DistributedDataParallel):
    """Takes SyncBatchNorm on a CPU too: torch's own runs on GPUs alone, the masked one anywhere."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        del module


def worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    crops, mask = whole_batch()
    half = slice(2 * rank, 2 * rank + 2)
    for backend in BACKENDS:
        for way in ("ddp", "nobody averages"):
            made = objective(backend, synchronised=True)
            module = Parallel(made) if way == "ddp" else made
            loss = module(crops[half], CellMask(mask.visible[half], mask.cell_size)).total
            loss.backward()
            found = {
                "loss": loss.detach(),
                "gradients": gradients(made),
                "buffers": dict(made.named_buffers()),
            }
            torch.save(found, f"{folder}/{backend}-{way}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2, join=True)
    return folder


@pytest.mark.ddp
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_equal_one_with_the_double_batch(backend: str, ranks: Path) -> None:
    alone = objective(backend, synchronised=False)
    loss = alone(*whole_batch()).total
    loss.backward()
    found = [torch.load(ranks / f"{backend}-ddp-{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, loss.detach())
    for mine in found:
        torch.testing.assert_close(mine["gradients"], gradients(alone))
        torch.testing.assert_close(mine["buffers"], dict(alone.named_buffers()))


@pytest.mark.ddp
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_averages_are_caught(backend: str, ranks: Path) -> None:
    """HySparK's own wrapper never synchronised: each rank trained a network of its own."""
    alone = objective(backend, synchronised=False)
    alone(*whole_batch()).total.backward()
    first, second = (torch.load(ranks / f"{backend}-nobody averages-{r}.pt") for r in range(2))
    for mine, other in ((first, gradients(alone)), (first, second["gradients"])):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(mine["gradients"], other)
