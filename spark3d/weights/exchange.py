"""Encoder weights on disk (safetensors and a passport) and into networks that share the encoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spark3d.errors import ConfigError, DataError, EnvironmentProblem
from spark3d.models.segmenter import encoder_of
from spark3d.weights.passport import Passport

ENCODER = "encoder.safetensors"
OBJECTIVE = "objective.safetensors"


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of the encoder.

    Attributes:
        matched: Keys loaded as they are.
        reshaped: Keys loaded after adapting the input channels.
        missing: Keys of the network's encoder for which there are no weights.
        unused: Keys of the weights that the network lacks or has in another shape.
        untouched: Keys of the network that keep their values, such as those of its decoder.
        coverage: Share of the encoder's numbers that were loaded.
    """

    matched: tuple[str, ...]
    reshaped: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    untouched: tuple[str, ...]
    coverage: float

    def __str__(self) -> str:
        return (
            f"encoder weights: {len(self.matched)} matched, {len(self.reshaped)} reshaped, "
            f"{len(self.missing)} missing, {len(self.unused)} unused "
            f"({self.coverage:.1%} of the encoder); {len(self.untouched)} tensors stay as they were"
        )


def save_encoder(path: Path | str, state: Mapping[str, Tensor], passport: Passport) -> Passport:
    """Write `path` (`.safetensors`) and its passport (`.json`), each whole or not at all.

    Returns:
        The passport as written, with the hash of the weights' file.
    """
    path = Path(path)
    written = replace(passport, sha256=save_tensors(path, state))
    with whole_file(passport_path(path)) as part:
        part.write_text(written.to_json(), encoding="utf-8")
    return written


def save_tensors(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, whole or not at all; the SHA-256 of the file."""
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with whole_file(path) as part:
        save_file(plain, part, metadata={"format": "pt"})  # several entries come in random order
        return file_sha256(part)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to; it becomes `path` at the end, and vanishes if anything goes wrong.

    Raises:
        EnvironmentProblem: safetensors could not write (it hides what the system said).
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except SafetensorError as error:
        raise EnvironmentProblem(
            f"cannot write {path} ({error}); free space or check rights, then repeat the command"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def load_encoder(path: Path | str) -> tuple[dict[str, Tensor], Passport]:
    """Read what `save_encoder` wrote and check it against its passport.

    Args:
        path: The weights, or the folder of the run (or conversion) that wrote them.

    Raises:
        DataError: A file is missing or damaged, or the two do not belong together.
    """
    path = encoder_file(path)
    note = passport_path(path)
    for needed in (path, note):
        if not needed.is_file():
            raise DataError(
                f"{needed} not found; encoder weights are two files, {path.name} and {note.name}"
                "; checkpoints of other programs: `spark3d weights import FILE --as BACKBONE`"
            )
    passport = Passport.from_json(note.read_text(encoding="utf-8", errors="replace"), str(note))
    if passport.sha256 and file_sha256(path) != passport.sha256:
        raise DataError(
            f"{path} is damaged or is not the file that {note.name} describes (its SHA-256 "
            "differs); copy both again from the run that wrote them"
        )
    try:
        return load_file(path), passport
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); copy it again from the run that wrote it"
        ) from error


def load_into(
    network: nn.Module,
    state: Mapping[str, Tensor],
    min_coverage: float = 0.95,
    passport: Passport | None = None,
    backbone: str | None = None,
) -> LoadReport:
    """Load encoder weights into a backbone's network or a segmentation network around it.

    If only the number of input channels differs, the convolutions that read the input are adapted
    to it (`adapt_channels`): the first one, and those that have as many inputs in both, such as a
    shortcut beside it. The network's encoder is everything under the same top-level names as the
    weights; where it has more than the weights bring, that counts as missing.

    Args:
        network: A backbone's network or what `build_segmenter` made of it.
        state: Encoder weights under dense keys.
        min_coverage: Least share of the encoder's numbers that must fit.
        passport: Of the weights; with `backbone`, the names must agree.
        backbone: Name of the network's backbone.

    Raises:
        ConfigError: Another backbone, or a coverage below `min_coverage`; nothing is loaded.
    """
    if passport is not None and backbone is not None and passport.backbone != backbone:
        raise ConfigError(
            f"the weights come from {passport.backbone}, the network is {backbone}; choose "
            f"model.backbone={passport.backbone} or other weights"
        )
    target = encoder_of(network)
    own = target.state_dict()
    stem = next((key for key, value in own.items() if value.ndim >= 3), "")
    fitted: dict[str, Tensor] = {}
    reshaped: tuple[str, ...] = ()
    for key, value in state.items():
        if key in own and own[key].shape == value.shape:
            fitted[key] = value
        elif all(_inputs(t, key) == _inputs(t, stem) is not None for t in (own, state)):
            adapted = adapt_channels(value, own[key].shape)
            if adapted is not None:
                fitted[key] = adapted
                reshaped = (*reshaped, key)
    unused = tuple(key for key in state if key not in fitted)
    parts = {key.split(".")[0] for key in state}
    shared = {own[key].data_ptr() for key in fitted}  # tensors may have several names
    missing = tuple(
        k
        for k in own
        if k.split(".")[0] in parts and k not in unused and own[k].data_ptr() not in shared
    )
    coverage = _coverage(fitted, [own[k] for k in missing] + [state[k] for k in unused])
    if not fitted or coverage < min_coverage:
        raise ConfigError(
            f"the weights cover {coverage:.1%} of the encoder, {min_coverage:.0%} are needed: "
            f"{len(unused)} tensors of the file do not fit ({_some(unused)}), {len(missing)} of "
            f"the network get nothing ({_some(missing)}); build the network with the backbone and "
            "options of the weights' passport"
        )
    with torch.no_grad():
        for key, value in fitted.items():
            own[key].copy_(value)
    matched = tuple(key for key in fitted if key not in reshaped)
    untouched = _untouched(network, target, fitted)
    return LoadReport(matched, reshaped, missing, unused, untouched, coverage)


def _inputs(tensors: Mapping[str, Tensor], key: str) -> int | None:
    """Channels that a convolution reads, None for what is none."""
    return tensors[key].shape[1] if key in tensors and tensors[key].ndim >= 3 else None


def _coverage(fitted: Mapping[str, Tensor], lost: list[Tensor]) -> float:
    """Share of the encoder's numbers that are loaded."""
    loaded = sum(value.numel() for value in fitted.values())
    return loaded / max(1, loaded + sum(value.numel() for value in lost))


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "") if keys else "none"


