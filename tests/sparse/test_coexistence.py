"""Encoders, masks, views, threads, copies and dense use do not get in each other's way."""

import copy
import pickle
import threading

import pytest
import torch
from both_backends import draw_mask
from contract import plain_batch, plain_encoder
from torch import Tensor, nn

from spark3d.sparse import CellMask, Masked, SparseEncoder, restore_dense, sparsify
from spark3d.sparse.slot import MaskSlot


@pytest.fixture
def encoder() -> SparseEncoder:
    return plain_encoder()


@pytest.fixture
def batch() -> tuple[Tensor, CellMask]:
    return plain_batch()


def test_two_encoders_two_masks_and_dense_use_coexist(batch: tuple) -> None:
    first, second = (plain_encoder() for _ in range(2))
    crops, mask = batch
    other = draw_mask((3, 4), (4, 4), seed=9)
    for encoder in (first, second):
        encoder.eval()
    alone = [
        first(crops, mask)[2],
        first(crops, other)[2],
        second(crops, mask)[2],
        first.dense(crops)[2],
    ]
    a, d, b, c = (
        first(crops, mask)[2],
        first.dense(crops)[2],
        first(crops, other)[2],
        second(crops, mask)[2],
    )
    assert all(map(torch.equal, alone, [a, b, c, d]))


def test_two_views_give_the_sum_of_their_gradients(encoder: SparseEncoder, batch: tuple) -> None:
    crops, mask = batch
    other = draw_mask((3, 4), (4, 4), seed=9)
    encoder.eval()

    def grads(*masks: CellMask) -> list[Tensor]:
        encoder.zero_grad()
        sum(encoder(crops, m)[2].square().sum() for m in masks).backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    for joint, one, two in zip(grads(mask, other), grads(mask), grads(other), strict=True):
        torch.testing.assert_close(joint, one + two)


def test_threads_do_not_share_masks(encoder: SparseEncoder, batch: tuple) -> None:
    crops = batch[0]
    encoder.eval()
    masks = [draw_mask((3, 4), (4, 4), seed=s) for s in range(4)]
    expected = [encoder(crops, mask)[2] for mask in masks]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(encoder(crops, masks[number])[2], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles_work_and_are_independent(encoder: SparseEncoder, batch: tuple) -> None:
    encoder.eval()
    expected = encoder(*batch)[2]
    twin = copy.deepcopy(encoder)
    assert twin.slot is not encoder.slot
    assert all(m.mask_slot.slot is twin.slot for m in twin.modules() if isinstance(m, Masked))
    assert torch.equal(twin(*batch)[2], expected)
    nn.init.zeros_(twin.network.stem[0].weight)
    assert torch.equal(encoder(*batch)[2], expected)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Softmax2d())
    sparsify(network, MaskSlot())
    again = pickle.loads(pickle.dumps(network))
    assert [type(m) for m in again.modules()] == [type(m) for m in network.modules()]
    restore_dense(again)
    assert type(again[2]) is nn.Softmax2d


def test_a_module_registered_twice_stays_one_module() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(nn.Sequential(conv), conv)
    hook = conv.register_forward_hook(lambda *_: None)
    sparsify(network, MaskSlot())
    assert network[0][0] is network[1] is conv
    assert hook.id in conv._forward_hooks
    assert list(network.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert network[0][0].weight is network[1].weight
