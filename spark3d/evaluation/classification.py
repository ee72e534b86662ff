"""Accuracy of classification: how often the right class is among the most likely ones."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LABEL_OF_PADDING = -1
MOST = 5


@dataclass(frozen=True)
class Hits:
    """Counts over images, which add up over batches and ranks.

    Attributes:
        images: That were counted.
        top1: Whose most likely class is the right one.
        top5: Whose right class is among the five most likely (or all, where there are fewer).
        loss: Sum of their cross-entropies.
    """

    images: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    loss: float = 0.0

    def scores(self) -> dict[str, float]:
        """Shares in [0, 1] and the mean loss."""
        count = max(1.0, self.images)
        return {"top1": self.top1 / count, "top5": self.top5 / count, "loss": self.loss / count}

    def tensor(self) -> Tensor:
        """The counts, to be summed over ranks."""
        return torch.tensor([self.images, self.top1, self.top5, self.loss], dtype=torch.float64)

    @classmethod
    def of(cls, counts: Tensor) -> "Hits":
        """From the counts of `tensor`."""
        images, top1, top5, loss = counts.tolist()
        return cls(images, top1, top5, loss)

    def __add__(self, other: "Hits") -> "Hits":
        return Hits.of(self.tensor() + other.tensor())


def count_hits(logits: Tensor, labels: Tensor) -> Hits:
    """Count one batch: logits `(b, classes)`, labels `(b)`, those of -1 left out.

    A class counts as more likely than the right one if its logit is at least as high, so a network
    that gives all classes the same has no hits by the order of the classes. Logits that are not
    numbers are no hits.
    """
    known = labels != LABEL_OF_PADDING
    logits, labels = logits[known].double(), labels[known]
    right = logits.gather(1, labels[:, None])
    below = (logits < right).sum(1)
    rank = logits.shape[1] - 1 - below  # classes that are not less likely than the right one
    numbers = logits.isfinite().all(1)
    return Hits(
        float(known.sum()),
        float(((rank < 1) & numbers).sum()),
        float(((rank < MOST) & numbers).sum()),
        float(functional.cross_entropy(logits, labels, reduction="sum")),
    )
