"""Convolution, BatchNorm and ReLU with as few passes over memory as possible.

PyTorch's operators compute `norm_relu` and `conv_norm_relu` until `enable` has compiled the kernels of kernels/ for
this machine's CPU; then the kernels do, wherever they apply. Results are equal up to rounding, and modules, weights and
checkpoints are the same.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.compute import CheapConvNormReLU, NormReLU, infer_cheap_conv, infer_norm_relu
from model.kernels.conditions import LANES, MOST_CHANNELS, applies, is_computable, is_itself, separable
from model.kernels.library import KernelsUnavailable, disable, enable, kernels_hash, load  # noqa: F401


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(x))`, plus `residual` if there is one. (B, C, H, W) -> (B, C, H, W)."""
    if is_computable(x) and applies(norm, x, x.shape, residual):
        residual = _in_channels_last(residual)
        if not norm.training:
            return infer_norm_relu(norm, x, residual)
        norm.num_batches_tracked.add_(1)
        return NormReLU.apply(x, norm.weight, norm.bias, norm, residual)
    out = F.relu(norm(x))
    return out if residual is None else out + residual


def conv_norm_relu(conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(conv(x)))`, plus `residual` if there is one. (B, C, H, W) -> (B, O, H', W')."""
    return conv_norm_relu_and_input(conv, norm, x, residual)[0]


def conv_norm_relu_and_input(
    conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`conv_norm_relu`, and x again, for what else is made of it: its gradients then are summed as they are written."""
    if is_computable(x) and (stages := separable(conv, x)):
        filters, mixing, stride = stages
        group, (batch, channels, height, width), out_channels = filters.shape[1], x.shape, mixing.shape[0]
        size = batch, out_channels, -(-height // stride), -(-width // stride)
        if max(channels, out_channels) <= MOST_CHANNELS[x.dtype] and applies(norm, x, size, residual):
            residual = _in_channels_last(residual)
            if not norm.training and (LANES % group == 0 or group % LANES == 0):
                return infer_cheap_conv(x, filters, mixing, stride, norm, residual), x
            if norm.training and group == 1:
                norm.num_batches_tracked.add_(1)
                weights = filters.contiguous(), mixing.contiguous(), norm.weight, norm.bias
                return CheapConvNormReLU.apply(x, *weights, stride, norm, residual)
        if group > 1 and channels <= _dense_up_to(x.dtype):
            return norm_relu(norm, F.conv2d(x, conv.dense_weight(), stride=stride, padding=1), residual), x
    return norm_relu(norm, conv(x), residual), x


class FusedSequential(nn.Sequential):
    """An nn.Sequential that computes a layer and the BatchNorm and ReLU after it by `conv_norm_relu`."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer, *layers = layers
            if len(layers) > 1 and type(layers[0]) is nn.BatchNorm2d and is_itself(layers[1], nn.ReLU):
                norm, _, *layers = layers
                x = conv_norm_relu(layer, norm, x)
            else:
                x = layer(x)
        return x


def with_norm_relu(*convs: nn.Module) -> list[nn.Module]:
    """Layers of a `FusedSequential`: each of these convolutions with BatchNorm and ReLU."""
    return [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]


@functools.cache
def _dense_up_to(dtype: torch.dtype) -> int:
    """The channels up to which a dense convolution is faster than a group convolution and its pointwise stage.

    It does several times the multiplications, but in matrices that a CPU is made for, and with one feature map less
    to write and read. Measured in experiment/PERFORMANCE.md.
    """
    return 32 if dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False) else 16


def _in_channels_last(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else residual.contiguous(memory_format=torch.channels_last)
