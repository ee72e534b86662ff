"""What every objective gives: losses, pictures and the encoder's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from spark3d.models.probe import probe
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

NETWORK = "encoder.network."


@dataclass(frozen=True)
class Losses:
    """The number to minimise and what it is made of (for logs; parts need no gradient)."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A self-supervised task around an encoder; all of its work happens inside `forward`.

    Parameters of the network that the encoder's stages do not depend on (a segmentation network's
    own decoder) are frozen, so that every parameter with `requires_grad` gets a gradient.

    Attributes:
        encoder: The masked encoder; its `network` is the user's module.
        found: Channels and strides of the encoder's stages.
        encoder_keys: State-dict keys of `network` that the stages depend on.
    """

    def __init__(self, encoder: SparseEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.found = probe(encoder.network, encoder.stages, encoder.ndim)
        self.encoder_keys = self.found.encoder_keys
        used = set(self.encoder_keys)
        for name, parameter in encoder.network.named_parameters():
            if name not in used:
                parameter.requires_grad_(False)

    @abstractmethod
    def forward(self, crops: Float[Tensor, "b c *size"], mask: CellMask) -> Losses:
        """The losses of a batch of crops of which the encoder sees the visible cells."""

    @abstractmethod
    def reconstruct(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "b c *size"]:
        """The crops with their hidden cells replaced by what the model predicts, for pictures."""

    def tokens(self) -> tuple[str, ...]:
        """Names of the parameters that stand for hidden sites inside the network."""
        return ()

    def rest_state(self) -> dict[str, Tensor]:
        """All tensors but the network's own (decoder, tokens, norms): copies, on the CPU."""
        return {
            key: value.detach().cpu().contiguous().clone()
            for key, value in self.state_dict().items()
            if not key.startswith(NETWORK)
        }

    def load_rest(self, state: Mapping[str, Tensor]) -> str:
        """Load what `rest_state` gave, all of it or nothing; why not, or an empty text."""
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(NETWORK)}
        if odd := sorted(own.keys() ^ state.keys()):
            return f"{len(odd)} tensors are in one of the two alone, such as {odd[0]}"
        if odd := [k for k, v in state.items() if v.shape != own[k].shape]:
            shapes = tuple(state[odd[0]].shape), tuple(own[odd[0]].shape)
            return f"{odd[0]} was {shapes[0]} and is {shapes[1]}"
        self.load_state_dict(dict(state), strict=False)
        return ""

    def encoder_state(self) -> dict[str, Tensor]:
        """Weights of the encoder under the keys of the dense network: copies, on the CPU."""
        state = self.encoder.network.state_dict()
        return {key: state[key].detach().cpu().contiguous().clone() for key in self.encoder_keys}
