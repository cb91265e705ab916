"""Strided 1 x 1 convolutions on the CPU drop the pixels that they skip before they convolve."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def subsample_first(network: nn.Module) -> nn.Module:
    """Let strided 1 x 1 convolutions of a network drop the pixels that they skip first, on the CPU and for gradients.

    The result is the same. oneDNN's gradient of the weight of such a convolution in channels_last, with fewer than 16
    input channels (AVX2: 8), writes out of bounds. The modules stay nn.Conv2d, with their stride, and exported graphs
    have the usual convolution.

    Returns:
        The network, changed in place.
    """
    for conv in network.modules():
        skips = isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        if skips and conv.padding in ((0, 0), "valid"):
            conv._conv_forward = partial(_conv_subsampled, conv)
    return network


def _conv_subsampled(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """nn.Conv2d._conv_forward for a 1 x 1 kernel without padding."""
    if not (x.is_cpu and torch.is_grad_enabled()) or torch.compiler.is_exporting():
        return F.conv2d(x, weight, bias, conv.stride, groups=conv.groups)
    return F.conv2d(_Subsample.apply(x, *conv.stride), weight, bias, groups=conv.groups)


class _Subsample(torch.autograd.Function):
    """`x[..., ::rows, ::columns]`, contiguous, with a gradient that is written once and not once for each axis."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: int, columns: int) -> Tensor:
        in_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
        ctx.shape, ctx.stride = x.shape, (rows, columns)
        return x[..., ::rows, ::columns].contiguous(memory_format=ctx.memory_format)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.stride
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format).zero_()
        grad_x[..., ::rows, ::columns] = grad
        return grad_x, None, None
