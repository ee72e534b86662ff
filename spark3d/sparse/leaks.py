"""Proof, on random weights, crops and masks, that a masked encoder does what it claims.

Hidden voxels and whatever layers leave at hidden sites never change a visible feature; the packed
backend equals the reference; the conversion can be undone exactly. A failure names the first layer
at which it shows. Nothing of the encoder is touched: everything runs on a float64 copy.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spark3d.sparse.cells import unpack
from spark3d.sparse.convert import restore_dense
from spark3d.sparse.encoder import Backend, SparseEncoder, stage_outputs
from spark3d.sparse.geometry import nearest_sizes
from spark3d.sparse.layers import Masked
from spark3d.sparse.mask import CellMask, random_mask
from spark3d.sparse.trial import Trial

TOLERANCE = 1e-8
"""Largest difference, relative to the largest value, that counts as rounding in float64."""


@dataclass(frozen=True)
class Check:
    """What was checked, whether it holds, the layer where it first fails, and details."""

    claim: str
    passed: bool
    layer: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Proof:
    """What `prove` found: the checks, and channels and strides of every stage."""

    checks: tuple[Check, ...]
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def passed(self) -> bool:
        """Every claim holds."""
        return all(check.passed for check in self.checks)

    @property
    def first_leak(self) -> str:
        """The layer at which the first failing claim shows, empty if all hold."""
        return next((check.layer for check in self.checks if not check.passed), "")


def prove(
    encoder: SparseEncoder,
    size: Sequence[int],
    cell_size: Sequence[int] | int,
    in_channels: int = 1,
    ratio: float = 0.6,
    batch: int = 2,
    seed: int = 0,
) -> Proof:
    """Check an encoder on random crops of `size` voxels under a random mask.

    Args:
        encoder: any encoder; it is copied, and weights of the copy that are trivial drawn anew.
        size: voxels of a crop per axis.
        cell_size: voxels of a cell per axis.
        in_channels: channels of a crop.
        ratio: share of hidden cells.
        batch: crops.
        seed: of weights, crops and masks.

    Raises:
        ValueError: `size` is not a multiple of `cell_size`, or does not fit the network.
        TypeError: the network has a layer without a masked meaning.
    """
    cell = (cell_size,) * len(size) if isinstance(cell_size, int) else tuple(cell_size)
    misfit = nearest_sizes(size, cell)
    if misfit:
        raise ValueError(misfit)
    rng = torch.Generator().manual_seed(seed)
    encoder = _copy(encoder, rng)
    device = next(encoder.parameters()).device
    mask = random_mask(batch, [n // c for n, c in zip(size, cell, strict=True)], ratio, cell, rng)
    mask = mask.to(device)
    crops = torch.randn(batch, in_channels, *size, generator=rng, dtype=torch.float64).to(device)
    trial = Trial(encoder, crops, mask, seed)
    maps, strides = trial.find_maps()
    checks = (
        _hidden_voxels(trial, "reference"),
        _hidden_sites(trial),
        *_packed(trial),
        _nothing_hidden(trial),
        _undone(trial),
    )
    return Proof(checks, tuple(y.shape[1] for y in maps), strides)


def _copy(encoder: SparseEncoder, rng: torch.Generator) -> SparseEncoder:
    """A float64 copy in training mode without element dropout, no parameter constant or tiny."""
    encoder = copy.deepcopy(encoder).double().train()
    for layer in encoder.modules():
        if isinstance(layer, nn.Dropout | nn.AlphaDropout):
            layer.eval()
    for weight in encoder.parameters():
        if weight.ndim <= 1 or float(weight.detach().std()) < 1e-3:
            noise = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
            weight.data.copy_(0.5 + 0.2 * noise)
    return encoder


def _hidden_voxels(trial: Trial, backend: Backend) -> Check:
    """Replace every hidden voxel by large noise; compare bit for bit, layer by layer."""
    keep = trial.mask.at(trial.mask.size)
    noise = 1e3 * torch.randn_like(trial.crops)
    before, seen = trial.outputs(backend)
    leaking = ""

    def compare(call: int, name: str, y: Tensor) -> None:
        nonlocal leaking
        if not leaking and not torch.equal(seen[call], trial.visible(call, y)):
            leaking = name

    after = trial.run(backend, torch.where(keep, trial.crops, noise), hook=compare)
    same = all(map(torch.equal, before.maps, after.maps))
    claim = f"hidden voxels never change a visible feature ({backend})"
    return Check(claim, same, "" if same else leaking)


def _hidden_sites(trial: Trial) -> Check:
    """Put noise at the hidden sites of every map on its way; visible features must not notice.

    The innermost layer whose own visible output changes is the one that read a hidden site.
    """
    before, seen = trial.outputs("reference")
    leaking = ""

    def poison(call: int, name: str, y: Tensor) -> Tensor | None:
        nonlocal leaking
        if not leaking and not torch.equal(seen[call], trial.visible(call, y)):
            leaking = name
        axes = trial.axes_of(call, y)
        if not axes:
            return None
        noise = 7.0 + torch.arange(y.numel(), device=y.device).view_as(y) % 13
        return trial.where_hidden(axes, y, noise.to(y.dtype))

    after = trial.run("reference", hook=poison)
    same = all(map(torch.equal, before.maps, after.maps))
    return Check("no layer reads what hidden sites hold", same, "" if same else leaking)


def _packed(trial: Trial) -> tuple[Check, ...]:
    """The packed features equal the reference, and hidden voxels do not reach them either."""
    claim = "packed equals reference"
    reference, seen = trial.outputs("reference")
    differing = ""

    def compare(call: int, name: str, y: Tensor) -> None:
        nonlocal differing
        axes = trial.axes[call]
        if differing or len(axes) != trial.mask.ndim or y.shape[0] != trial.rows:
            return
        dense = unpack(_channels_first(y, axes), trial.mask)
        if _apart(dense, _channels_first(seen[call], axes)) > TOLERANCE:
            differing = name

    try:
        packed = trial.run("packed", hook=compare).dense()
    except ValueError as error:
        trial.fits_packed = False
        refused = trial.chosen == "reference"
        return (Check(claim, refused, detail=f"packed backend refused: {error}"),)
    apart = max(map(_apart, packed.maps, reference.maps))
    same = apart <= TOLERANCE
    first = Check(claim, same, "" if same else differing, f"largest difference {apart:.1e}")
    return first, _hidden_voxels(trial, "packed")


def _nothing_hidden(trial: Trial) -> Check:
    """With every cell visible and fixed statistics, both backends are the dense network."""
    claim = "with nothing hidden, features equal the dense network's"
    encoder = trial.encoder.eval()
    everything = CellMask(torch.ones_like(trial.mask.visible), trial.mask.cell_size)
    with torch.no_grad():
        dense = encoder.dense(trial.crops)
    apart = max(map(_apart, trial.run("reference", mask=everything).maps, dense))
    if trial.fits_packed:
        packed = trial.run("packed", mask=everything).dense()
        apart = max(apart, *map(_apart, packed.maps, dense))
    encoder.train()
    return Check(claim, apart <= TOLERANCE, detail=f"largest difference {apart:.1e}")


def _undone(trial: Trial) -> Check:
    """A converted and restored network has its own classes, state and features, bit for bit."""
    claim = "the conversion is undone exactly"
    network = copy.deepcopy(trial.encoder.network).eval()
    state = trial.encoder.network.state_dict()
    restore_dense(network)
    left = [
        n for n, m in network.named_modules() if isinstance(m, Masked) or "mask_slot" in vars(m)
    ]
    if left:
        return Check(claim, False, left[0], "still mask-aware")
    restored = network.state_dict()
    if list(state) != list(restored) or not all(
        map(torch.equal, state.values(), restored.values())
    ):
        return Check(claim, False, detail="the state dict changed")
    with torch.no_grad():
        features = stage_outputs(network, trial.encoder.stages, trial.crops)
        masked = trial.encoder.eval().dense(trial.crops)
    same = all(map(torch.equal, features, masked))
    return Check(claim, same, detail="" if same else "dense features differ")


def _channels_first(y: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`y` with its spatial `axes` last."""
    return y.movedim(axes, tuple(range(y.ndim - len(axes), y.ndim)))


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
