"""Calls of the kernels, for modules and tensors that conditions.py lets pass."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels import library
from model.kernels.conditions import vectors


def infer_norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor:
    y, channels = torch.empty_like(x), x.shape[1]
    tensors = x.data_ptr(), _pointer(residual), *_statistics(norm), y.data_ptr()
    library.current.norm_relu_infer(*tensors, x.numel() // channels, channels, *_run(x))
    return y


def infer_cheap_conv(
    x: Tensor, filters: Tensor, mixing: Tensor, stride: int, norm: nn.BatchNorm2d, residual: Tensor | None
) -> Tensor:
    mixing = mixing.contiguous()
    if not filters.is_contiguous(memory_format=torch.channels_last):
        filters = filters.contiguous()
    (batch, channels, height, width), out_channels = x.shape, mixing.shape[0]
    z = _empty(x, out_channels, stride)
    tensors = x.data_ptr(), filters.data_ptr(), mixing.data_ptr(), _pointer(residual), *_statistics(norm), z.data_ptr()
    shape = batch, height, width, channels, out_channels, stride
    library.current.cheap_conv_infer(*tensors, *shape, filters.shape[1], filters.stride(3), *_run(x))
    return z


class NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None) -> Tensor:
        y, coefficients = torch.empty_like(x), torch.empty(6, x.shape[1])
        ctx.save_for_backward(x, coefficients)
        size = x.numel() // x.shape[1], x.shape[1]
        inputs, outputs = (*_pointers(x, residual), *_statistics(norm)), _pointers(y, coefficients)
        library.current.norm_relu_forward(*inputs, norm.momentum, *outputs, *size, *_run(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), *torch.empty(2, x.shape[1])
        size = x.numel() // x.shape[1], x.shape[1]
        tensors = _pointers(grad, x, coefficients, grad_x, grad_weight, grad_bias)
        library.current.norm_relu_backward(*tensors, *size, *_run(x))
        return grad_x, grad_weight, grad_bias, None, grad if ctx.needs_input_grad[4] else None


class CheapConvNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, filters: Tensor, pointwise: Tensor, weight: Tensor, bias: Tensor, stride: int,
        norm: nn.BatchNorm2d, residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        batch, channels, height, width = x.shape
        ctx.shape = batch, height, width, channels, len(pointwise), stride
        z = _empty(x, len(pointwise), stride)
        y, coefficients = torch.empty_like(z), torch.empty(6, len(pointwise))
        ctx.save_for_backward(x, filters, pointwise, y, coefficients)
        inputs, outputs = _pointers(x, filters, pointwise, residual), _pointers(y, z, coefficients)
        library.current.cheap_conv_forward(*inputs, *_statistics(norm), norm.momentum, *outputs, *ctx.shape, *_run(x))
        return z, x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_skip: Tensor | None) -> tuple[Tensor | None, ...]:
        x, filters, pointwise, y, coefficients = ctx.saved_tensors
        if grad is None:
            return grad_skip, *[None] * 7
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_skip = None if grad_skip is None else grad_skip.contiguous(memory_format=torch.channels_last)
        grad_x, grad_pointwise = torch.empty_like(x), torch.zeros_like(pointwise)
        grad_filters = torch.zeros_like(filters) if ctx.needs_input_grad[1] else None
        grad_weight, grad_bias = torch.empty(2, len(pointwise))
        tensors = grad, grad_skip, x, filters, pointwise, y, coefficients, grad_x, grad_filters, grad_pointwise
        library.current.cheap_conv_backward(*_pointers(*tensors, grad_weight, grad_bias), *ctx.shape, *_run(x))
        grad_residual = grad if ctx.needs_input_grad[7] else None
        return grad_x, grad_filters, grad_pointwise, grad_weight, grad_bias, None, None, grad_residual


def _empty(x: Tensor, channels: int, stride: int) -> Tensor:
    """The output, not yet computed and in channels_last, of a 3 x 3 convolution of x with padding 1."""
    batch, _, height, width = x.shape
    height, width = -(-height // stride), -(-width // stride)
    # torch.empty takes longer for its memory_format.
    strides = height * width * channels, 1, width * channels, channels
    return torch.empty_strided((batch, channels, height, width), strides, dtype=x.dtype)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [_pointer(tensor) for tensor in tensors]


def _statistics(norm: nn.BatchNorm2d) -> tuple[int | float, ...]:
    """Its weight, bias, running mean and running variance, as pointers, and eps."""
    weight, bias, mean, var = vectors(norm)
    return weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), var.data_ptr(), norm.eps


def _run(x: Tensor) -> tuple[bool, int]:
    """The last arguments of every kernel: whether feature maps are bfloat16, and the threads to use."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()
