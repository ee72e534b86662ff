"""Bfloat16 on a CPU that only emulates it is told once, and nothing else changes."""

import logging

import pytest
import torch

from spark3d.engine import precision
from spark3d.engine.precision import cpu_has_bfloat16, warn_of_slow_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "something new"}, None),
    ],
)
def test_capabilities_are_read(monkeypatch, told, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert cpu_has_bfloat16() is expected


def test_an_older_torch_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_has_bfloat16() is None


@pytest.mark.parametrize(
    ("has", "half", "device", "lines"),
    [
        (False, True, CPU, 1),
        (False, False, CPU, 0),
        (True, True, CPU, 0),
        (None, True, CPU, 0),
        (False, True, torch.device("cuda"), 0),
    ],
)
def test_the_warning_is_one_line_with_a_remedy(monkeypatch, caplog, has, half, device, lines):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has)
    with caplog.at_level(logging.WARNING):
        warn_of_slow_bfloat16(device, half, "set optim.precision=32-true")
    assert len(caplog.messages) == lines
    for message in caplog.messages:
        assert message.endswith("; set optim.precision=32-true")
        assert "\n" not in message
