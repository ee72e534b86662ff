"""The depthwise convolution equals PyTorch's, gradients included, and serves dense networks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark3d.sparse.depthwise import depthwise_conv
from spark3d.sparse.functional import CONV


@given(
    ndim=st.integers(1, 3),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    channels_last=st.booleans(),
)
def test_output_and_gradients_are_exact(
    ndim: int, kernel: int, stride: int, padding: int, dilation: int, channels_last: bool
) -> None:
    size = (9, 10, 11)[:ndim]
    x = torch.randn(2, *size, 3).movedim(-1, 1) if channels_last else torch.randn(2, 3, *size)
    weight, bias = torch.randn(3, 1, *[kernel] * ndim), torch.randn(3)
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    found = depthwise_conv(*inputs, stride, padding, dilation)
    expected = CONV[ndim](*inputs, stride, padding, dilation, 3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_settings_per_axis() -> None:
    x, weight = torch.randn(1, 2, 6, 8), torch.randn(2, 1, 1, 5)
    found = depthwise_conv(x, weight, None, (1, 2), (0, 2))
    torch.testing.assert_close(found, CONV[2](x, weight, None, (1, 2), (0, 2), 1, 2))


def test_autocast_gives_low_precision_and_float32_gradients() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight, bias = torch.randn(3, 1, 3, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, bias, 1, 1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for tensor in (x, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad, torch.full((3,), 128.0))


def test_only_needed_gradients_are_computed() -> None:
    x, weight = torch.randn(1, 2, 5), torch.randn(2, 1, 3, requires_grad=True)
    depthwise_conv(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad[:, 0, 1], x[0, :, 1:4].sum(1))


def test_second_derivatives_are_refused_not_wrong() -> None:
    x, weight = torch.randn(1, 2, 5, requires_grad=True), torch.randn(2, 1, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(depthwise_conv(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
