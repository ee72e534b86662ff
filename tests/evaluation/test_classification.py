"""Top-1 and top-5: known answers, padding left out, ties and what is no number count as wrong."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from spark3d.evaluation.classification import Hits, count_hits


def test_known_answers() -> None:
    """Classes in falling order of likelihood; the right one is 1st, 2nd, 5th, 6th."""
    logits = torch.arange(8.0, 0.0, -1.0).expand(4, 8)
    hits = count_hits(logits, torch.tensor([0, 1, 4, 5]))
    assert (hits.images, hits.top1, hits.top5) == (4, 1, 3)
    expected = torch.nn.functional.cross_entropy(
        logits.double(), torch.tensor([0, 1, 4, 5]), reduction="sum"
    )
    assert math.isclose(hits.loss, float(expected))
    assert hits.scores()["top5"] == 0.75


def test_padding_is_not_counted() -> None:
    logits = torch.eye(3)
    hits = count_hits(logits, torch.tensor([0, -1, 0]))
    assert (hits.images, hits.top1) == (2, 1)


def test_a_network_that_prefers_nothing_or_gives_no_numbers_is_never_right() -> None:
    assert count_hits(torch.zeros(2, 9), torch.tensor([0, 8])).top1 == 0
    assert count_hits(torch.zeros(2, 9), torch.tensor([0, 8])).top5 == 0
    nothing = count_hits(torch.full((2, 3), math.nan), torch.tensor([0, 2]))
    assert (nothing.top1, nothing.top5) == (0, 0)


def test_with_up_to_five_classes_top5_is_all() -> None:
    assert count_hits(torch.randn(7, 4), torch.randint(4, (7,))).scores()["top5"] == 1


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 12), cut=st.integers(1, 19))
def test_counts_are_those_of_sorting_and_add_up_over_batches(
    seed: int, classes: int, cut: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, classes, generator=rng)
    labels = torch.randint(classes, (20,), generator=rng)
    order = logits.argsort(1, descending=True)
    whole = count_hits(logits, labels)
    assert whole.top1 == sum(int(order[i, 0] == labels[i]) for i in range(20))
    assert whole.top5 == sum(int(labels[i] in order[i, :5]) for i in range(20))
    parts = count_hits(logits[:cut], labels[:cut]) + count_hits(logits[cut:], labels[cut:])
    assert (parts.images, parts.top1, parts.top5) == (whole.images, whole.top1, whole.top5)
    assert math.isclose(parts.loss, whole.loss)
    assert Hits().scores() == {"top1": 0.0, "top5": 0.0, "loss": 0.0}
