"""The cheap convolutions of the paper (arXiv 1909.13063, section 3): depthwise, group and shift.

A cheap convolution is a k x k *spatial* stage that keeps the channels (and is cheap, or free) followed by a 1 x 1
*pointwise* stage that mixes them. This is the only file that knows the kinds apart; networks get their convolutions
from a plan (`standard_convs` or `cheap_convs`).
"""

import functools
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

Pair = tuple[int, int]
Padding = int | Pair | str  # as nn.Conv2d's: on both sides of each axis, or "same", or "valid"

_SHIFT = attrgetter("kernel_size", "dilation", "pad", "padding_mode")
_WINDOW = attrgetter("kernel_size", "stride", "padding", "dilation", "padding_mode")

KINDS = ("depthwise", "group", "shift")

Conv = Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size=3, stride=1) -> convolution without bias
ConvPlan = Callable[[int], list[Conv]]  # number of replaceable convolutions -> one factory each, in forward order


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

    It is a depthwise convolution with a single 1 in each filter, and takes what nn.Conv2d takes: a kernel_size
    (k_y, k_x), a padding, a dilation that multiplies the offsets, and a padding_mode; the output has the size that the
    convolution's has. By default that is the input's.

    Raises:
        UserError (a ValueError): an even kernel, which has no center, without a padding.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair = 3,
        padding: Padding | None = None,
        dilation: int | Pair = 1,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.channels, self.kernel_size, self.dilation = channels, _pair(kernel_size), _pair(dilation)
        if padding is None:
            padding = _keeping_size(self.kernel_size, self.dilation)
        reach = [step * (size - 1) for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        center = [step * (size // 2) for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        before = [total // 2 for total in reach] if padding == "same" else _pair(0 if padding == "valid" else padding)
        after = [total - first for total, first in zip(reach, before, strict=True)] if padding == "same" else before
        self.pad = (before[1], after[1], before[0], after[0])  # in the order of F.pad
        self.crop = (center[1], reach[1] - center[1], center[0], reach[0] - center[0])
        self.padding_mode = "constant" if padding_mode == "zeros" else padding_mode

    def forward(self, x: Tensor) -> Tensor:
        if self.pad == self.crop and self.padding_mode == "constant":  # what pads is cut off again
            usual = self.kernel_size == (3, 3) and self.dilation == (1, 1)
            if usual and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and not x.is_contiguous():
                # In channels_last, strided channels are far apart in memory, and PyTorch's convolution is faster.
                return F.conv2d(x, _shift_filters(self.channels).to(x.dtype), padding=1, groups=self.channels)
            return _Shift.apply(x, self.kernel_size, self.dilation)
        x = F.pad(x, self.pad, self.padding_mode)
        return F.pad(_Shift.apply(x, self.kernel_size, self.dilation), [-side for side in self.crop])

    def as_conv(self) -> nn.Conv2d:
        """The depthwise convolution, with frozen weights, that computes the same of finite numbers."""
        left, right, top, bottom = self.pad
        return _frozen_conv(
            _shift_filters(self.channels, self.kernel_size).clone(),
            padding=(top, left) if (top, left) == (bottom, right) else "same",
            groups=self.channels,
            dilation=self.dilation,
            padding_mode="zeros" if self.padding_mode == "constant" else self.padding_mode,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


class CheapConv2d(nn.Module):
    """A k x k convolution in two cheap stages: `.spatial` (in -> in, k x k), then `.pointwise` (in -> out, 1 x 1).

    The stride and the bias, if there is to be one, sit on the pointwise stage; nothing stands between the two.
    (B, in, H, W) -> (B, out, H', W'), where H' and W' are those of nn.Conv2d with the same arguments: by default
    ceil(H / stride) and ceil(W / stride).

    Args:
        kind: "depthwise" (one k x k filter a channel), "group" (`groups` groups) or "shift" (no weights).
        groups: of the spatial stage, for "group" alone.
        padding: k // 2 by default.

    Raises:
        UserError (a ValueError): an unknown kind, `groups` that does not divide in_channels, an even kernel without a
            padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        kind: str = "depthwise",
        groups: int = 4,
        *,
        padding: Padding | None = None,
        dilation: int | Pair = 1,
        padding_mode: str = "zeros",
        bias: bool = False,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown convolution '{kind}': choose from {', '.join(KINDS)}")
        if kind == "group" and (groups < 1 or in_channels % groups):
            raise UserError(
                f"groups = {groups} does not divide the {in_channels} channels of a convolution: use a divisor"
            )
        kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if padding is None:
            padding = _keeping_size(kernel_size, dilation)
        window = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        if kind == "shift":
            self.spatial = Shift2d(in_channels, kernel_size, **window)
        else:
            groups = groups if kind == "group" else in_channels
            self.spatial = nn.Conv2d(in_channels, in_channels, kernel_size, groups=groups, bias=False, **window)
        self.pointwise = subsample_first(nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias))
        self.stride = stride[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.spatial(x))

    @property
    def is_plain(self) -> bool:
        """Whether it is 3 x 3 with padding 1, one stride for both axes and no bias, as by default."""
        spatial, pointwise = self._modules["spatial"], self._modules["pointwise"]  # faster than as attributes
        rows, columns = pointwise.stride
        if rows != columns or pointwise.padding != (0, 0) or not _lacks_bias(pointwise):
            return False
        if type(spatial) is Shift2d:
            return _SHIFT(spatial) == ((3, 3), (1, 1), (1, 1, 1, 1), "constant")
        return _WINDOW(spatial) == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros") and _lacks_bias(spatial)

    def spatial_filters(self) -> Tensor:
        """The spatial stage of a plain one as 3 x 3 filters, (in, in / groups, 3, 3)."""
        return _shift_filters(self.spatial.channels) if isinstance(self.spatial, Shift2d) else self.spatial.weight

    @property
    def standard_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the standard convolution that this one replaces, (out, in, k, k)."""
        return (*self.pointwise.weight.shape[:2], *self.spatial.kernel_size)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> float:
        """Take the weights whose product is nearest, in the Frobenius norm, to a standard weight (out, in, k, k).

        For the n input channels of one group, the standard weight is a matrix (out, n k^2), and what this convolution
        can express are the matrices of rank n or less: the nearest is the truncated singular value decomposition. A
        shift can express one tap a channel, and takes that.

        Returns:
            The squared distance to the standard weight.
        """
        weight = weight.detach().double().cpu()
        out_channels, in_channels = weight.shape[:2]
        if isinstance(self.spatial, Shift2d):
            taps = _shift_filters(in_channels, self.spatial.kernel_size).squeeze(1).double()
            columns = torch.einsum("oikl,ikl->oi", weight, taps)
            self.pointwise.weight.copy_(columns[..., None, None])
            return (weight.square().sum() - columns.square().sum()).item()
        groups, n = self.spatial.groups, in_channels // self.spatial.groups
        matrices = weight.reshape(out_channels, groups, -1).transpose(0, 1)
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        rank = min(n, s.shape[1])  # kernels beyond it keep their weights, for the gradient to find
        root = s[:, :rank].sqrt()
        kernels = self.spatial.weight.view(groups, n, -1)
        kernels[:, :rank] = (root[..., None] * v[:, :rank]).to(kernels)
        columns = weight.new_zeros(groups, out_channels, n)
        columns[..., :rank] = u[..., :rank] * root[:, None]
        self.pointwise.weight.copy_(columns.transpose(0, 1).reshape(self.pointwise.weight.shape))
        return s[:, rank:].square().sum().item()

    def dense_weight(self) -> Tensor:
        """The weight (out, in, k, k) of the one convolution, of the same stride, that both stages amount to.

        Not for a shift, which has no weights to take part.
        """
        spatial, groups = self.spatial.weight.float(), self.spatial.groups
        out_channels, in_channels = self.pointwise.weight.shape[:2]
        mixing = self.pointwise.weight.reshape(out_channels, groups, -1)
        with torch.autocast(spatial.device.type, enabled=False):
            dense = torch.einsum("ogm,gmi->ogi", mixing, spatial.reshape(groups, in_channels // groups, -1))
        return dense.reshape(out_channels, in_channels, *spatial.shape[2:])

    def as_convs(self, wide: int) -> nn.Module:
        """A plain one as the standard convolutions, with frozen weights, that runtimes compute fastest.

        The spatial stage has the stride, and so leaves out what the pointwise stage would skip. Groups of fewer than
        `wide` channels are merged with their neighbors, with zeros for what did not connect them; if that takes all
        channels, both stages become the one dense convolution that they amount to. A shift is a depthwise convolution.
        """
        filters = self.spatial_filters().detach()
        (channels, group, *kernel), groups = filters.shape, len(filters) // filters.shape[1]
        if 1 < group < wide:
            merged = next((n for n in range(1, groups) if groups % n == 0 and n * group >= wide), groups)
            if merged == groups:
                return _frozen_conv(self.dense_weight(), stride=self.stride, padding=1)
            narrow = filters.reshape(groups // merged, merged, group, group, *kernel)
            blocks = narrow.new_zeros(groups // merged, merged, group, merged, group, *kernel)
            for i in range(merged):  # each of the groups that are one now still sees its own channels alone
                blocks[:, i, :, i] = narrow[:, i]
            filters, groups = blocks.reshape(channels, -1, *kernel), groups // merged
        spatial = _frozen_conv(filters.clone(), stride=self.stride, padding=1, groups=groups)
        return nn.Sequential(spatial, _frozen_conv(self.pointwise.weight))


def _lacks_bias(conv: nn.Conv2d) -> bool:
    return conv._parameters.get("bias", conv) is None  # `conv.bias` is slow where it is None


def subsample_first(network: nn.Module) -> nn.Module:
    """Let the strided 1 x 1 convolutions of a network drop the pixels that they skip before they convolve, on the CPU.

    The result is the same, with less work. oneDNN's gradient of the weight of such a convolution in channels_last, with
    fewer than 16 input channels (AVX2: 8), writes out of bounds. The modules stay nn.Conv2d, with their stride, and
    exported graphs have the usual convolution.

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
    if not x.is_cpu or torch.compiler.is_exporting():
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


def _frozen_conv(weight: Tensor, groups: int = 1, **window: Any) -> nn.Conv2d:
    """The convolution with this weight (out, in / groups, k_y, k_x), which is not trained."""
    (out_channels, group), kernel_size = weight.shape[:2], tuple(weight.shape[2:])
    conv = nn.Conv2d(group * groups, out_channels, kernel_size, groups=groups, bias=False, **window)
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return conv


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


def _keeping_size(kernel_size: Pair, dilation: Pair) -> Pair:
    """The padding with which an odd kernel keeps the size of a map."""
    if not all(size % 2 for size in kernel_size):
        raise UserError(f"kernel size {kernel_size} has no center: use an odd kernel size, or give a padding")
    return tuple(step * (size // 2) for size, step in zip(kernel_size, dilation, strict=True))


@functools.cache
def _shift_filters(channels: int, kernel_size: Pair = (3, 3)) -> Tensor:
    """The shift of so many channels as filters: a shift back takes a single 1 from the center to its tap."""
    rows, columns = kernel_size
    with torch.inference_mode(False):  # training may use what evaluation was the first to ask for
        center = torch.zeros(1, channels, rows, columns)
        center[..., rows // 2, columns // 2] = 1
        return _shift(center, kernel_size, step=(-1, -1)).view(channels, 1, rows, columns)


def standard_conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """The convolution that the cheap ones replace: k x k, padding k // 2, no bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


def standard_convs(count: int) -> list[Conv]:
    """The plan of a standard network."""
    return [standard_conv] * count


def cheap_convs(count: int, kind: str, groups: int, pruned_num: int | None) -> list[Conv]:
    """The plan of a student: the last `pruned_num` of its `count` replaceable convolutions (None: all) are cheap.

    They are counted from the output side backwards, where the parameters are.

    Raises:
        UserError (a ValueError): pruned_num outside 0 .. count.
    """
    pruned_num = number_to_prune(count, pruned_num)
    return [standard_conv] * (count - pruned_num) + [partial(CheapConv2d, kind=kind, groups=groups)] * pruned_num


def number_to_prune(count: int, pruned_num: int | None) -> int:
    """How many of `count` replaceable convolutions to replace, for a pruned_num that may be None: all.

    Raises:
        UserError (a ValueError): pruned_num outside 0 .. count.
    """
    if pruned_num is None:
        return count
    if not 0 <= pruned_num <= count:
        raise UserError(f"pruned_num = {pruned_num} is out of range: this network has {count} replaceable convolutions")
    return pruned_num


def count_cheap(network: nn.Module) -> int:
    """How many of a network's standard convolutions have been replaced by cheap ones: its pruned_num."""
    return sum(isinstance(module, CheapConv2d) for module in network.modules())


def initialize(network: nn.Module) -> None:
    """Kaiming normal for convolutions (He et al., arXiv 1502.01852), BatchNorm at weight 1 and bias 0.

    Over the fan in: PyTorch's fan out does not know about groups and would make a depthwise filter far too small.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
