"""Conversions of encoder weights: from other programs, from 2D to 3D, to other input channels.

Each gives the new weights with a report of what became of every key, after both networks have been
compared on their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.volumetric import DEPTHS, inflate
from spark3d.weights.equality import agree, features, noise, replicated_depth
from spark3d.weights.exchange import load_into
from spark3d.weights.foreign import Foreign, plain_keys
from spark3d.weights.official import sort_keys
from spark3d.weights.passport import Passport

HEADS = ("fc.", "head.", "classifier.", "last_linear.", "conv_seg.")
"""What comes after the last stage in published checkpoints."""
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class KeyReport:
    """What became of every tensor.

    Attributes:
        matched: Keys taken over as they are.
        reshaped: Keys taken over in another shape, with both shapes.
        missing: Keys of the network that the weights lack and that keep their start value.
        left_out: Keys of the weights that are not needed, by the reason.
    """

    matched: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    missing: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each kind that there is, with the first few keys."""
        told = [f"matched   {len(self.matched)}"]
        changes = [f"{key} {_shape(old)} -> {_shape(new)}" for key, old, new in self.reshaped]
        if changes:
            told.append(f"reshaped  {len(changes)}: {some(changes)}")
        told.append(f"missing   {len(self.missing)}" + _listed(self.missing))
        told += [f"left out  {len(k)}{_listed(k)} ({why})" for why, k in self.left_out.items() if k]
        return told


@dataclass(frozen=True)
class Converted:
    """New weights.

    Attributes:
        state: Of the encoder, under dense keys.
        passport: To go with them.
        objective: Further tensors of the pre-training, under the names of the objective.
        report: Of the keys.
        equality: What was compared and how well it agrees.
    """

    state: dict[str, Tensor]
    passport: Passport
    objective: dict[str, Tensor]
    report: KeyReport
    equality: str


