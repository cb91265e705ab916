"""The shift (Wu et al., arXiv 1711.08141): a spatial stage without weights and without multiplications."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from utils.errors import UserError

Pair = tuple[int, int]
Padding = int | Pair | str  # as in nn.Conv2d: on both sides of each axis, "same" or "valid"


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """Where `out[i] = x[i + offset]` stays inside an axis of `size`: the slice of out and the slice of x."""
    offset = max(-size, min(size, offset))
    return slice(max(0, -offset), size - max(0, offset)), slice(max(0, offset), size + min(0, offset))


def _shift(x: Tensor, kernel_size: Pair, step: Pair) -> Tensor:
    """Move channel c of x (B, C, H, W) by its (dy, dx) times step; zeros come in from outside. Keeps the memory format.

    A negative step moves back.
    """
    channels, height, width = x.shape[1:]
    rows, columns = kernel_size
    offsets = rows * columns
    moved = channels - channels % offsets
    out = torch.zeros_like(x)
    # The offset of a moved channel depends on c % (rows * columns) alone: so many copies of strided channels do it.
    for c in range(min(offsets, moved)):
        dy, dx = c // columns - rows // 2, c % columns - columns // 2
        (out_y, in_y), (out_x, in_x) = _overlap(height, step[0] * dy), _overlap(width, step[1] * dx)
        out[:, c:moved:offsets, out_y, out_x] = x[:, c:moved:offsets, in_y, in_x]
    out[:, moved:] = x[:, moved:]
    return out


class _Shift(torch.autograd.Function):
    """The gradient of a shift is the shift by the opposite offsets: no convolution in either direction."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: Pair, step: Pair) -> Tensor:
        ctx.kernel_size, ctx.step = kernel_size, step
        return _shift(x, kernel_size, step)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        back = (-ctx.step[0], -ctx.step[1])
        return _Shift.apply(grad, ctx.kernel_size, back), None, None


class Shift2d(nn.Module):
    """Move every channel by one fixed offset: a spatial stage without weights and without multiplications.

    `out[c, y, x] = in[c, y + dy, x + dx]` with `dx = c % k - k // 2`, `dy = (c // k) % k - k // 2`, zeros outside, for
    c < k^2 * floor(C / k^2); the remaining channels stay where they are (Wu et al., arXiv 1711.08141, as released
    with arXiv 1909.13063). (B, C, H, W) in NCHW or channels_last.

    It is a depthwise convolution with a single 1 in each filter and has its arguments and attributes: a kernel_size
    (k_y, k_x), a padding (by default one that keeps the size), a dilation that multiplies the offsets, a padding_mode,
    groups, and the filters as `weight`, which is no parameter and always on the CPU.

    Raises:
        UserError (a ValueError): an even kernel, which has no center, without a padding.
    """

    stride = (1, 1)

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair = 3,
        padding: Padding | None = None,
        dilation: int | Pair = 1,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        if padding is None:
            padding = same_padding(kernel_size, dilation)
        self.window = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        conv = nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False, device="meta", **self.window)
        self.channels = self.groups = channels
        self.kernel_size, self.dilation = conv.kernel_size, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        self.register_parameter("bias", None)
        self.pad = tuple(conv._reversed_padding_repeated_twice)  # in the order of F.pad, as the next one
        (rows, columns), (high, wide) = self.kernel_size, self.dilation
        sides = wide * (columns // 2), wide * ((columns - 1) // 2)
        self.crop = (*sides, high * (rows // 2), high * ((rows - 1) // 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.pad == self.crop and self.padding_mode == "zeros":  # what pads is cut off again
            usual = self.kernel_size == (3, 3) and self.dilation == (1, 1)
            if usual and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and not x.is_contiguous():
                # In channels_last, strided channels are far apart in memory, and PyTorch's convolution is faster.
                return F.conv2d(x, self.weight.to(x.dtype), padding=1, groups=self.channels)
            return _Shift.apply(x, self.kernel_size, self.dilation)
        x = F.pad(x, self.pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return F.pad(_Shift.apply(x, self.kernel_size, self.dilation), [-side for side in self.crop])

    @property
    def weight(self) -> Tensor:
        return shift_filters(self.channels, self.kernel_size)

    def as_conv(self) -> nn.Conv2d:
        """The depthwise convolution, with frozen weights, that computes the same of finite numbers."""
        return frozen_conv(self.weight.clone(), groups=self.channels, **self.window)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


@functools.cache
def shift_filters(channels: int, kernel_size: Pair = (3, 3)) -> Tensor:
    """The shift of so many channels as filters: a shift back takes a single 1 from the center to its tap."""
    rows, columns = kernel_size
    with torch.inference_mode(False):  # training may use what evaluation was the first to ask for
        center = torch.zeros(1, channels, rows, columns)
        center[..., rows // 2, columns // 2] = 1
        return _shift(center, kernel_size, step=(-1, -1)).view(channels, 1, rows, columns)


def frozen_conv(weight: Tensor, groups: int = 1, **window: Any) -> nn.Conv2d:
    """The convolution with this weight (out, in / groups, k_y, k_x), which is not trained."""
    (out_channels, group), kernel_size = weight.shape[:2], tuple(weight.shape[2:])
    conv = nn.Conv2d(group * groups, out_channels, kernel_size, groups=groups, bias=False, **window)
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return conv


def pad_same(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Pad x (B, C, H, W) as TensorFlow's "SAME" does: a convolution then has ceil(size / stride) pixels an axis.

    The padding depends on the size of x; of an odd number of zeros, one more is at the end.
    """
    sides = []  # in the order of F.pad
    for axis in (1, 0):
        size, step, reach = x.shape[2 + axis], stride[axis], dilation[axis] * (kernel_size[axis] - 1)
        total = max((-(-size // step) - 1) * step + reach + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


def same_padding(kernel_size: int | Pair, dilation: int | Pair) -> Pair:
    """The padding with which an odd kernel keeps the size of a map."""
    sizes, steps = _pair(kernel_size), _pair(dilation)
    if not all(size % 2 for size in sizes):
        raise UserError(f"kernel size {sizes} has no center: use an odd kernel size, or give a padding")
    return tuple(step * (size // 2) for size, step in zip(sizes, steps, strict=True))
