"""`spark3d check`: the table, the layer that leaks, and one line for a mistake."""

from collections.abc import Callable

import pytest
import torch
from conftest import succeeds
from rich.console import Console
from torch import Tensor, nn

from spark3d.commands.check import check_command, check_network
from spark3d.errors import ConfigError
from spark3d.sparse import Masked, register_masked
from spark3d.sparse.slot import Run

QUIET = Console(quiet=True)
TINY = ("dims=[8,16,24,32]", "depths=[1,1,1,1]")
CHECKED: dict[str, tuple[str, ...]] = {
    "channels-last norms": ("timm/convnext_tiny", *TINY, "--dims", "2", "--in-channels", "3"),
    "as many channels as sites": (
        *("timm/convnext_tiny", "dims=[32,32,32,32]", "depths=[1,1,1,1]"),
        *("--dims", "2", "--in-channels", "3"),
    ),
    "response norm": ("timm/convnextv2_tiny", *TINY, "--dims", "2"),
    "inflated": ("timm/test_resnet", "stages=[layer1,layer2]", "--dims", "3", "--ratio", "0.8"),
    "one axis": ("monai/resnet10", "widen_factor=0.125", "--dims", "1"),
    "per axis": (
        *("monai/dynunet", "strides=[1,[1,2,2],2]", "kernel_size=[[1,3,3],3,3]"),
        *("filters=[4,8,8]", "--cell-size", "2,8,4"),
    ),
}


@pytest.mark.parametrize("words", CHECKED.values(), ids=CHECKED)
def test_a_backbone_passes_and_its_table_is_shown(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    succeeds("check", *words)
    text = capsys.readouterr().out
    assert text.count("holds") == 6
    assert "FAILS" not in text
    assert "stride" in text


def test_cells_smaller_than_the_stride_are_checked_on_the_reference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The packed backend refuses them, which is part of what is promised, and is said."""
    words = ("monai/segresnet", "init_filters=8", "blocks_down=[1,1,1]", "--dims", "2")
    succeeds("check", *words, "--cell-size", "2")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert text.count("holds") == 5
    assert "refused" in text


REFUSED = {
    "unknown": (("monai/segresnt",), "try monai/segresnet"),
    "axes": (("monai/segresnet", "--dims", "4"), "choose 1, 2 or 3"),
    "option": (("monai/segresnet", "filters=3"), "does not take these options"),
    "form": (("monai/segresnet", "filters"), "must read"),
    "cell": (("monai/segresnet", "--cell-size", "a"), "one number, or one per axis"),
    "cells": (("monai/segresnet", "--cell-size", "8,8"), "one for each of 3 axes"),
    "a cell that does not fit": (
        ("monai/segresnet", "init_filters=8", "--cell-size", "6", "--dims", "2"),
        "neither a multiple nor a divisor",
    ),
    "attention": (("timm/vit_tiny_patch16_224", "--dims", "2"), "cannot take an input"),
    "weights made anew": (("timm/test_nfnet", "--dims", "2"), "StdConv2d"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes_end_in_one_line(
    words: tuple[str, ...], message: str, fails: Callable[..., str]
) -> None:
    assert message in fails(2, "check", *words)


class Roll(nn.Module):
    """Moves every site by one: a neighbour's cell is read."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class DenseRoll(Masked):
    def masked(self, run: Run, x: Tensor) -> Tensor:
        return self.dense_forward(x)


def own_network(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(nn.ReLU(), middle), nn.Conv2d(4, 8, 2, 2)
    )


def test_a_network_of_ones_own_is_checked_and_stays_as_it_is() -> None:
    network = own_network(nn.BatchNorm2d(4))
    kinds, state = [type(m) for m in network.modules()], network.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    proof = check_network(network, ["1", "2"], 2, in_channels=2, console=QUIET)
    assert proof.passed
    assert (proof.channels, proof.strides) == ((4, 8), ((1, 1), (2, 2)))
    assert [type(m) for m in network.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_the_first_leaking_layer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    register_masked(Roll, DenseRoll)
    with pytest.raises(ConfigError, match=r"does not hold that .* first at layer 1\.1"):
        check_network(own_network(Roll()), ["1", "2"], 2, 2, console=Console(width=160))
    shown = capsys.readouterr().out
    assert "FAILS" in shown
    assert "1.1" in shown


def test_layers_without_a_meaning_and_stages_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match=r"layer '1.1' .*Softmax2d\) cannot be masked"):
        check_network(own_network(nn.Softmax2d()), ["1", "2"], 2, in_channels=2, console=QUIET)
    with pytest.raises(ConfigError, match="no stages named"):
        check_network(own_network(nn.Identity()), ["9"], 2, in_channels=2, console=QUIET)


def test_options_reach_the_network() -> None:
    options = ("init_filters=16", "blocks_down=[1,1]")
    proof = check_command("monai/segresnet", 2, options=options, console=QUIET)
    assert proof.channels == (16, 32)