def import_foreign(
    found: Foreign,
    source: str,
    name: str,
    ndim: int,
    in_channels: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Converted:
    """Encoder weights for the backbone `name` from a checkpoint of another program.

    Args:
        found: What the file held.
        source: What to call it in messages and in the passport.
        name: Of the backbone, see `build_backbone`.
        ndim: Number of spatial axes.
        in_channels: What reads the input is adapted to so many; by default those of the checkpoint.
        options: Of the backbone.

    Raises:
        ConfigError: Keys that the backbone lacks or misses, or of another shape; names some.
    """
    given = dict(options or {})
    theirs = build_backbone(name, ndim, in_channels or 3, **given)
    sorted_ = sort_keys(plain_keys(found.state, theirs.network.state_dict().keys()))
    channels = _stem_channels(theirs, sorted_.encoder)
    if channels != theirs.in_channels:
        theirs = build_backbone(name, ndim, channels, **given)
    report = _fill(theirs, sorted_.encoder, source)
    odd = [k for k in sorted_.objective if not k.startswith(("densify.stages.", "decoder."))]
    if odd:
        raise ConfigError(f"{source} has keys of no known part of official SparK: {some(odd)}")
    left = {**report.left_out, "buffers the official code does not use": sorted_.unused}
    passport = Passport(
        backbone=name,
        ndim=ndim,
        in_channels=channels,
        options=dict(theirs.options),
        axes="",
        intensity={"normalise": "imagenet"} if sorted_.official else {},
        objective="spark" if sorted_.official else "",
        history=(f"imported from {source}",),
    )
    imported = Converted(
        encoder_state(theirs), passport, sorted_.objective, replace(report, left_out=left), ""
    )
    if in_channels is not None and in_channels != channels:
        return _then(imported, change_channels(imported.state, passport, in_channels))
    again = rebuilt(passport)
    load_into(again.network, imported.state, 1.0)
    crops = noise(theirs)
    claim = f"the imported encoder gives the features of {name} with that checkpoint"
    equality = agree(claim, theirs.stages, features(theirs, crops), features(again, crops))
    return replace(imported, equality=equality)


def change_channels(state: Mapping[str, Tensor], passport: Passport, channels: int) -> Converted:
    """Encoder weights for another number of input channels, see `exchange.adapt_channels`.

    Channels that are all equal give the features that they gave before.
    """
    old = rebuilt(passport)
    load_into(old.network, state, 1.0)
    changed = replace(
        passport,
        in_channels=channels,
        objective_sha256="",
        history=(*passport.history, f"input channels {passport.in_channels} -> {channels}"),
    )
    new = rebuilt(changed)
    loaded = load_into(new.network, state, 1.0)
    reshaped = tuple(_change(key, state[key], new.network) for key in loaded.reshaped)
    grey, axes = noise(old, 1), (-1,) * passport.ndim
    before, after = (grey.expand(1, n, *axes) for n in (passport.in_channels, channels))
    weights = encoder_state(new)
    claim = f"{channels} equal channels give the features of {passport.in_channels} equal channels"
    equality = agree(claim, old.stages, features(old, before), features(new, after))
    return Converted(weights, changed, {}, KeyReport(loaded.matched, reshaped), equality)


def inflate_to_3d(
    state: Mapping[str, Tensor], passport: Passport, depth: str = "mean"
) -> Converted:
    """Weights of the 3D twin of a 2D encoder; the new axis is the first.

    Args:
        state: Of the 2D encoder.
        passport: Of the 2D encoder.
        depth: How kernels grow, see `models.volumetric.to_volumetric`; networks that MONAI has in
            both dimensions take "mean" and "centre".

    Raises:
        ConfigError: Not 2D, no 3D twin, unknown `depth`, shapes that do not correspond.
    """
    if passport.ndim != 2:
        raise ConfigError(f"the encoder is {passport.ndim}D already; only 2D ones are inflated")
    if depth not in DEPTHS:
        raise ConfigError(f"depth={depth!r} is unknown; choose one of {', '.join(DEPTHS)}")
    theirs = passport.backbone.startswith("timm/")
    if depth == "flat" and not theirs:
        raise ConfigError(f"{passport.backbone} has no flat 3D twin; choose depth mean or centre")
    old = rebuilt(passport)
    load_into(old.network, state, 1.0)
    changed = replace(
        passport,
        ndim=3,
        axes="",
        objective_sha256="",
        options={**passport.options, **({"depth": depth} if theirs else {})},
        history=(*passport.history, f"inflated from 2D to 3D, depth={depth}"),
    )
    new = rebuilt(changed)
    own, grown, reshaped = new.network.state_dict(), {}, []
    for key, value in state.items():
        wanted = tuple(own[key].shape) if key in own else ()
        if value.ndim == 4 and len(wanted) == 5 and wanted[:2] + wanted[3:] == tuple(value.shape):
            grown[key] = inflate(value, depth, wanted[2])
            reshaped.append((key, tuple(value.shape), wanted))
        else:
            grown[key] = value
    load_into(new.network, grown, 1.0)
    weights = encoder_state(new)
    matched = tuple(key for key in state if key not in {key for key, *_ in reshaped})
    report = KeyReport(matched, tuple(reshaped))
    return Converted(weights, changed, {}, report, _same_slices(old, new, depth))


def _same_slices(old: Backbone, new: Backbone, depth: str) -> str:
    """Compare a volume that is constant along depth with its slice."""
    image = noise(old)
    slices = max(2, new.stride[0])
    volume = image.unsqueeze(2).expand(-1, -1, slices, -1, -1)
    if depth == "mean":
        claim = (
            "a volume that is constant along the first axis gives the 2D features at every slice "
            "that does not see beyond the volume's ends, where zeros are padded"
        )
        with replicated_depth(new.network):
            found = features(new, volume)
    else:
        claim = (
            "a volume that is constant along the first axis gives the 2D features at every slice"
        )
        found = features(new, volume)
    wanted = [
        plane.unsqueeze(2).expand_as(stage)
        for plane, stage in zip(features(old, image), found, strict=True)
    ]
    return agree(claim, old.stages, wanted, found)


def encoder_state(backbone: Backbone) -> dict[str, Tensor]:
    """Copies of the tensors that the stages depend on."""
    state = backbone.network.state_dict()
    return {key: state[key].detach().clone() for key in backbone.encoder_keys}


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def rebuilt(passport: Passport) -> Backbone:
    """The network that a passport describes, with random weights."""
    return build_backbone(
        passport.backbone, passport.ndim, passport.in_channels, **passport.options
    )


def _fill(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> KeyReport:
    """Put the weights into the backbone's network, all of its encoder or nothing.

    Raises:
        ConfigError: Unknown, missing or ill-fitting keys.
    """
    own, encoder = backbone.network.state_dict(), set(backbone.encoder_keys)
    head = tuple(k for k in state if k not in encoder and (k in own or k.startswith(HEADS)))
    unknown = [k for k in state if k not in own and k not in head]
    missing = [k for k in backbone.encoder_keys if k not in state]
    lost = [k for k in missing if not k.endswith(COUNTER)]
    if unknown or lost:
        wrong = [f"{len(unknown)} keys that it lacks ({some(unknown)})"] if unknown else []
        wrong += [f"nothing for {len(lost)} of its keys ({some(lost)})"] if lost else []
        raise ConfigError(
            f"{source} is not a {backbone.name}: it has {' and '.join(wrong)}; give --as the "
            "network it is of, and --options where its sizes are not the usual ones"
        )
    fits = {k: v for k, v in state.items() if k in encoder}
    for key, value in fits.items():
        if value.shape != own[key].shape:
            raise ConfigError(
                f"{source}: {key} is {_shape(value.shape)}, in {backbone.name} "
                f"{_shape(own[key].shape)}; give --as the network it is of, or --options"
            )
    backbone.network.load_state_dict({**own, **fits})
    left = {"not part of the encoder": head}
    return KeyReport(tuple(fits), (), tuple(missing), left)


def _stem_channels(backbone: Backbone, state: Mapping[str, Tensor]) -> int:
    """Input channels of the checkpoint's first convolution."""
    own = backbone.network.state_dict()
    stem = next(k for k in backbone.encoder_keys if own[k].ndim >= 3)
    if stem not in state or state[stem].ndim != own[stem].ndim:
        return backbone.in_channels
    return state[stem].shape[1]


def _then(first: Converted, second: Converted) -> Converted:
    """Two conversions, one after the other, in one report."""
    changed = {key for key, *_ in second.report.reshaped}
    matched = tuple(key for key in first.report.matched if key not in changed)
    report = replace(first.report, matched=matched, reshaped=second.report.reshaped)
    return replace(second, objective=first.objective, report=report)


def _change(
    key: str, value: Tensor, network: nn.Module
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return key, tuple(value.shape), tuple(network.state_dict()[key].shape)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _listed(keys: Sequence[str]) -> str:
    return f": {some(keys)}" if keys else ""