def adapt_channels(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """A convolution's weight for another number of input channels, None where more differs.

    Every new channel gets the mean over the old ones times old / new: the sum over channels, so
    the response to channels that are all equal, stays the same. RGB to one channel is thus the sum,
    one channel to n the repeated weight over n.
    """
    same = weight.ndim == len(shape) >= 3 and weight.shape[0] == shape[0]
    if not same or weight.shape[2:] != shape[2:]:
        return None
    scale = weight.shape[1] / shape[1]
    return (weight.mean(1, keepdim=True) * scale).expand(shape).clone()


def save_objective(path: Path | str, state: Mapping[str, Tensor]) -> str:
    """Write the rest of a pre-training beside the encoder weights `path`; its SHA-256.

    It goes before the encoder weights, whose passport bears the hash.
    """
    return save_tensors(Path(path).with_name(OBJECTIVE), state)


def load_objective(path: Path | str, passport: Passport) -> dict[str, Tensor]:
    """What `save_objective` wrote beside the encoder weights; nothing if they came alone.

    Raises:
        DataError: It is damaged or of another run.
    """
    file = encoder_file(path).with_name(OBJECTIVE)
    if not passport.objective_sha256 or not file.is_file():
        return {}
    if file_sha256(file) != passport.objective_sha256:
        raise DataError(
            f"{file} is damaged or of another run (its SHA-256 differs); copy it again, or remove "
            "it to start that part from random weights"
        )
    return load_file(file)


def encoder_file(path: Path | str) -> Path:
    """The weights' file, given it or the folder it stands in."""
    path = Path(path)
    return path / ENCODER if path.is_dir() else path


def passport_path(path: Path | str) -> Path:
    """Where the passport of the weights at `path` stands."""
    return Path(path).with_suffix(".json")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _untouched(
    network: nn.Module, target: nn.Module, fitted: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Keys of `network` whose tensors were not loaded, shared ones under one name only."""
    loaded = {target.state_dict(keep_vars=True)[key].data_ptr() for key in fitted}
    return tuple(
        key
        for key, value in network.state_dict(keep_vars=True).items()
        if value.data_ptr() not in loaded
    )
