"""The cheap convolutions of the paper (arXiv 1909.13063, section 3): depthwise, group and shift.

A cheap convolution is a k x k *spatial* stage that keeps the channels (and is cheap, or free) followed by a 1 x 1
*pointwise* stage that mixes them. This is the only file that knows the kinds apart; networks get their convolutions
from a plan (`standard_convs` or `cheap_convs`).
"""

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from utils.errors import UserError

KINDS = ("depthwise", "group", "shift")

Conv = Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size=3, stride=1) -> convolution without bias
ConvPlan = Callable[[int], list[Conv]]  # number of replaceable convolutions -> one factory each, in forward order


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """Where `out[i] = x[i + offset]` stays inside an axis of `size`: the slice of out and the slice of x."""
    offset = max(-size, min(size, offset))
    return slice(max(0, -offset), size - max(0, offset)), slice(max(0, offset), size + min(0, offset))


def _shift(x: Tensor, kernel_size: int, sign: int) -> Tensor:
    """Move channel c of x (B, C, H, W) by sign * (dy, dx); zeros come in from outside. Keeps x's memory format."""
    channels, height, width = x.shape[1:]
    offsets = kernel_size**2
    moved = channels - channels % offsets
    out = torch.zeros_like(x)
    # The offset of a moved channel depends on c % k^2 alone, so k^2 copies of strided channels move them all.
    for c in range(min(offsets, moved)):
        dy, dx = c // kernel_size - kernel_size // 2, c % kernel_size - kernel_size // 2
        (out_rows, rows), (out_columns, columns) = _overlap(height, sign * dy), _overlap(width, sign * dx)
        out[:, c:moved:offsets, out_rows, out_columns] = x[:, c:moved:offsets, rows, columns]
    out[:, moved:] = x[:, moved:]
    return out


class _Shift(torch.autograd.Function):
    """The gradient of a shift is the shift by the opposite offsets: no convolution in either direction."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: int, sign: int) -> Tensor:
        ctx.kernel_size, ctx.sign = kernel_size, sign
        return _shift(x, kernel_size, sign)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Shift.apply(grad, ctx.kernel_size, -ctx.sign), None, None


class Shift2d(nn.Module):
    """Move every channel by one fixed offset: a spatial stage without weights and without multiplications.

    `out[c, y, x] = in[c, y + dy, x + dx]` with `dx = c % k - k // 2`, `dy = (c // k) % k - k // 2`, zeros outside, for
    c < k^2 * floor(C / k^2); the remaining channels stay where they are (Wu et al., arXiv 1711.08141, as released
    with arXiv 1909.13063). (B, C, H, W) -> (B, C, H, W), in NCHW or channels_last.

    Raises:
        UserError (a ValueError): an even kernel, which has no center.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        super().__init__()
        if kernel_size % 2 == 0:
            raise UserError(f"a shift needs an odd kernel size, not {kernel_size}")
        self.channels, self.kernel_size = channels, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return _Shift.apply(x, self.kernel_size, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


class CheapConv2d(nn.Module):
    """A k x k convolution in two cheap stages: `.spatial` (in -> in, k x k), then `.pointwise` (in -> out, 1 x 1).

    The stride sits on the pointwise stage; nothing stands between the two, and neither has a bias.
    (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).

    Args:
        kind: "depthwise" (one k x k filter a channel), "group" (`groups` groups) or "shift" (no weights).
        groups: of the spatial stage, for "group" alone.

    Raises:
        UserError (a ValueError): an unknown kind, `groups` that does not divide in_channels, an even kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        kind: str = "depthwise",
        groups: int = 4,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown convolution '{kind}': choose from {', '.join(KINDS)}")
        if kernel_size % 2 == 0:
            raise UserError(f"a cheap convolution needs an odd kernel size, not {kernel_size}")
        if kind == "group" and (groups < 1 or in_channels % groups):
            raise UserError(
                f"groups = {groups} does not divide the {in_channels} channels of a convolution: use a divisor"
            )
        self.kernel_size = kernel_size
        if kind == "shift":
            self.spatial = Shift2d(in_channels, kernel_size)
        else:
            groups = groups if kind == "group" else in_channels
            self.spatial = standard_conv(in_channels, in_channels, kernel_size, groups=groups)
        self.pointwise = standard_conv(in_channels, out_channels, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.spatial(x))

    def depthwise_filters(self) -> Tensor | None:
        """The spatial stage as 3 x 3 filters, (in, 1, 3, 3), one a channel; None if it is not made of those."""
        if self.kernel_size != 3:
            return None
        if isinstance(self.spatial, Shift2d):
            return _shift_filters(self.spatial.channels)
        return self.spatial.weight if self.spatial.groups == self.spatial.in_channels else None

    def dense_weight(self) -> Tensor:
        """The weight (out, in, k, k) of the one convolution, of the same stride, that both stages amount to.

        Not for a shift, which has no weights to take part.
        """
        spatial, groups, size = self.spatial.weight.float(), self.spatial.groups, self.kernel_size
        out_channels, in_channels = self.pointwise.weight.shape[:2]
        mixing = self.pointwise.weight.reshape(out_channels, groups, -1)
        with torch.autocast(spatial.device.type, enabled=False):
            dense = torch.einsum("ogm,gmi->ogi", mixing, spatial.reshape(groups, in_channels // groups, -1))
        return dense.reshape(out_channels, in_channels, size, size)


@functools.cache
def _shift_filters(channels: int) -> Tensor:
    """The 3 x 3 shift of so many channels as filters: a shift back takes a single 1 from the center to its tap."""
    with torch.inference_mode(False):  # training may use what evaluation was the first to ask for
        center = torch.zeros(1, channels, 3, 3)
        center[..., 1, 1] = 1
        return _shift(center, kernel_size=3, sign=-1).view(channels, 1, 3, 3)


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
    pruned_num = count if pruned_num is None else pruned_num
    if not 0 <= pruned_num <= count:
        raise UserError(f"pruned_num = {pruned_num} is out of range: this network has {count} replaceable convolutions")
    return [standard_conv] * (count - pruned_num) + [partial(CheapConv2d, kind=kind, groups=groups)] * pruned_num


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
